"""Laws of settings: what is made from flat names is what was given, and what means nothing is refused by name."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.common.byte_sizes import byte_count
from kd.common.errors import DataError
from kd.common.settings import (
    MissingSettings,
    as_text,
    changed,
    check,
    field_docs,
    flat,
    make,
    saved,
    setting,
    settings_of,
    unescaped,
)
from kd.common.strangers.yaml_file import read_settings

COLOURS = ("red", "green")


@dataclass(frozen=True)
class Point:
    """A value that is a class of its own, and no group, because it has a parser and stands in a tuple."""

    x: int
    y: int = 0

    def __str__(self) -> str:
        return f"{self.x}:{self.y}"


def points_from(text: str) -> tuple[Point, ...]:
    return tuple(Point(*map(int, part.split(":"))) for part in text.split(","))


@dataclass(frozen=True)
class Inner:
    """A group in a group."""

    weights: tuple[float, ...] = (1.0, 2.0)
    """Weights of the parts."""
    mode: Literal["slow", "fast"] = "slow"
    """How fast it goes."""
    points: tuple[Point, ...] = setting((), multiple=True, parse=points_from)
    """Points to visit."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Group:
    """Settings of every type."""

    rate: float = setting(5e-4, above=0)
    """Learning rate."""
    steps: int | None = setting(None, minimum=1)
    """Number of steps."""
    size: int | None = setting(None, parse=byte_count)
    """Bytes that are kept."""
    every: int | Literal["epoch"] = "epoch"
    """Steps between, or epoch."""
    folder: Path | None = None
    """Where things lie."""
    careful: bool = True
    """Whether to look twice."""
    colour: str = setting("red", choices=COLOURS)
    """Name of a registry."""
    separator: str = setting("\n", typed=unescaped)
    """Text in between."""
    columns: dict[str, str] = field(default_factory=dict)
    """Names of columns."""
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Outer:
    """The outermost class."""

    name: str = setting(flag="--called")
    """Name of the thing,
    over two lines."""
    group: Group = field(default_factory=Group)
    hidden: int = setting(3, hidden=True)
    """Not an option."""

    def __post_init__(self) -> None:
        check(self)


def outer(**values: Any) -> Outer:
    return make(Outer, {"name": "n"} | values)


finite = st.floats(min_value=1e-6, max_value=1e6)
values = st.fixed_dictionaries(
    {"name": st.text()},
    optional={
        "rate": finite,
        "steps": st.none() | st.integers(1, 9),
        "size": st.none() | st.integers(1, 10**12),
        "every": st.integers(1, 9) | st.just("epoch"),
        "folder": st.none() | st.sampled_from([Path("a"), Path("a/b")]),
        "careful": st.booleans(),
        "colour": st.sampled_from(COLOURS),
        "separator": st.sampled_from(["", " ", "\n", "\t-"]),
        "weights": st.lists(finite).map(tuple),
        "mode": st.sampled_from(["slow", "fast"]),
        "points": st.lists(st.builds(Point, st.integers(0, 9), st.integers(0, 9))).map(tuple),
        "columns": st.dictionaries(st.sampled_from("ab"), st.sampled_from("cd")),
        "hidden": st.integers(),
    },
)


# make, flat, changed


@given(values)
def test_flat_is_the_inverse_of_make(values: dict[str, Any]) -> None:
    made = make(Outer, values)
    assert make(Outer, flat(made)) == made
    assert flat(made).items() >= values.items()
    assert flat(made).keys() == settings_of(Outer).keys()


@given(values)
def test_what_is_not_given_keeps_its_default(values: dict[str, Any]) -> None:
    made, known = flat(make(Outer, values)), settings_of(Outer)
    assert {name: made[name] for name in made.keys() - values.keys()} == {
        name: known[name].default for name in made.keys() - values.keys()
    }


@given(values, values)
def test_changed_replaces_what_is_named_alone(first: dict[str, Any], second: dict[str, Any]) -> None:
    made = make(Outer, first)
    assert flat(changed(made, **second)) == flat(made) | second
    assert made == make(Outer, first)


@given(values)
def test_groups_may_be_given_as_nested_mappings(values: dict[str, Any]) -> None:
    nested: dict[str, Any] = {"group": {"inner": {}}}
    for name, value in values.items():
        place = nested
        for part in settings_of(Outer)[name].path[:-1]:
            place = place[part]
        place[name] = value
    assert make(Outer, nested) == make(Outer, values)


@given(values)
def test_typed_text_means_the_value_it_was_made_from(values: dict[str, Any]) -> None:
    made = make(Outer, values)
    for name, value in flat(made).items():
        if value is not None and not isinstance(value, str | bool | dict) and value != ():
            assert settings_of(Outer)[name].checked(as_text(value)) == value


