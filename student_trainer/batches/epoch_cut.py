"""One epoch's order, cut into micro-batches: any of them can be asked for, and no list of them is held.

The order is dealt to `shares`: share s gets the positions that are congruent to s, in order. A *round* is one micro-batch of each
share. Rounds follow one another while every share can fill one more. What is left of the shares then is cut as one, share after
share, and dealt out in as many blocks. Shares lie in lanes of their own (`kd.cache_builder.store.readers.epoch_order`), so
processes that take micro-batches in turn read different shards. With one share, the order is cut from its beginning to its end.

Micro-batches of a fixed number of examples are found by arithmetic. Others are found by walking along the lengths, about half a
microsecond an example, from the last mark that was left behind: by an earlier walk, or by `fast_marks` when batches of so many
tokens are counted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import NamedTuple, Protocol

import numpy as np

from kd.cache_builder.store.readers.epoch_order import EpochOrder
from kd.models.batching.packing import Packer, Size
from kd.student_trainer.counting.fast_marks import marks_of_shares

READ_AHEAD = 4096
"""Positions of a share that are worked out at once."""
MARK_EVERY = 1024
"""Micro-batches between two marks, at least."""


class Lengths(Protocol):
    """Tokens of examples: an array, or what looks them up."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, examples: np.ndarray, /) -> np.ndarray:
        """`[n]` or `[n, sides]` tokens of the examples `[n]`."""


@dataclass(frozen=True)
class CutRule:
    """When a micro-batch is full."""

    tokens: int | None = None
    """Most tokens with padding; it is full where one more example would exceed them."""
    sequences: int | None = None
    """Number of sequences, instead of tokens."""
    capacity: Size | None = None
    """Tokens of a packed sequence on each side; None = one example per sequence."""

    @property
    def counted(self) -> bool:
        """Whether every micro-batch has the same number of examples."""
        return self.sequences is not None and self.capacity is None


class MicroBatch(NamedTuple):
    """Some examples that are read together."""

    examples: tuple[int, ...]
    """Their numbers."""
    epoch: int
    tokens: int
    """Tokens without padding."""
    padded: int
    """Tokens with padding."""


class Mark(NamedTuple):
    """A place between two rounds."""

    batch: int
    """Number of micro-batches before it."""
    taken: tuple[int, ...]
    """Number of examples of each share before it."""


