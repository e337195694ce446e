"""Rows of different lengths: entries of one row after another in flat arrays, and how many each row has.

In memory, the arrays named in `ENTRY_ARRAYS` hold the E entries of N rows, and `kept [N]` says how many belong to each row. In
a file, an array has room for `columns` entries per row: a chunk of R rows is a chunk of R * columns entries, which holds the
entries of its rows one after another and then zeros. So a reader finds a chunk without an index, and zeros weigh nothing.
"""

from __future__ import annotations

from collections.abc import Container

import numpy as np

KEPT = "kept"
"""Name of the array with the number of entries of each row."""
TAIL_DRAWS = "tail_draws"
"""Name of the array with the number of draws from each row's tail, which are entries in the file and `[N, D]` in memory."""
ENTRY_ARRAYS = ("token_ids", "logprobs")
"""Arrays of entries, where a cache has `kept`; all others have one value or one row of values for each row."""


def offsets_of(kept: np.ndarray) -> np.ndarray:
    """`[N + 1]` int64: where the entries of each row begin, and how many there are in all."""
    offsets = np.zeros(len(kept) + 1, dtype=np.int64)
    np.cumsum(kept, out=offsets[1:])
    return offsets


def entry_sums(values: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """`[E] -> [N]` sums of the entries of each row; every row has at least one entry."""
    return np.add.reduceat(values, offsets_of(kept)[:-1]) if len(kept) else values[:0]


def columns_of_entries(kept: np.ndarray) -> np.ndarray:
    """`[E]` int64: the place of each entry in its row, from 0."""
    offsets = offsets_of(kept)
    return np.asarray(np.arange(offsets[-1]) - np.repeat(offsets[:-1], kept))


def is_flat(arrays: Container[str], name: str) -> bool:
    """Whether this one of some arrays holds entries one after another."""
    return KEPT in arrays and name in ENTRY_ARRAYS


def spread(values: np.ndarray, kept: np.ndarray, chunk_rows: int, columns: int) -> np.ndarray:
    """Flat entries `[E]` as a file holds them: `[chunks * chunk_rows * columns]`, each chunk with zeros behind its entries."""
    offsets = offsets_of(kept)
    chunks = -(-len(kept) // chunk_rows)
    filled = np.zeros((chunks, chunk_rows * columns), dtype=values.dtype)
    for chunk, first in enumerate(range(0, len(kept), chunk_rows)):
        entries = values[offsets[first] : offsets[min(first + chunk_rows, len(kept))]]
        filled[chunk, : len(entries)] = entries
    return filled.reshape(-1)


def row_totals(steps: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """`[E]` the sum of each entry and those before it in its row, in the dtype of `steps`, which wraps around."""
    if not len(steps):
        return steps
    totals = np.cumsum(steps, dtype=steps.dtype)
    starts = offsets_of(kept)[:-1]
    before = totals[starts - 1]
    before[starts == 0] = 0
    return np.asarray(totals - np.repeat(before, kept))


def row_steps(totals: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The inverse of `row_totals`."""
    steps = totals.copy()
    steps[1:] -= totals[:-1]
    starts = offsets_of(kept)[:-1][kept > 0]
    steps[starts] = totals[starts]
    return steps


def sorted_entries(table: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`[E]` the first `counts` values of each row of `table [N, D]`, ascending, one row after another."""
    inside = np.arange(table.shape[1]) < counts[:, None]
    return np.asarray(np.sort(np.where(inside, table, np.iinfo(table.dtype).max), axis=1)[inside])


def as_table(entries: np.ndarray, counts: np.ndarray, columns: int) -> np.ndarray:
    """`[N, columns]`: entries `[E]` of rows, of which row i has `counts[i]`, and zeros behind."""
    table = np.zeros((len(counts), columns), dtype=entries.dtype)
    table[np.arange(columns) < counts[:, None]] = entries
    return table