@given(values)
def test_saved_settings_are_json_that_makes_them_again(values: dict[str, Any]) -> None:
    made = make(Outer, values)
    assert make(Outer, json.loads(json.dumps(saved(made)))) == made


def test_names_may_be_spelled_with_hyphens_and_by_their_flags() -> None:
    assert make(Outer, {"called": "n", "steps": 2}) == outer(steps=2)
    assert make(Outer, {"name": "n", "weights": [1, 2]}).group.inner.weights == (1.0, 2.0)


@pytest.mark.parametrize(
    "twice", [{"steps": 1, "group": {"steps": 2}}, {"name": "a", "called": "b"}, {"group": {"name": "b"}, "name": "a"}]
)
def test_a_setting_that_is_given_twice_is_refused(twice: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="given twice"):
        make(Outer, {"name": "n"} | twice)


def test_what_has_no_default_is_asked_for_by_its_option() -> None:
    with pytest.raises(MissingSettings) as caught:
        make(Outer, {"steps": 2}, where="run.yaml")
    assert caught.value.details == {"where": "run.yaml", "expected": "--called"}


@pytest.mark.parametrize(
    ("name", "nearest"), [("step", "steps"), ("weight", "weights"), ("colours", "colour"), ("call", "called")]
)
def test_a_typo_is_refused_with_the_nearest_name(name: str, nearest: str) -> None:
    for given_values in ({name: 1}, {"group": {name: 1}}):
        with pytest.raises(DataError, match=f"unknown setting '{name}'") as caught:
            outer(**given_values)
        assert caught.value.details["did you mean"] == nearest


def test_a_name_may_be_used_once_in_all_groups() -> None:
    twice = dataclasses.make_dataclass("twice", [("group", Group), ("steps", int, 1)], frozen=True)
    with pytest.raises(AssertionError, match="two settings called steps"):
        settings_of(twice)


# Values


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


def test_a_class_that_is_made_directly_is_checked_and_parses_text_too() -> None:
    assert Group(size="20GB").size == 20 * 10**9  # type: ignore[arg-type]
    for wrong in ({"rate": 0.0}, {"steps": "many"}, {"inner": Inner()} | {"colour": "blue"}):
        with pytest.raises(DataError):
            Group(**wrong)  # type: ignore[arg-type]


# Documentation


def test_every_field_s_docstring_is_its_help_in_one_line() -> None:
    known = settings_of(Outer)
    assert known["name"].doc == "Name of the thing, over two lines."
    assert all(one.doc for one in known.values())
    assert field_docs(Inner) == {
        "weights": "Weights of the parts.",
        "mode": "How fast it goes.",
        "points": "Points to visit.",
    }


def test_a_class_has_the_docstrings_of_those_it_inherits_from() -> None:
    @dataclass(frozen=True)
    class Derived(Inner):
        more: int = 0
        """More of it."""

    assert field_docs(Derived) == {**field_docs(Inner), "more": "More of it."}


# Files


def test_settings_are_read_from_yaml_and_from_json(tmp_path: Path) -> None:
    text = "called: n\nrate: 5e-4\ngroup:\n  steps: 3\n  inner: {weights: [1, 2], mode: fast}\n"
    expected = outer(rate=5e-4, steps=3, weights=(1.0, 2.0), mode="fast")
    (tmp_path / "run.yaml").write_text(text)
    (tmp_path / "run.json").write_text(json.dumps(saved(expected)))
    for name in ("run.yaml", "run.json"):
        assert make(Outer, read_settings(tmp_path / name)) == expected


@pytest.mark.parametrize("text", ["- a list", "just words", "a: [1", "", "\udce4"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    for path in (file, tmp_path / "absent.yaml"):
        with pytest.raises(DataError, match="configuration file") as caught:
            read_settings(path)
        assert caught.value.details["where"] == path


def test_an_error_in_a_file_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    for text, words in (
        ("called: n\nsteps: [1\n", "line 3"),
        ("steps: 2\ngroup: {}\nsteps: 3\n", "line 3: 'steps' is given twice"),
    ):
        file.write_text(text)
        with pytest.raises(DataError) as caught:
            read_settings(file)
        assert words in str(caught.value.details["found"])


def test_a_typo_in_the_name_of_a_group_suggests_the_group() -> None:
    with pytest.raises(DataError) as caught:
        make(Outer, {"called": "n", "grup": {"steps": 3}})
    assert caught.value.details["did you mean"] == "group"
    assert next(iter(caught.value.details)) == "did you mean"
