"""A table of shards is a list of triples that takes no room, and cutting examples into shards agrees with a loop over them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.cache_builder.store.records.shard_table import ShardTable, cut_into_shards
from kd.common.errors import CacheError

SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=60)


def cut_by_hand(rows: list[int], shard_rows: int) -> list[tuple[int, int, int]]:
    """Slow twin of `cut_into_shards`."""
    shards, first, count = [], 0, 0
    for number, n in enumerate(rows):
        if count + n > shard_rows:
            shards.append((first, number, count))
            first, count = number, 0
        count += n
    return [*shards, (first, len(rows), count)]


def both(*rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of examples with one token of context each."""
    return np.array(rows) + 1, np.array(rows)


@given(SIZES, st.integers(9, 20), st.data())
def test_cutting_agrees_with_a_loop_however_the_examples_arrive(rows, shard_rows, data):
    borders = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    batches = np.split(np.array(rows), borders)
    assert list(cut_into_shards([(n + 1, n) for n in batches], shard_rows)) == cut_by_hand(rows, shard_rows)


@given(SIZES, st.integers(1, 40), st.data())
def test_a_shard_ends_where_its_tokens_are_too_many(tokens, most, data):
    borders = sorted(data.draw(st.lists(st.integers(0, len(tokens)), max_size=4)))
    batches = [(n, np.ones_like(n)) for n in np.split(np.array(tokens), borders)]
    table = cut_into_shards(batches, 10**6, most)
    for first, stop, _ in table:
        assert stop - first == 1 or sum(tokens[first:stop]) <= most
        assert stop == len(tokens) or sum(tokens[first : stop + 1]) > most


@given(SIZES)
def test_a_table_is_the_list_of_its_triples(rows):
    triples = cut_by_hand(rows, 12)
    table = ShardTable.from_triples(triples)
    assert list(table) == triples == table[:] == [table[i] for i in range(len(table))]
    assert (table[-1], table[1:3]) == (triples[-1], triples[1:3])
    assert (table.example_count, table.row_count) == (len(rows), sum(rows))
    owner = [number for number, (first, stop, _) in enumerate(triples) for _ in range(first, stop)]
    assert table.shard_of(np.arange(len(rows))).tolist() == owner
    assert table == ShardTable(table.examples, table.rows)
    assert list(ShardTable.joined([table, table]))[len(table) :] == [
        (a + len(rows), b + len(rows), n) for a, b, n in triples
    ]


def test_a_table_refuses_what_no_cache_has():
    with pytest.raises(CacheError, match="not contiguous"):
        ShardTable.from_triples([(0, 2, 5), (3, 4, 1)])
    with pytest.raises(IndexError):
        ShardTable.from_triples([(0, 2, 5)])[1]
    with pytest.raises(CacheError) as error:
        cut_into_shards([both(3, 4), both(13, 1)], 12)
    assert "example 2" in str(error.value)
    assert "13 rows" in str(error.value)
    with pytest.raises(CacheError, match="fit"):
        cut_into_shards([both(3, 0)], 12)
    with pytest.raises(CacheError, match="without examples"):
        cut_into_shards([], 12)


def test_a_large_table_is_two_columns():
    table = cut_into_shards([both(*[255] * 1_000_000)], 32768)
    assert len(table) == 7813
    assert table.bounds.nbytes + table.rows.nbytes < 17 * len(table)
    with pytest.raises(ValueError, match="read-only"):
        table.rows[0] = 1
