"""Several examples in one sequence: which go together, and where each of them lies.

FLAN trains on packed sequences (arXiv:2109.01652, section 2.4). An example stays whole. Packing is first-fit in order:
each example goes into the first sequence that has room, so the result depends on the order alone and needs at most 1.7
times the sequences of the best packing (Dósa and Sgall 2013). A batch is packed by itself: sequences are few, and
packing changes neither the order of examples nor what an epoch is.

A *side* is what a model reads as one sequence. A causal model has one, of prompt and target; an encoder-decoder has
two, each with its own room. Packed examples must not see each other: positions start at 0 in every segment, and
attention stays within it (`segment_mask`; `kd.models.packable` tries it with a model). Padding has segment id 0; segments
count from 1.
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
    """Sequences that are being filled, first-fit."""

    def __init__(self, capacity: Size | None) -> None:
        """`capacity` tokens per side of a sequence; None = every example is a sequence of its own."""
        self.capacity = capacity
        self.examples: list[int] = []
        """In the order they were added."""
        self.sequences: list[list[int]] = []
        self.tokens = 0
        """Without padding."""
        self._used: list[Size] = []
        self._widths: Size = ()

    def with_one_more(self, size: Size) -> tuple[int, int]:
        """`(sequences, tokens with their padding)` if an example of this size were added."""
        place, used = self._place(size)
        widths = map(max, self._widths or used, used)
        count = max(len(self.sequences), place + 1)
        return count, count * sum(widths)

    def add(self, example: int, size: Size) -> None:
        """Put an example where it fits first. Raises DataError for one that is larger than a sequence."""
        if self.capacity is not None and any(n > most for n, most in zip(size, self.capacity, strict=True)):
            raise DataError(
                "an example is longer than a packed sequence",
                where=f"example {example}",
                found=f"{' + '.join(map(str, size))} tokens",
                expected=f"at most {' + '.join(map(str, self.capacity))}",
                try_="a larger --seq-len",
            )
        place, used = self._place(size)
        if place == len(self.sequences):
            self.sequences.append([])
            self._used.append(used)
        self.sequences[place].append(example)
        self._used[place] = used
        self._widths = tuple(map(max, self._widths or used, used))
        self.examples.append(example)
        self.tokens += sum(size)

    @property
    def padded(self) -> int:
        """Tokens with their padding: every sequence is as wide as the widest, on each side."""
        return len(self.sequences) * sum(self._widths)

    def _place(self, size: Size) -> tuple[int, Size]:
        """The sequence an example goes into, the next new one where none has room, and what is used there then."""
        if self.capacity is not None:
            for place, before in enumerate(self._used):
                used = tuple(a + b for a, b in zip(before, size, strict=True))
                if all(a <= most for a, most in zip(used, self.capacity, strict=True)):
                    return place, used
        return len(self.sequences), size


def pack(sizes: Sequence[Size], capacity: Size | None) -> list[list[int]]:
    """Sequences of numbers into `sizes`, first-fit in order; every example is in exactly one. Raises as `Packer.add`."""
    packer = Packer(capacity)
    for example, size in enumerate(sizes):
        packer.add(example, size)
    return packer.sequences


def lay_out(ids: Sequence[np.ndarray], sequences: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """One side of a batch: `input_ids`, `segment_ids`, `position_ids` `[B, T]` int64, and `starts [E]`.

    ids        token ids of every example
    sequences  numbers into `ids`, as `pack` gives them
    starts     flat index into `[B * T]` of each example's first token
    """
    width = max(1, *(sum(len(ids[i]) for i in sequence) for sequence in sequences))
    tokens, segments, positions = (np.zeros((len(sequences), width), dtype=np.int64) for _ in range(3))
    starts = np.zeros(len(ids), dtype=np.int64)
    for b, sequence in enumerate(sequences):
        start = 0
        for number, i in enumerate(sequence, 1):
            place = slice(start, start + len(ids[i]))
            tokens[b, place], segments[b, place], positions[b, place] = ids[i], number, np.arange(len(ids[i]))
            starts[i] = b * width + start
            start = place.stop
    return {"input_ids": tokens, "segment_ids": segments, "position_ids": positions, "starts": starts}


def segment_mask(queries: torch.Tensor, keys: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
    """`[B, Q], [B, K] -> [B, Q, K]` bool: may a token look there? Only within its segment, backwards alone if `causal`.

    Segment ids as `lay_out` gives them; padding is a segment like any other, so on one side no token looks
    at nothing.
    """
    mask = queries.unsqueeze(2) == keys.unsqueeze(1)
    return mask.tril() if causal else mask
