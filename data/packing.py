"""Several examples in one sequence: which go together, and what keeps them apart.

FLAN trains on packed sequences (arXiv:2109.01652, section 2.4). An example of input and target is one *segment* and
stays whole. Packing is first-fit in order: each example goes into the first sequence that has room, so the result
depends on the order alone and needs at most 1.7 times the sequences of the best packing (Dósa and Sgall 2013).
Finding that sequence takes O(log n) steps.

Packed examples must not see each other: positions start at 0 in every segment, and the attention mask is
block-diagonal. Padding has segment id 0; segments count from 1.

Shapes: N is the length of a sequence in tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kd.data.errors import DataError


@dataclass(frozen=True)
class Segment:
    """One example's place in a packed sequence."""

    example: int
    """Index in the lengths given."""
    start: int
    """First token in the sequence; the input comes first."""
    inputs: int
    """Tokens of the input."""
    targets: int
    """Tokens of the target."""

    @property
    def stop(self) -> int:
        return self.start + self.inputs + self.targets


def pack(lengths: Sequence[tuple[int, int]], *, max_tokens: int) -> list[list[Segment]]:
    """Sequences of at most `max_tokens` tokens, first-fit in order; every example is in exactly one, whole.

    lengths   (input, target) tokens per example, specials included
    Raises DataError for an example that is empty or longer than a sequence: cut it first.
    """
    if max_tokens < 1:
        raise DataError("a packed sequence is too small", found=max_tokens, expected="at least 1 token")
    sequences: list[list[Segment]] = []
    room = _Room(len(lengths))
    for example, (inputs, targets) in enumerate(lengths):
        size = inputs + targets
        if min(inputs, targets) < 0 or size == 0:
            raise DataError("an example has no tokens", where=f"example {example}", found=f"{inputs} + {targets}",
                            expected="at least one token")  # fmt: skip
        if size > max_tokens:
            raise DataError("an example is longer than a packed sequence", where=f"example {example}",
                            found=f"{inputs} + {targets} tokens", expected=f"at most {max_tokens}",
                            try_="cut or leave out long examples first")  # fmt: skip
        place = room.first(size)
        if place is None:
            place = len(sequences)
            sequences.append([])
            room.set(place, max_tokens)
        start = sequences[place][-1].stop if sequences[place] else 0
        sequences[place].append(Segment(example, start, inputs, targets))
        room.set(place, max_tokens - start - size)
    return sequences


class _Room:
    """Free tokens per sequence in a tree of maxima: the first sequence with room in O(log n) steps."""

    def __init__(self, sequences: int) -> None:
        self.leaves = 1 << max(sequences - 1, 0).bit_length()
        self.most = [0] * (2 * self.leaves)

    def set(self, index: int, free: int) -> None:
        node = index + self.leaves
        self.most[node] = free
        while node > 1:
            node //= 2
            self.most[node] = max(self.most[2 * node], self.most[2 * node + 1])

    def first(self, size: int) -> int | None:
        if self.most[1] < size:
            return None
        node = 1
        while node < self.leaves:
            node = 2 * node + (self.most[2 * node] < size)
        return node - self.leaves


def segment_ids(segments: Sequence[Segment], length: int) -> np.ndarray:
    """[N] int32: 1, 2, … per segment in order, 0 for padding. Raises DataError where `length` is too short."""
    _check_length(segments, length)
    ids = np.zeros(length, np.int32)
    for number, segment in enumerate(segments, 1):
        ids[segment.start : segment.stop] = number
    return ids


def positions(segments: Sequence[Segment], length: int) -> np.ndarray:
    """[N] int32: 0, 1, … from the start of each segment; 0 for padding."""
    _check_length(segments, length)
    found = np.zeros(length, np.int32)
    for segment in segments:
        found[segment.start : segment.stop] = np.arange(segment.stop - segment.start)
    return found


def target_mask(segments: Sequence[Segment], length: int) -> np.ndarray:
    """[N] bool: True on target tokens."""
    _check_length(segments, length)
    mask = np.zeros(length, np.bool_)
    for segment in segments:
        mask[segment.start + segment.inputs : segment.stop] = True
    return mask


def attention_mask(ids: np.ndarray, *, causal: bool = True) -> np.ndarray:
    """[N, N] bool, row = the token that looks: True within one segment, and backwards alone if `causal`.

    ids   [N] segment ids; 0 is padding, which sees itself alone (a softmax over nothing is NaN)
    """
    mask: np.ndarray = (ids[:, None] == ids[None, :]) & (ids[:, None] != 0)
    if causal:
        mask &= np.tri(len(ids), dtype=np.bool_)
    mask |= np.eye(len(ids), dtype=np.bool_) & (ids == 0)[:, None]
    return mask


def _check_length(segments: Sequence[Segment], length: int) -> None:
    end = max((s.stop for s in segments), default=0)
    if length < end:
        raise DataError(
            "a packed sequence does not fit its length", found=f"{end} tokens", expected=f"at most {length}"
        )
