"""Ids that occur twice are noticed, wherever the two are."""

from __future__ import annotations

import random

import pytest

from kd.data.rows.seen_ids import SeenIds


@pytest.mark.parametrize("number", [0, 1, 7, 8, 63, 200])
@pytest.mark.parametrize("earlier", [0, 5, 150])
def test_the_id_that_occurs_twice_is_named(number: int, earlier: int):
    seen, names = SeenIds(recent=8), [f"a:{n}" for n in range(201)]
    names.insert(number, f"a:{earlier}")
    found = [*map(seen.add, names), seen.repeated()]
    assert next(filter(None, found)) == f"a:{earlier}"


def test_ids_that_differ_are_all_accepted():
    seen, names = SeenIds(recent=8), [f"{n}" for n in range(1000)]
    random.Random(0).shuffle(names)
    assert [seen.add(name) for name in names] == [None] * 1000
    assert seen.repeated() is None
    assert SeenIds().repeated() is None
