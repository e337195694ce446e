"""Ids as places in lists of followers: nothing is lost, the lists are those of a slow twin, and a reader is not led astray."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.cache_builder.store.followers import LISTED, WORTH, follower_pairs, from_places, keys_of, per_entry, to_places


def rows_of(
    seed: int, rows: int, size: int, ragged: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """`(gold codes, codes, keys of entries, kept)` of rows in which low codes are frequent."""
    rng = np.random.default_rng(seed)
    kept = rng.integers(1, 5, rows) if ragged else None
    gold = np.minimum(rng.geometric(0.3, rows), size) - 1
    shape = (rows, 4) if kept is None else int(kept.sum())
    codes = np.minimum(rng.geometric(0.1, shape), size) - 1
    return gold, codes, per_entry(keys_of(gold), codes, kept), kept


@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(1, 400), st.booleans())
@settings(max_examples=60, deadline=None)
def test_places_lead_back_to_the_ids(seed: int, rows: int, size: int, ragged: bool):
    gold, codes, keys, kept = rows_of(seed, rows, size, ragged)
    ids = np.random.default_rng(seed).permutation(size).astype(np.uint16)
    pairs = follower_pairs(keys, codes, rows)
    places = to_places(keys, codes, pairs)
    assert pairs.shape == (rows, 2)
    assert ((places < LISTED) | (places == codes + LISTED)).all()
    returned = from_places(places.astype(np.uint16), keys_of(gold), pairs.astype(np.uint16), ids, kept)
    np.testing.assert_array_equal(returned, ids[codes])


def slow_lists(keys: np.ndarray, codes: np.ndarray, rows: int) -> dict[int, list[int]]:
    counts = Counter(zip(keys.tolist(), codes.tolist(), strict=True))
    often = sorted((p for p in counts if counts[p] >= WORTH), key=lambda p: (-counts[p], p))[:rows]
    return {key: [code for k, code in often if k == key][:LISTED] for key in sorted({key for key, _ in often})}


@pytest.mark.parametrize("rows", [1, 30, 2000])
def test_lists_are_those_of_the_slow_twin(rows: int):
    _, codes, keys, _ = rows_of(3, 2000, 900, ragged=True)
    lists = slow_lists(keys, codes, rows)
    pairs = follower_pairs(keys, codes, rows)
    expected = [(key, code) for key, followers in lists.items() for code in followers]
    assert [tuple(pair) for pair in pairs[: len(expected)].tolist()] == expected
    assert not pairs[len(expected) :].any()
    slow = [lists[k].index(c) if c in lists.get(k, ()) else c + LISTED for k, c in zip(keys, codes, strict=True)]
    assert to_places(keys, codes, pairs).tolist() == slow


def test_a_list_ends_where_a_place_would_need_a_second_byte():
    codes = np.repeat(np.arange(LISTED + 10), WORTH)
    keys = np.zeros_like(codes)
    places = to_places(keys, codes, follower_pairs(keys, codes, 5000))
    assert places.tolist() == [c if c < LISTED else c + LISTED for c in codes.tolist()]


def test_a_value_beyond_every_table_is_refused():
    pairs, ids = np.zeros((3, 2), dtype=np.uint16), np.arange(5, dtype=np.uint16)
    with pytest.raises(IndexError):
        from_places(np.array([[LISTED + 5]], dtype=np.uint16), np.array([0]), pairs, ids)
    with pytest.raises(IndexError):
        from_places(np.array([[2**32 - 1]], dtype=np.uint32), np.array([0]), pairs, ids)
    with pytest.raises(IndexError):
        from_places(np.array([[0]], dtype=np.uint16), np.array([0]), pairs + 5, ids)
