"""Laws of settings: what is made from flat names is what was given, and what means nothing is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from setting_classes import COLOURS, Group, Inner, Outer, Point, outer

from kd.common.errors import DataError
from kd.common.setting_fields import settings_of
from kd.common.setting_values import as_text
from kd.common.settings import MissingSettings, changed, flat, make, saved
from kd.common.strangers.yaml_file import read_settings

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


def test_a_class_that_is_made_directly_is_checked_and_parses_text_too() -> None:
    assert Group(size="20GB").size == 20 * 10**9  # type: ignore[arg-type]
    for wrong in ({"rate": 0.0}, {"steps": "many"}, {"inner": Inner()} | {"colour": "blue"}):
        with pytest.raises(DataError):
            Group(**wrong)  # type: ignore[arg-type]


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
