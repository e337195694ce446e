"""The order of an epoch over several caches, each with its share, as a function of (seed, epoch, position).

Of a small mixture the cache of every example is drawn with the weights, and the order is held as an array. In a larger one each
lane is drawn by itself, `BLOCK` positions at a time: how many of them each cache has follows from the weights alone, exactly, and
which ones they are is random. So the place in each cache's own epochs is known at any position without counting from the start. A
lane of the mixture reads the lane of the same number of each cache, epoch after epoch: in a lane, no example of a cache comes twice
before all came once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from kd.cache_builder.store.readers.epoch_order import EpochOrder, ListedOrder

LISTED = 2**16
"""Examples of a mixture whose order is held as an array, at most."""
BLOCK = 4096
"""Positions of a lane that are drawn at once."""

OrderOf = Callable[[int, int], EpochOrder]
"""Number of a cache, epoch of it -> its order."""


def mixed_order(seed: int, epoch: int, weights: np.ndarray, firsts: np.ndarray, order_of: OrderOf) -> EpochOrder:
    """The order of an epoch of a mixture, as long as all its caches together.

    weights   `[parts]` share of each cache
    firsts    `[parts + 1]` number of the first example of each cache, and one past the last
    """
    size = int(firsts[-1])
    if size <= LISTED:
        layouts = {order_of(part, 0).layout for part in range(len(weights))}
        return ListedOrder(_drawn_order(seed, epoch, weights, firsts, order_of), min(layouts))
    lanes = min(order_of(part, 0).lanes for part in range(len(weights)))
    return MixedOrder(seed, epoch, weights, firsts, order_of, lanes)


class MixedOrder(EpochOrder):
    """The order of an epoch of a large mixture."""

    layout = "lanes"

    def __init__(
        self, seed: int, epoch: int, weights: np.ndarray, firsts: np.ndarray, order_of: OrderOf, lanes: int
    ) -> None:
        self.lanes = lanes
        self._seed, self._epoch, self._weights, self._firsts = seed, epoch, weights, firsts
        self._order_of = lru_cache(2 * len(weights))(order_of)
        self._sizes = [len(self._order_of(part, 0)) for part in range(len(weights))]
        self._drawn = lru_cache(3 * lanes)(self._drawn_block)

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def at(self, positions: np.ndarray) -> np.ndarray:
        """As `EpochOrder.at`."""
        lane, index = positions % self.lanes, positions // self.lanes
        parts, places = np.empty(len(positions), dtype=np.int64), np.empty(len(positions), dtype=np.int64)
        for members in _groups(lane * (len(self) // BLOCK + 1) + index // BLOCK):
            of_lane = int(lane[members[0]])
            drawn, taken = self._drawn(of_lane, int(index[members[0]]) // BLOCK)
            within = index[members] % BLOCK
            parts[members], places[members] = drawn[within], taken[within]
        numbers = np.empty(len(positions), dtype=np.int64)
        lengths = self._lane_lengths(parts, lane)
        for members in _groups(parts + len(self._sizes) * (places // lengths)):
            part, epoch = int(parts[members[0]]), int(places[members[0]] // lengths[members[0]])
            in_part = (places[members] % lengths[members]) * self.lanes + lane[members]
            numbers[members] = self._order_of(part, epoch).at(in_part) + self._firsts[part]
        return numbers

    def _lane_lengths(self, parts: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """`[n]` examples that these caches have in these lanes."""
        sizes = np.array(self._sizes)[parts]
        return sizes // self.lanes + (lane < sizes % self.lanes)  # type: ignore[no-any-return]

    def _drawn_block(self, lane: int, block: int) -> tuple[np.ndarray, np.ndarray]:
        """`[BLOCK]` cache of each position of a block of a lane, and how many of its examples came in the lane before."""
        length = len(self) // self.lanes + (lane < len(self) % self.lanes)
        start, stop = (self._epoch * length + min(n * BLOCK, length) for n in (block, block + 1))
        before, after = (shares_of_first(n, self._weights) for n in (start, stop))
        key = np.array([self._seed, self._epoch + 2**32], dtype=np.uint64)
        rng = np.random.Generator(np.random.Philox(key=key, counter=(lane + 1 << 192) + (block + 1 << 128)))
        parts = rng.permutation(np.repeat(np.arange(len(before)), np.subtract(after, before)))
        taken = np.empty(len(parts), dtype=np.int64)
        for part, count in enumerate(before):
            mine = parts == part
            taken[mine] = count + np.arange(int(mine.sum()))
        return parts, taken

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("the order of a mixture is asked of its reader, not sent to another process")


def shares_of_first(count: int, weights: Sequence[float] | np.ndarray) -> list[int]:
    """How many of the first `count` positions each cache has: sums to `count`, and never falls as `count` grows."""
    shares, left, weight = [], count, float(np.sum(weights))
    for weight_of_part in weights[:-1]:
        shares.append(int(left * (float(weight_of_part) / weight)))
        left, weight = left - shares[-1], weight - float(weight_of_part)
    return [*shares, left]


def _groups(keys: np.ndarray) -> list[np.ndarray]:
    """Indices of equal keys."""
    by_key = np.argsort(keys, kind="stable")
    return [g for g in np.split(by_key, np.flatnonzero(np.diff(keys[by_key])) + 1) if len(g)]


def _drawn_order(seed: int, epoch: int, weights: np.ndarray, firsts: np.ndarray, order_of: OrderOf) -> np.ndarray:
    """`[E]` the order of an epoch of a small mixture."""
    parts = len(weights)

    def drawn(of_epoch: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=[seed, of_epoch + 2**32]))
        return rng.choice(parts, size=int(firsts[-1]), p=weights / weights.sum())

    taken = sum((np.bincount(drawn(e), minlength=parts) for e in range(epoch)), np.zeros(parts, dtype=np.int64))
    mine = drawn(epoch)
    order = np.empty(len(mine), dtype=np.int64)
    for part in range(parts):
        places = np.flatnonzero(mine == part)
        size, start = int(firsts[part + 1] - firsts[part]), int(taken[part])
        orders = [order_of(part, e)[:] for e in range(start // size, -(-(start + len(places)) // size))]
        stream = np.concatenate([*orders, np.empty(0, dtype=np.int64)])
        first = start % size
        order[places] = stream[first : first + len(places)] + firsts[part]
    return order
