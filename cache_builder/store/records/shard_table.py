"""`ShardTable`: which examples and how many rows each shard of a cache holds, as two columns of numbers.

    table = cut_into_shards([(tokens, rows)], shard_rows=32768)
    first, stop, rows = table[17]           # examples [first, stop) of shard 17, and its rows
    table.shard_of(numbers)                 # the shards that hold these examples

Shards hold whole examples, one shard after another, so the counts of each shard say all. A table of 300,000 shards has 5 MB; as
tuples of Python it had 60 MB and took seconds to make.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from kd.common.errors import CacheError

MAX_SHARD_TOKENS = 2**25
"""Tokens at which a shard ends although it could hold more rows. Prompts of 1,000 tokens for every row reach it."""
AT_ONCE = 4096
"""Shards that become Python numbers at once, when a table is iterated."""


class ShardTable(Sequence[tuple[int, int, int]]):
    """Per shard: the first example, one past the last, and the rows. It cannot be changed.

    `table[i]`, `len(table)` and iteration give Python numbers, as a list of tuples does; a slice is such a list. Everything
    that touches many shards should take the columns.
    """

    def __init__(self, examples: np.ndarray, rows: np.ndarray) -> None:
        """The table of shards that hold `examples [S]` examples and `rows [S]` rows each."""
        if examples.shape != rows.shape or examples.ndim != 1:
            raise ValueError(f"columns of {examples.shape} and {rows.shape}")
        self.bounds = np.concatenate([[0], np.cumsum(examples, dtype=np.int64)])
        """`[S + 1]` int64: the first example of each shard, and at last the number of examples in all."""
        self.rows = rows.astype(np.int64)
        """`[S]` int64: rows of each shard."""
        self.bounds.flags.writeable = self.rows.flags.writeable = False

    @classmethod
    def from_triples(cls, triples: Iterable[tuple[int, int, int]]) -> ShardTable:
        """The table that has these triples as its entries. Raises CacheError where they do not follow one another."""
        columns = np.array(list(triples), dtype=np.int64).reshape(-1, 3)
        table = cls(columns[:, 1] - columns[:, 0], columns[:, 2])
        wrong = np.flatnonzero(columns[:, 0] != table.starts)
        if len(wrong):
            first, stop, rows = columns[wrong[0]].tolist()
            raise CacheError("shard table is not contiguous", found=f"examples {first}:{stop}, {rows} rows")
        return table

    @classmethod
    def none(cls) -> ShardTable:
        """A table without shards."""
        return cls(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))

    @classmethod
    def joined(cls, tables: Sequence[ShardTable]) -> ShardTable:
        """The shards of several tables, one table after another; examples are numbered anew."""
        return cls(np.concatenate([t.examples for t in tables]), np.concatenate([t.rows for t in tables]))

    @property
    def starts(self) -> np.ndarray:
        """`[S]` first example of each shard: a view."""
        return self.bounds[:-1]

    @property
    def examples(self) -> np.ndarray:
        """`[S]` number of examples in each shard."""
        return np.diff(self.bounds)

    @property
    def example_count(self) -> int:
        """Examples in all shards."""
        return int(self.bounds[-1])

    @property
    def row_count(self) -> int:
        """Rows in all shards."""
        return int(self.rows.sum())

    def shard_of(self, examples: np.ndarray | Sequence[int] | int) -> np.ndarray:
        """The shard that holds each of `examples`, which lie within `0:example_count`."""
        return np.searchsorted(self.starts, examples, side="right") - 1

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> tuple[int, int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, int, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, int, int] | list[tuple[int, int, int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"shard {index} of {len(self)}")
        index %= len(self)
        return int(self.bounds[index]), int(self.bounds[index + 1]), int(self.rows[index])

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for i in range(0, len(self), AT_ONCE):
            part = slice(i, i + AT_ONCE)
            yield from zip(
                self.starts[part].tolist(), self.bounds[1:][part].tolist(), self.rows[part].tolist(), strict=True
            )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ShardTable):
            return NotImplemented
        return np.array_equal(self.bounds, other.bounds) and np.array_equal(self.rows, other.rows)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"ShardTable({len(self)} shards, {self.example_count} examples, {self.row_count} rows)"


def cut_into_shards(
    lengths: Iterable[tuple[np.ndarray, np.ndarray]], shard_rows: int, shard_tokens: int = MAX_SHARD_TOKENS
) -> ShardTable:
    """Consecutive whole examples, as many to a shard as fit.

    lengths        tokens and rows of every example, in batches of any size: no more than one is held at once
    shard_rows     most rows of a shard
    shard_tokens   most tokens of a shard, those of one example aside: its table of examples is read at once

    Raises CacheError for an example that has more rows than a shard holds, or none, and where there is no example.
    """
    sizes, here, before = list[tuple[int, int]](), _Filling(), 0
    for tokens, rows in lengths:
        _refuse_unfit(rows, shard_rows, before)
        ends_of_rows, ends_of_tokens = (np.concatenate([[0], np.cumsum(n, dtype=np.int64)]) for n in (rows, tokens))
        position = 0
        while position < len(rows):
            by_rows = np.searchsorted(ends_of_rows, ends_of_rows[position] + shard_rows - here.rows, side="right") - 1
            by_tokens = (
                np.searchsorted(ends_of_tokens, ends_of_tokens[position] + shard_tokens - here.tokens, side="right") - 1
            )
            stop = int(min(by_rows, max(by_tokens, position + (not here.examples))))
            here.examples += stop - position
            here.rows += int(ends_of_rows[stop] - ends_of_rows[position])
            here.tokens += int(ends_of_tokens[stop] - ends_of_tokens[position])
            if stop < len(rows):  # the next example does not fit any more
                sizes.append((here.examples, here.rows))
                here = _Filling()
            position = stop
        before += len(rows)
    if not before:
        raise CacheError("a cache without examples")
    columns = np.array([*sizes, (here.examples, here.rows)], dtype=np.int64)
    return ShardTable(columns[:, 0], columns[:, 1])


@dataclass
class _Filling:
    """What the shard that is being filled holds so far."""

    examples: int = 0
    rows: int = 0
    tokens: int = 0


def _refuse_unfit(rows: np.ndarray, shard_rows: int, before: int) -> None:
    unfit = np.flatnonzero((rows > shard_rows) | (rows < 1))
    if len(unfit):
        raise CacheError(
            "an example does not fit into a shard",
            where=f"example {before + int(unfit[0])} of the cache",
            found=f"{int(rows[unfit[0]])} rows",
            expected=f"1..{shard_rows}",
            try_="a larger --shard-rows",
        )
