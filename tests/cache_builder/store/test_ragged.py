"""Rows of different lengths in flat arrays: what is packed comes back, and sums are those of a loop over the rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kd.cache_builder.store.ragged import (
    columns_of_entries,
    entry_sums,
    offsets_of,
    row_steps,
    row_totals,
    spread,
)

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=40).map(lambda sizes: np.array(sizes, dtype=np.uint8))


def rows_of(values: np.ndarray, kept: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(kept.astype(np.int64))[:-1])


@given(lengths, st.integers(0, 2**32))
def test_sums_and_places_are_those_of_the_rows(kept: np.ndarray, seed: int):
    values = np.random.default_rng(seed).normal(size=int(kept.sum(dtype=np.int64)))
    rows = rows_of(values, kept)
    assert offsets_of(kept).tolist() == [0, *np.cumsum(kept.astype(np.int64)).tolist()]
    assert columns_of_entries(kept).tolist() == [i for row in rows for i in range(len(row))]
    np.testing.assert_allclose(
        entry_sums(values, kept), [row.sum() for row in rows], rtol=0, atol=1e-13
    )  # nine numbers


@given(lengths, st.integers(0, 2**32), st.sampled_from(["uint8", "uint16", "uint32"]))
def test_steps_and_totals_are_each_others_inverse_even_where_they_wrap_around(kept: np.ndarray, seed: int, dtype: str):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, np.iinfo(dtype).max, int(kept.sum(dtype=np.int64)), dtype=dtype, endpoint=True)
    totals = row_totals(values, kept)
    assert totals.dtype == values.dtype
    expected = np.concatenate([np.cumsum(row, dtype=dtype) for row in rows_of(values, kept)])
    assert np.array_equal(totals, expected)
    assert np.array_equal(row_steps(totals, kept), values)


@given(lengths, st.integers(1, 8))
def test_a_file_gives_back_the_entries_of_every_chunk(kept: np.ndarray, chunk_rows: int):
    values = np.arange(1, kept.sum(dtype=np.int64) + 1)
    filled = spread(values, kept, chunk_rows, 9)
    chunks = -(-len(kept) // chunk_rows)
    assert filled.shape == (chunks * chunk_rows * 9,)
    offsets = offsets_of(kept)
    for chunk, part in enumerate(filled.reshape(chunks, -1)):
        first, stop = offsets[chunk * chunk_rows], offsets[min((chunk + 1) * chunk_rows, len(kept))]
        assert np.array_equal(part[: stop - first], values[first:stop])
    assert np.count_nonzero(filled) == len(values)  # zeros behind the entries of each chunk, and nowhere else
