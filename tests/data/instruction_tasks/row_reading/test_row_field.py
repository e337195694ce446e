"""Columns become text: constants, nested lists, marks, clean-up, and values that are nothing."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.data.instruction_tasks.row_reading.row_field import Field, NullValueError


def read(value: Any, **settings: Any) -> str | list[str]:
    return Field(("x",), **settings).read({"x": value}, "row 1")


def test_a_constant_is_the_same_for_every_row() -> None:
    assert Field(text="Czech").read({}, "row 1") == "Czech"
    assert Field(text="Czech", wrap="in {}").read({"x": 1}, "row 1") == "in Czech"


@given(st.text(), st.text())
def test_a_text_is_what_stands_before_a_mark_the_mark_and_what_stands_after(start: str, end: str) -> None:
    text = f"{start}_{end}"
    before, after = read(text, before="_"), read(text, after="_")
    cut = text.index("_")
    assert (before, after) == (text[:cut].rstrip(), text[cut + 1 :])


def test_a_text_without_its_mark_is_an_error_that_names_the_row() -> None:
    with pytest.raises(DataError, match="lacks the mark") as caught:
        read("no gap", before="_")
    assert caught.value.details["where"] == "row 1 column x"


def test_lists_of_lists_are_joined_twice_and_empty_parts_vanish() -> None:
    triples = [["a", "R_X", "b"], ["[TITLE]", "c"]]
    settings = {"join": "; ", "inner_join": " | ", "drop": r"\[TITLE\]", "replace": (("_", " "),)}
    assert read(triples, **settings) == "a | R X | b; c"
    with pytest.raises(DataError, match="not text"):
        read(triples, join="; ")


def test_a_mapping_is_the_list_of_its_values_where_a_list_is_asked_for() -> None:
    assert read({"0": "a", "1": "b"}, numbered=True) == "1. a\n2. b"
    with pytest.raises(DataError, match="not text"):
        read({"0": "a"})


@given(st.lists(st.text(min_size=1), min_size=1), st.integers(1, 12))
def test_the_first_items_of_a_list_are_kept(items: list[str], first: int) -> None:
    assert read(items, first=first) == items[:first]


def test_rules_run_in_their_documented_order() -> None:
    assert read("&lt;B&gt;A", unescape=True, drop="<B>", replace=(("A", "CD"),), lower=True) == "cd"
    assert read("Say &amp;#39;", unescape=True) == "Say &#39;", "once, not again"


@pytest.mark.parametrize("value", [None, float("nan")])
def test_nothing_is_an_error_of_its_own(value: Any) -> None:
    for row in (value, [value], ["a", value]):
        with pytest.raises(NullValueError):
            read(row)
        assert Field(("x",)).holds_nothing({"x": row}, "row 1")
    assert not Field(("x",), first=1).holds_nothing({"x": ["a", value]}, "row 1")
    assert not Field(("x", "y")).holds_nothing({"x": value, "y": "a"}, "row 1")
    assert Field(("x", "y")).read({"x": value, "y": "a"}, "row 1") == "a"


def test_a_list_is_one_answer_or_alternatives_as_the_split_says() -> None:
    field = Field(("x",), join=", ", alternatives=("test",))
    assert field.of_split("train").read({"x": ["3", "4"]}, "row 1") == "3, 4"
    assert field.of_split("test").read({"x": ["3", "4"]}, "row 1") == ["3", "4"]
