"""Where an epoch's micro-batches begin, found many at a time: the number of steps is needed before the first one.

`EpochCut` finds any micro-batch by walking along the lengths from the last mark, about a microsecond an example. This module finds
the marks of a whole epoch that is cut by tokens in a tenth of that. Threads work out pieces of the order with numpy: the lengths,
and how many examples the micro-batch would have that begins at each place. What is left to do one by one is to go from one
micro-batch to the next, 10 ns an example. The marks are those that walking leaves: the tests compare the two.

At least `least` examples fit any batch: as many as if all were as long as the longest. So only a few more are tried at every place,
by the maximum of as many lengths in a row; a batch of more than CANDIDATES further examples is measured by itself.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kd.cache_builder.store.readers.epoch_order import EpochOrder

PIECE = 2**18
"""Positions that are worked out at once, of all shares together."""
SHORTEST = 2**14
"""Positions of a share that are worked out at once, at least."""
CANDIDATES = 48
"""Numbers of examples that are tried at every place."""
LOOKAHEAD = 512
"""Examples that are looked at first where a batch is measured by itself."""
THREADS = 8
"""Most threads."""


class SizeTable(Protocol):
    """Tokens of examples."""

    def __getitem__(self, examples: np.ndarray, /) -> np.ndarray:
        """`[n]` or `[n, sides]` tokens of the examples `[n]`."""


def marks_of_shares(
    order: EpochOrder, lengths: Any, tokens: int, *, taken: tuple[int, ...], size: int, every: int
) -> Iterator[tuple[int, ...]]:
    """Examples of each share before every `every`-th micro-batch of at most `tokens` tokens, as long as all shares have one.

    taken   examples of each share before the first of these micro-batches
    size    number of positions of the epoch
    """
    shares = len(taken)
    threads = max(min(len(os.sched_getaffinity(0)), THREADS, -(-size // PIECE)), 1)
    held: AbstractContextManager[SizeTable] = (
        lengths.held(threads) if hasattr(lengths, "held") else nullcontext(lengths)
    )
    with held as table, ThreadPoolExecutor(threads, "kd-lengths") as pool:
        ahead = -(-threads // shares)
        of_shares = [
            _every(_pieces(pool, order, table, tokens, range(s + n * shares, size, shares), ahead), tokens, n, every)
            for s, n in enumerate(taken)
        ]
        yield from zip(*of_shares, strict=False)


@dataclass(frozen=True)
class OrderPiece:
    """Some examples of a share, one after another."""

    sizes: np.ndarray
    """`[n, sides]` their tokens, int32."""
    counts: np.ndarray
    """`[n]` number of examples of the micro-batch that would begin here; 0 where this piece does not tell."""


def _pieces(
    pool: ThreadPoolExecutor, order: EpochOrder, table: SizeTable, tokens: int, positions: range, ahead: int
) -> Iterator[OrderPiece]:
    """The pieces of a share, `ahead` of them under way on threads."""
    length = max(PIECE // positions.step, SHORTEST)

    def piece(part: range) -> OrderPiece:
        sizes = np.asarray(table[order.stretch(part)]).reshape(len(part), -1).astype(np.int32)
        return OrderPiece(sizes, full_counts(sizes, tokens))

    coming = deque[Future[OrderPiece]]()
    for start in range(0, len(positions), length):
        coming.append(pool.submit(piece, positions[start : start + length]))
        if len(coming) > ahead:
            yield coming.popleft().result()
    while coming:
        yield coming.popleft().result()


def full_counts(sizes: np.ndarray, tokens: int) -> np.ndarray:
    """`[n]` number of examples of the micro-batch that would begin at each of the examples with these sizes `[n, sides]`.

    It is the largest number whose tokens with padding are at most `tokens`, or 1. 0 where one more example than are here is needed
    to know it, or where it exceeds the least possible number by CANDIDATES.
    """
    least = max(tokens // max(int(sizes.max(axis=0).sum()), 1), 1)
    length, counts, number = len(sizes), np.zeros(len(sizes), dtype=np.int32), least
    if least >= length:
        return counts
    widest = [_widest(np.ascontiguousarray(side), least) for side in sizes.T]
    counts[: length - least + 1] = least
    while number < min(least + CANDIDATES, length):
        number += 1
        many = length - number + 1  # places at which so many examples begin
        sides = zip(widest, sizes.T, strict=True)
        widest = [np.maximum(before[:many], side[number - 1 :]) for before, side in sides]
        fits = sum(widest[1:], widest[0]) <= tokens // number
        if not fits.any():
            break
        counts[:many] += fits
    tried = np.minimum(number, np.arange(length, 0, -1))
    counts[counts >= tried] = 0
    return counts


def _every(pieces: Iterator[OrderPiece], tokens: int, taken: int, every: int) -> Iterator[int]:
    """Number of examples of a share before every `every`-th of its full micro-batches."""
    rest, left = None, every
    for piece in pieces:
        sizes, counts = piece.sizes, piece.counts
        if rest is not None:  # a micro-batch that began before this piece
            sizes = np.concatenate([rest, sizes])
            counts = np.concatenate([np.zeros(len(rest), dtype=np.int32), counts])
        at, view = 0, counts.data
        while count := view[at] or first_full_count(sizes[at:], tokens):
            at += count
            left -= 1
            if not left:
                yield taken + at
                left = every
        rest, taken = sizes[at:], taken + at


def first_full_count(sizes: np.ndarray, tokens: int) -> int:
    """As `full_counts`, of the first micro-batch alone, however long it is."""
    look = LOOKAHEAD
    while True:
        widest = np.maximum.accumulate(sizes[:look], axis=0).sum(axis=1, dtype=np.int64)
        over = widest * np.arange(1, len(widest) + 1) > tokens
        over[:1] = False
        if over.any():
            return int(over.argmax())
        if look >= len(sizes):
            return 0
        look *= 4


def _widest(side: np.ndarray, count: int) -> np.ndarray:
    """The maximum of every `count` values in a row."""
    done = 1
    while done < count:
        step = min(done, count - done)
        side = np.maximum(side[:-step], side[step:])
        done += step
    return side
