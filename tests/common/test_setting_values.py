"""Values of settings: text and lists become the value that they stand for, and what means nothing is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from setting_classes import COLOURS, Outer, Point, outer

from kd.common.errors import DataError
from kd.common.settings import flat, make


@pytest.mark.parametrize(
    ("name", "given_value", "value"),
    [
        ("rate", "5e-4", 5e-4),  # to YAML 1.1 this is text
        ("rate", 1, 1),
        ("steps", "7", 7),
        ("steps", None, None),
        ("size", "20GB", 20 * 10**9),
        ("size", 5, 5),
        ("every", "epoch", "epoch"),
        ("every", 5, 5),
        ("folder", "a/b", Path("a/b")),
        ("name", Path("a/b"), "a/b"),
        ("weights", "1,2.5", (1.0, 2.5)),
        ("weights", [1, 2.5], (1.0, 2.5)),
        ("weights", "", ()),
        ("separator", "\\n\\t", "\\n\\t"),  # escapes are for what is typed in a shell
        ("points", "1:2,3:4", (Point(1, 2), Point(3, 4))),
        ("points", ["1:2,3:4", "5:6"], (Point(1, 2), Point(3, 4), Point(5, 6))),
        ("points", [Point(1, 2), "5:6"], (Point(1, 2), Point(5, 6))),
    ],
)
def test_text_and_lists_become_the_value_that_they_stand_for(name: str, given_value: Any, value: Any) -> None:
    made = flat(outer(**{name: given_value}))[name]
    assert made == value
    assert type(made) is type(value)


def test_escapes_stand_for_line_ends_where_the_text_was_typed_in_a_shell() -> None:
    typed = make(Outer, {"called": "n", "separator": "\\n\\t"}, typed=True)
    assert flat(typed)["separator"] == "\n\t"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate", "fast"),
        ("rate", True),
        ("rate", None),
        ("steps", 1.5),
        ("steps", False),
        ("careful", "yes"),
        ("careful", 1),
        ("name", 7),
        ("weights", "1,x"),
        ("weights", ["x"]),
        ("weights", 1.0),
        ("folder", 3),
        ("columns", ["a"]),
        ("points", [3]),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(DataError, match="wrong type") as caught:
        make(Outer, {"name": "n", name: value}, where="run.yaml")
    assert str(caught.value.details["found"]).startswith(name)
    assert caught.value.details["where"] == "run.yaml"


def test_text_that_a_parser_refuses_is_refused_with_what_it_expects() -> None:
    with pytest.raises(DataError, match="cannot read points") as caught:
        outer(points="1:x")
    assert caught.value.details["found"] == "'1:x'"
    with pytest.raises(DataError, match="not a number of bytes"):
        outer(size="much")


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [("mode", "fats", ("fast", "slow")), ("colour", "gren", COLOURS), ("every", "epok", ("epoch",))],
)
def test_an_unknown_choice_lists_the_known_ones_and_suggests(name: str, value: str, choices: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=f"unknown {name} '{value}'") as caught:
        outer(**{name: value})
    assert caught.value.details["known"] == ", ".join(sorted(choices))
    assert caught.value.details["did you mean"] in choices


@pytest.mark.parametrize("value", [0, -1, float("nan"), "0"])
def test_a_value_must_exceed_its_bound(value: Any) -> None:
    with pytest.raises(DataError, match="--rate must be greater than 0"):
        outer(rate=value)


@pytest.mark.parametrize("value", [0, -3, "0"])
def test_a_value_is_at_least_its_minimum(value: Any) -> None:
    with pytest.raises(DataError, match="--steps must be at least 1"):
        outer(steps=value)
    assert outer(steps=1).group.steps == 1
