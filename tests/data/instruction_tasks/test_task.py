"""Templates are filled and splits are cut without losing anything."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kd.data.instruction_tasks.task import SplitPart, fill


@given(st.dictionaries(st.sampled_from("abc"), st.text(), min_size=3))
def test_values_are_put_in_as_they_are_braces_included(values: dict[str, str]) -> None:
    assert fill("{a}|{{b}}|{c}{a}", values) == f"{values['a']}|{{b}}|{values['c']}{values['a']}"


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
