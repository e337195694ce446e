"""The order of an epoch, as a function of (seed, epoch, position): any part of it can be asked for, and no list of it is held.

Up to `lanes` shards are shuffled as one. A larger cache is read in lanes:

    the shards are shuffled and laid in a row; the row is cut into as many equal spans as there are lanes
    a lane walks along its span, shard after shard, and each shard's examples come in a random order of their own
    lanes take turns: position p of the epoch is example p // lanes of lane p % lanes

So `lanes` shards are read at a time, and every example of a batch lies in another one. Lanes come to a new shard at different
times. Neighbouring lanes walk in opposite directions and meet where their spans do: the shard that both have a part of is read
by both at the same time. Memory is 16 bytes a shard, and the orders of a few hundred shards.

Processes that share an epoch take lanes: whoever reads every n-th position, with n a divisor of `lanes`, touches no shard of the
others, except where two spans meet. The idea of fixed lanes that do not depend on the number of processes is that of
mosaicml-streaming (`num_canonical_nodes`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, overload

import numpy as np

BLOCK = 8
"""Shards that are shuffled, each by itself, from one stream of random numbers: a stream costs more than a shard's shuffle."""
LONG = 64
"""Positions of each lane from which on it is faster to go along lanes."""


class EpochOrder(ABC):
    """Example numbers in the order of one epoch. A slice, or `at`, works out a part of it as an array; nothing else is held."""

    lanes: int
    """Positions that are congruent modulo this are of one lane."""
    layout: str
    """How shards are read: `window`, as one shuffled whole, or `lanes`."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of examples."""

    @abstractmethod
    def at(self, positions: np.ndarray) -> np.ndarray:
        """`[n]` the examples at any positions `[n]`."""

    def stretch(self, positions: range) -> np.ndarray:
        """`[n]` the examples at evenly spaced positions, of which there may be many."""
        return self.at(np.arange(positions.start, positions.stop, positions.step))

    @overload
    def __getitem__(self, position: int) -> int: ...
    @overload
    def __getitem__(self, position: slice) -> np.ndarray: ...
    def __getitem__(self, position: int | slice) -> int | np.ndarray:
        """One example number, or an array of them."""
        places = range(len(self))[position]
        if isinstance(places, range):
            return self.stretch(places)
        return int(self.at(np.array([places]))[0])

    def __iter__(self) -> Iterator[int]:
        """The example numbers, a few thousand worked out at once."""
        for start in range(0, len(self), 4096):
            yield from self[start : start + 4096].tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole order, for caches that are small."""
        return self[:].astype(dtype or np.int64, copy=False)

    def tolist(self) -> list[int]:
        """The whole order as a list, for caches that are small."""
        return self[:].tolist()  # type: ignore[no-any-return]


class ListedOrder(EpochOrder):
    """An order that is held as an array: of few examples."""

    lanes = 1

    def __init__(self, examples: np.ndarray, layout: str = "window") -> None:
        self.examples, self.layout = examples, layout

    def __len__(self) -> int:
        return len(self.examples)

    def at(self, positions: np.ndarray) -> np.ndarray:
        """As `EpochOrder.at`."""
        numbers: np.ndarray = self.examples[positions]
        return numbers


class LaneOrder(EpochOrder):
    """The order of a cache of more shards than there are lanes."""

    layout = "lanes"

    def __init__(self, seed: int, epoch: int, firsts: np.ndarray, counts: np.ndarray, lanes: int) -> None:
        """`firsts`, `counts` `[S]` first example and number of examples of each shard."""
        self.lanes, self._key = lanes, np.array([seed, epoch], dtype=np.uint64)
        shuffled = np.random.Generator(np.random.Philox(key=self._key)).permutation(len(firsts))
        self._firsts = firsts[shuffled]
        """`[S]` first example of each shard of the row."""
        self._ends = np.cumsum(counts[shuffled])
        """`[S]` place in the row where each of its shards ends."""
        self._origins, self._steps = _spans(int(self._ends[-1]), lanes)
        self._shuffled = lru_cache(3 * lanes)(self._shuffled_block)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def at(self, positions: np.ndarray) -> np.ndarray:
        """As `EpochOrder.at`."""
        lane = positions % self.lanes
        places = self._origins[lane] + self._steps[lane] * (positions // self.lanes)
        blocks = np.searchsorted(self._ends, places, side="right") // BLOCK
        numbers = np.empty(len(places), dtype=np.int64)
        by_block = np.argsort(blocks, kind="stable")
        for members in np.split(by_block, np.flatnonzero(np.diff(blocks[by_block])) + 1):
            if len(members):
                examples, begin = self._shuffled(int(blocks[members[0]]))
                numbers[members] = examples[places[members] - begin]
        return numbers

    def stretch(self, positions: range) -> np.ndarray:
        """As `EpochOrder.stretch`; lane by lane, where many positions of each are asked for."""
        turn = self.lanes // positions.step if positions.step > 0 and self.lanes % positions.step == 0 else 0
        if not turn or len(positions) < LONG * turn:
            return super().stretch(positions)
        numbers = np.empty(len(positions), dtype=np.int64)
        for first in range(turn):
            of_lane = positions[first::turn]
            numbers[first::turn] = self._along(of_lane[0] % self.lanes, of_lane[0] // self.lanes, len(of_lane))
        return numbers

    def _along(self, lane: int, first: int, count: int) -> np.ndarray:
        """The examples `[first, first + count)` of a lane."""
        step = int(self._steps[lane])
        start = int(self._origins[lane]) + step * first
        low = start if step > 0 else start - count + 1
        blocks = np.searchsorted(self._ends, [low, low + count - 1], side="right") // BLOCK
        parts = []
        for block in range(int(blocks[0]), int(blocks[1]) + 1):
            examples, begin = self._shuffled(block)
            parts.append(examples[max(low - begin, 0) : low + count - begin])
        return np.concatenate(parts)[::step]

    def _shuffled_block(self, block: int) -> tuple[np.ndarray, int]:
        """The examples of a block of shards of the row, shard after shard in their order, and where in the row it begins."""
        begin = int(self._ends[block * BLOCK - 1]) if block else 0
        shards = slice(block * BLOCK, (block + 1) * BLOCK)
        counts = np.diff(self._ends[shards], prepend=begin)
        number = np.repeat(np.arange(len(counts)), counts)
        # a stream of random numbers for every block: the highest word of the counter is 0 where shards are shuffled
        rng = np.random.Generator(np.random.Philox(key=self._key, counter=(block + 1) << 192))
        keys = number + rng.random(len(number))
        places = np.argsort(keys)  # by shard, then at random
        ordered = keys[places]
        if (ordered[1:] == ordered[:-1]).any():  # a stable sort takes half as long again, and decides only here
            places = np.argsort(keys, kind="stable")
        firsts = self._firsts[shards] - (np.cumsum(counts) - counts)
        return places + firsts[number], begin

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the memory of shuffled blocks, which holds a lock."""
        return {name: value for name, value in vars(self).items() if name != "_shuffled"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._shuffled = lru_cache(3 * self.lanes)(self._shuffled_block)


def _spans(size: int, lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """`[lanes]` place in the row at which each lane begins, and 1 or -1: whether it walks forwards or backwards.

    Lanes that any number of processes would give to one of them lie side by side, as far as that goes.
    """
    divisors = [n for n in range(1, lanes + 1) if lanes % n == 0]
    in_a_row = sorted(range(lanes), key=lambda lane: [lane % n for n in divisors])
    sizes = np.array([size // lanes + (lane < size % lanes) for lane in in_a_row])
    ends = np.cumsum(sizes)
    forwards = np.arange(lanes) % 2 == 0
    origins, steps = np.empty(lanes, dtype=np.int64), np.empty(lanes, dtype=np.int64)
    origins[in_a_row] = np.where(forwards, ends - sizes, ends - 1)
    steps[in_a_row] = np.where(forwards, 1, -1)
    return origins, steps


def epoch_order(seed: int, epoch: int, firsts: np.ndarray, counts: np.ndarray, lanes: int) -> EpochOrder:
    """The order of an epoch over shards, of which `[S]` the first example and the number of examples are given."""
    if len(firsts) > lanes:
        return LaneOrder(seed, epoch, firsts, counts, lanes)
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    shards = rng.permutation(len(firsts))
    ranges = [np.arange(firsts[s], firsts[s] + counts[s]) for s in shards]
    return ListedOrder(rng.permutation(np.concatenate(ranges)))
