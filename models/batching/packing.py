"""Pack several examples into one sequence: which examples go together, and where each of them lies.

FLAN trains on packed sequences (arXiv:2109.01652, section 2.4). An example stays whole. Packing is first-fit in order:
each example goes into the first sequence that has room. The result depends on the order only, and needs at most 1.7
times the sequences of the best packing (Dósa and Sgall 2013). Each batch is packed separately, so that packing changes
neither the order of examples nor the length of an epoch.

A *side* is what a model reads as one sequence. A causal model has one side, of prompt and target; an encoder-decoder has
two, each with its own capacity. Packed examples must not see each other: positions start at 0 in every segment, and
attention stays within the segment (`segment_mask`). `kd.models.packable` checks that a model respects this. Segment ids
count from 1; padding has segment id 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from kd.common.errors import DataError

if TYPE_CHECKING:
    import torch

Size = tuple[int, ...]
"""Tokens of an example on each side."""


class Packer:
    """Fills sequences with examples, first-fit."""

    def __init__(self, capacity: Size | None) -> None:
        """`capacity` is in tokens per side of a sequence; None makes every example a sequence of its own."""
        self.capacity = capacity
        self.examples: list[int] = []
        """Numbers of the examples, in the order they were added."""
        self.sequences: list[list[int]] = []
        """Numbers of the examples of each sequence."""
        self.tokens = 0
        """Tokens of all examples, without padding."""
        self._used: list[Size] = []
        self._widths: Size = ()

    def with_one_more(self, size: Size) -> tuple[int, int]:
        """`(sequences, tokens with padding)` as they would be with one more example of this size."""
        index, used = self._first_with_room(size)
        widths = map(max, self._widths or used, used)
        count = max(len(self.sequences), index + 1)
        return count, count * sum(widths)

    def add(self, example: int, size: Size) -> None:
        """Add an example to the first sequence with room. Raises DataError if it is larger than a sequence."""
        if self.capacity is not None and any(n > most for n, most in zip(size, self.capacity, strict=True)):
            raise DataError(
                "an example is longer than a packed sequence",
                where=f"example {example}",
                found=f"{' + '.join(map(str, size))} tokens",
                expected=f"at most {' + '.join(map(str, self.capacity))}",
                try_="a larger --seq-len",
            )
        index, used = self._first_with_room(size)
        if index == len(self.sequences):
            self.sequences.append([])
            self._used.append(used)
        self.sequences[index].append(example)
        self._used[index] = used
        self._widths = tuple(map(max, self._widths or used, used))
        self.examples.append(example)
        self.tokens += sum(size)

    @property
    def padded(self) -> int:
        """Tokens with padding: on each side, every sequence is as wide as the widest."""
        return len(self.sequences) * sum(self._widths)

    def _first_with_room(self, size: Size) -> tuple[int, Size]:
        """Index of the first sequence with room (of a new one where none has), and its tokens with the example added."""
        if self.capacity is not None:
            for index, before in enumerate(self._used):
                used = tuple(a + b for a, b in zip(before, size, strict=True))
                if all(a <= most for a, most in zip(used, self.capacity, strict=True)):
                    return index, used
        return len(self.sequences), size


def pack_sequences(sizes: Sequence[Size], capacity: Size | None) -> list[list[int]]:
    """Pack examples first-fit: lists of indices into `sizes`, each index in exactly one list. Raises as `Packer.add`."""
    packer = Packer(capacity)
    for example, size in enumerate(sizes):
        packer.add(example, size)
    return packer.sequences


def lay_out(ids: Sequence[np.ndarray], sequences: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """One side of a batch: `input_ids`, `segment_ids`, `position_ids` `[B, T]` int64, and `starts [E]`.

    ids        token ids of every example
    sequences  indices into `ids`, as `pack_sequences` gives them
    starts     flat index into `[B * T]` of each example's first token
    """
    width = max(1, *(sum(len(ids[i]) for i in sequence) for sequence in sequences))
    tokens, segments, positions = (np.zeros((len(sequences), width), dtype=np.int64) for _ in range(3))
    starts = np.zeros(len(ids), dtype=np.int64)
    for b, sequence in enumerate(sequences):
        start = 0
        for number, i in enumerate(sequence, 1):
            span = slice(start, start + len(ids[i]))
            tokens[b, span], segments[b, span], positions[b, span] = ids[i], number, np.arange(len(ids[i]))
            starts[i] = b * width + start
            start = span.stop
    return {"input_ids": tokens, "segment_ids": segments, "position_ids": positions, "starts": starts}


def segment_mask(queries: torch.Tensor, keys: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
    """`[B, Q], [B, K] -> [B, Q, K]` bool: True where a query may attend to a key, that is within one segment.

    Segment ids are as `lay_out` gives them. With `causal`, keys after the query are masked. Padding is a segment like
    any other, so that every token of one side attends to at least itself.
    """
    mask = queries.unsqueeze(2) == keys.unsqueeze(1)
    return mask.tril() if causal else mask
