"""Splits are cut without losing anything, and a field's rules keep within bounds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.data.instruction_tasks.row_reading.row_field import Field
from kd.data.instruction_tasks.task import SplitPart


@given(st.integers(0, 50), st.integers(0, 100))
def test_a_cut_in_two_loses_no_row(rows: int, percent: int) -> None:
    (start, middle), (again, stop) = (
        SplitPart("t", "", f"{percent}%").cut(rows),
        SplitPart("t", f"{percent}%").cut(rows),
    )
    assert (start, middle, stop) == (0, again, rows)
    assert middle == rows * percent // 100


def test_cuts_by_rows_and_from_the_end() -> None:
    assert SplitPart("t", "-3").cut(10) == (7, 10)
    assert SplitPart("t", "", "-3").cut(10) == (0, 7)
    assert SplitPart("t", "2", "99").cut(10) == (2, 10)
    assert SplitPart("t", "-99").cut(10) == (0, 10)
    assert SplitPart("t", "-10%").cut(18_612) == (16_750, 18_612)


def test_rules_that_double_a_text_stop_before_it_fills_the_memory() -> None:
    field = Field(("text",), replace=(("a", "aa"),) * 60)
    with pytest.raises(DataError, match="grows too long") as caught:
        field.read({"text": "a"}, "row 1")
    assert caught.value.details["where"] == "row 1"
    with pytest.raises(DataError, match="grows too long"):
        Field(("text",), join="x" * 10_000).read({"text": ["a"] * 2000}, "row 1")
    assert Field(("text",), replace=(("a", "b"), ("bb", "")), wrap="<{}>").read({"text": "aab"}, "row 1") == "<b>"


def test_a_rule_that_takes_for_ever_stops_after_a_second() -> None:
    field = Field(("text",), drop=r"(\w+\s?)+$")
    assert field.read({"text": "one two"}, "row 1") == ""
    with pytest.raises(DataError, match="takes too long") as caught:
        field.read({"text": "word " * 5000 + "!"}, "row 2")
    assert (caught.value.details["where"], caught.value.details["found"]) == ("row 2", r"drop: (\w+\s?)+$")
