"""The batches of a shard that are still to be scored, and smaller ones where memory runs out.

Batches are made inside a shard, by length and token budget, so that a resumed build makes the same batches. For the same
reason nothing is remembered of a shard whose batches had to be cut: the next one begins with the whole budget again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kd.models.batching.padded_batches import Size, batches_by_length, padded_tokens

SMALLEST_CHUNK = 16
"""Rows of the output layer below which a chunk is not halved any more."""


@dataclass(frozen=True)
class Batch:
    """Rows that are scored in one forward pass."""

    numbers: list[int]
    """Numbers into the shard's rows."""
    ties_need_a_sync: bool = False
    """Whether it is scored a second time, because ties at rank k could not be resolved without a device sync."""


class BatchQueue:
    """Batches in the order in which they are scored: longest rows first."""

    def __init__(self, sizes: Sequence[Size], token_budget: int, head_chunk: int) -> None:
        """`sizes`: of every row, see `LanguageModelHead.size`; `head_chunk`: rows of the output layer at a time."""
        self.head_chunk = head_chunk
        self._sizes = sizes
        self._budget = token_budget
        self._left = [Batch(numbers) for numbers in batches_by_length(sizes, token_budget)]

    def __bool__(self) -> bool:
        return bool(self._left)

    def take(self) -> Batch:
        """The next batch."""
        return self._left.pop(0)

    def put_back(self, batch: Batch) -> None:
        """Score this batch next."""
        self._left.insert(0, batch)

    def cut(self, batch: Batch) -> bool:
        """Make room for a batch that did not fit: half the budget for it and all that are left, else half the chunk.

        Returns False where neither can be halved: a single row that does not fit.
        """
        if len(batch.numbers) > 1:
            self._budget = padded_tokens([self._sizes[i] for i in batch.numbers]) // 2
            left = sorted(i for waiting in [batch, *self._left] for i in waiting.numbers)
            groups = batches_by_length([self._sizes[i] for i in left], self._budget)
            self._left = [Batch([left[i] for i in group]) for group in groups]
            return True
        if self.head_chunk > SMALLEST_CHUNK:
            self.head_chunk //= 2
            self.put_back(batch)
            return True
        return False