class EpochCut:
    """The micro-batches of an epoch, or of its first `size` examples."""

    def __init__(
        self,
        order: EpochOrder,
        lengths: Lengths,
        rule: CutRule,
        *,
        epoch: int,
        shares: int = 1,
        size: int | None = None,
        count: int | None = None,
    ) -> None:
        """`count` is the number of micro-batches, where it is known already."""
        self.order, self.lengths, self.rule, self.epoch, self.shares = order, lengths, rule, epoch, shares
        self.size = len(order) if size is None else size
        self._marks = [Mark(0, (0,) * shares)]
        self._count = count
        if rule.counted:
            self._count = -(-self.size // self._per_batch)

    @property
    def _per_batch(self) -> int:
        assert self.rule.sequences is not None
        return self.rule.sequences

    def __len__(self) -> int:
        if self._count is None:
            self._leave_marks()
            mark = self._marks[-1]  # walking on leaves others
            self._count = mark.batch + sum(1 for _ in self._from(mark))
        return self._count

    def _leave_marks(self) -> None:
        """Leave the marks of the whole epoch where that is faster than walking."""
        if self.rule.tokens is None or self.rule.capacity is not None:
            return
        number, taken = self._marks[-1]
        rounds = -(-MARK_EVERY // self.shares)
        marks = marks_of_shares(self.order, self.lengths, self.rule.tokens, taken=taken, size=self.size, every=rounds)
        self._marks += [Mark(number + n * rounds * self.shares, counts) for n, counts in enumerate(marks, 1)]

    def holds(self, number: int) -> bool:
        """Whether there is a micro-batch of this number. Nothing beyond it is looked at."""
        if self._count is not None:
            return number < self._count
        return number < self._marks[-1].batch or next(self.batches(number), None) is not None

    def batches(self, start: int = 0) -> Iterator[MicroBatch]:
        """The micro-batches from number `start` on."""
        mark = self.mark_before(start)
        return islice(self._from(mark), start - mark.batch, None)

    def examples_before(self, number: int) -> int:
        """Number of examples in the micro-batches before this one."""
        if self.rule.counted:
            return min(number * self._per_batch, self.size)
        mark = self.mark_before(number)
        later = islice(self._from(mark), number - mark.batch)
        return sum(mark.taken) + sum(len(batch.examples) for batch in later)

    def mark_before(self, number: int) -> Mark:
        """The last place before this micro-batch, or at it, from which batches can be cut."""
        if self.rule.counted:
            rounds = min(number // self.shares, self.size // self.shares // self._per_batch)
            return Mark(rounds * self.shares, (rounds * self._per_batch,) * self.shares)
        return self._marks[bisect_right(self._marks, number, key=lambda mark: mark.batch) - 1]

    def add_mark(self, mark: Mark) -> None:
        """Know a place that an earlier process has walked to."""
        if mark.batch > self._marks[-1].batch:
            self._marks.append(mark)

    def _from(self, mark: Mark) -> Iterator[MicroBatch]:
        """The micro-batches from a mark on; marks are left behind."""
        number, taken = mark
        streams = [_Stream(self, range(s + taken[s] * self.shares, self.size, self.shares)) for s in range(self.shares)]
        while True:
            one_round = []
            for stream in streams:
                if (batch := stream.full_batch()) is None:
                    break
                one_round.append(batch)
            if len(one_round) < self.shares:
                break
            yield from one_round
            number += self.shares
            taken = tuple(n + len(batch.examples) for n, batch in zip(taken, one_round, strict=True))
            if not self.rule.counted and number >= self._marks[-1].batch + MARK_EVERY:
                self._marks.append(Mark(number, taken))
        rest = [np.arange(s + n * self.shares, self.size, self.shares) for s, n in enumerate(taken)]
        last, left = _Stream(self, np.concatenate(rest)), []
        while (batch := last.full_batch() or last.last_batch()) is not None:
            left.append(batch)
            if self.shares == 1:
                yield left.pop()
        blocks = [
            left[block[0] : block[-1] + 1] for block in np.array_split(np.arange(len(left)), self.shares) if len(block)
        ]
        for turn in zip_longest(*blocks):
            yield from (batch for batch in turn if batch is not None)


class _Stream:
    """Examples at some positions of an epoch, from which micro-batches are cut."""

    def __init__(self, cut: EpochCut, positions: range | np.ndarray) -> None:
        self.cut, self.positions = cut, positions
        self._read = self._at = 0
        """Positions that were worked out, and the place in the buffer where the next micro-batch begins."""
        self._examples: list[int] = []
        self._sizes: list[Size] = []

    def full_batch(self) -> MicroBatch | None:
        """The next micro-batch, if enough is left to fill it."""
        while True:
            end = _end_of_batch(self._sizes, self._at, self.cut.rule)
            if end is not None:
                return self._take(end)
            if not self._more():
                return None

    def last_batch(self) -> MicroBatch | None:
        """What is left, where that fills no micro-batch."""
        return self._take(len(self._sizes)) if self._at < len(self._sizes) else None

    def _take(self, end: int) -> MicroBatch:
        part = slice(self._at, end)
        examples, sizes, self._at = self._examples[part], self._sizes[part], end
        tokens = sum(map(sum, sizes))
        if self.cut.rule.capacity is None:
            padded = len(sizes) * sum(max(side) for side in zip(*sizes, strict=True))
        else:
            packer = Packer(self.cut.rule.capacity)
            for example, size in zip(examples, sizes, strict=True):
                packer.add(example, size)
            padded = packer.padded
        return MicroBatch(tuple(examples), self.cut.epoch, tokens, padded)

    def _more(self) -> bool:
        """Work out more positions, at least as many as wait in the buffer."""
        count = max(READ_AHEAD, len(self._sizes) - self._at)
        positions = self.positions[self._read : self._read + count]
        if not len(positions):
            return False
        order = self.cut.order
        examples = order.stretch(positions) if isinstance(positions, range) else order.at(positions)
        sizes = self.cut.lengths[examples].reshape(len(examples), -1)
        self._examples = self._examples[self._at :] + examples.tolist()
        self._sizes = self._sizes[self._at :] + list(map(tuple, sizes.tolist()))
        self._read, self._at = self._read + len(positions), 0
        return True


def _end_of_batch(sizes: list[Size], start: int, rule: CutRule) -> int | None:
    """Where the micro-batch that begins at `start` is full; None where the sizes end before that is known."""
    if rule.capacity is not None:
        return _end_of_packed(sizes, start, rule, rule.capacity)
    if rule.sequences is not None:
        return start + rule.sequences if start + rule.sequences <= len(sizes) else None
    assert rule.tokens is not None
    widest = 0
    if sizes and len(sizes[0]) == 1:  # seven times as fast as what follows
        for number, (size,) in enumerate(islice(sizes, start, None), 1):
            widest = max(widest, size)
            if number * widest > rule.tokens and number > 1:
                return start + number - 1
        return None
    sides: Size = (0,) * len(sizes[0]) if sizes else ()
    for number, of_sides in enumerate(islice(sizes, start, None), 1):
        sides = tuple(map(max, sides, of_sides))
        if number * sum(sides) > rule.tokens and number > 1:
            return start + number - 1
    return None


def _end_of_packed(sizes: list[Size], start: int, rule: CutRule, capacity: Size) -> int | None:
    packer = Packer(capacity)
    for number, size in enumerate(islice(sizes, start, None)):
        sequences, padded = packer.with_one_more(size)
        if sequences > rule.sequences if rule.sequences is not None else number and padded > (rule.tokens or 0):
            return start + number
        packer.add(number, size)
    return None
