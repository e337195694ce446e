"""`ShardTable`: which examples and how many rows each shard of a cache holds, as two columns of numbers.

    table = cut_into_shards([rows_of_examples], shard_rows=32768)
    first, stop, rows = table[17]           # examples [first, stop) of shard 17, and its rows
    table.shard_of(numbers)                 # the shards that hold these examples

Shards hold whole examples, one shard after another, so the counts of each shard say all. A table of 300,000 shards has 5 MB; as
tuples of Python it had 60 MB and took seconds to make.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np

from kd.common.errors import CacheError

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


def cut_into_shards(rows: Iterable[np.ndarray], shard_rows: int) -> ShardTable:
    """Consecutive whole examples, as many to a shard as fit.

    rows         the rows of every example, one array after another: no more than one is held at once
    shard_rows   most rows of a shard

    Raises CacheError for an example that has more rows than a shard holds, or none, and where there is no example.
    """
    examples, counts = list[int](), list[int]()
    here = filled = before = 0
    for batch in rows:
        _refuse_unfit(batch, shard_rows, before)
        ends = np.cumsum(batch, dtype=np.int64)
        position = base = 0
        while position < len(batch):
            stop = int(np.searchsorted(ends, base + shard_rows - filled, side="right"))
            here, filled = here + stop - position, filled + (int(ends[stop - 1]) - base if stop > position else 0)
            if stop < len(batch):  # the next example does not fit any more
                examples.append(here)
                counts.append(filled)
                here = filled = 0
            position, base = stop, int(ends[stop - 1]) if stop else 0
        before += len(batch)
    if not before:
        raise CacheError("a cache without examples")
    return ShardTable(np.array([*examples, here]), np.array([*counts, filled]))


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
