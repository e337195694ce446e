"""A row per item of its lists, and seeded orders, lose no row and keep the row's number."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.data.instruction_tasks.row_reading.row_order import one_row_per_item, seeded_order
from kd.data.rows.tables import rows_in


@given(st.integers(0, 200), st.integers(-5, 5))
def test_a_seeded_order_holds_every_number_once(rows: int, seed: int) -> None:
    assert sorted(seeded_order(rows, seed)) == list(range(rows))
    assert seeded_order(rows, seed) == seeded_order(rows, seed)


@given(st.integers(0, 60), st.integers(0, 60))
def test_more_rows_keep_the_relative_order_of_the_others(few: int, more: int) -> None:
    few, more = sorted((few, more))
    assert [n for n in seeded_order(more, 1) if n < few] == seeded_order(few, 1)


@given(st.lists(st.lists(st.tuples(st.text(), st.text()), max_size=4), max_size=5))
def test_every_item_becomes_a_row_in_order(rows: list[list[tuple[str, str]]]) -> None:
    table = [{"q": [q for q, _ in pairs], "a": {"t": [a for _, a in pairs]}, "c": i} for i, pairs in enumerate(rows)]
    found, location = one_row_per_item(table, ["q", "a.t"], rows_in("here"))
    expected = [{"q": q, "a": {"t": a}, "c": i} for i, pairs in enumerate(rows) for q, a in pairs]
    assert found == expected
    places = [f"here row {i + 1} item {k + 1}" for i, pairs in enumerate(rows) for k in range(len(pairs))]
    assert [location(n) for n in range(len(found))] == places


def test_rows_without_lists_are_errors_and_null_stays_one_row() -> None:
    with pytest.raises(DataError, match="no list"):
        one_row_per_item([{"q": "x"}], ["q"], rows_in("here"))
    with pytest.raises(DataError, match="different lengths") as caught:
        one_row_per_item([{"q": ["x"], "a": []}], ["q", "a"], rows_in("here"))
    assert caught.value.details["found"] == "q 1, a 0"
    assert one_row_per_item([{"q": None, "a": None}], ["q", "a"], rows_in("here"))[0] == [{"q": None, "a": None}]
