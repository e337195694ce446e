"""Answers of a row: by index, by key, by text, rounded, with text around them, and references with a target of their own."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.data.instruction_tasks.row_answers import RowAnswers, row_answers
from kd.data.instruction_tasks.task import TaskFile
from kd.data.instruction_tasks.task_files import parse_task


def task(**answer: Any) -> TaskFile:
    body = {"fields": {"x": "x"}, "templates": [{"prompt": "{x}"}]} | answer
    return parse_task(yaml.safe_dump(body, allow_unicode=True), "mine", "mine.yaml")


def answers(row: dict[str, Any], **answer: Any) -> RowAnswers | None:
    return row_answers(task(**answer), row, "original", "row 1", "train")


def test_a_key_names_a_choice_by_its_place_in_the_list_of_keys() -> None:
    keyed = {"choices": {"columns": ["c.text"], "label": "k", "keys": "c.label"}}
    for keys, key in ((["A", "B", "C"], "b"), (["1", "2", "3"], 2), ([1, 2, 3], "2")):
        found = answers({"c": {"text": ["p", "q", "r"], "label": keys}, "k": key}, **keyed)
        assert found is not None
        assert (found.index, found.right) == (1, "q")
    with pytest.raises(DataError, match="do not fit together"):
        answers({"c": {"text": ["p", "q"], "label": ["A"]}, "k": "A"}, **keyed)
    with pytest.raises(DataError, match="not in the task's list"):
        answers({"c": {"text": ["p", "q"], "label": ["A", "B"]}, "k": "E"}, **keyed)


@given(st.integers(0, 3), st.integers(0, 5))
def test_indices_count_from_the_first(first: int, index: int) -> None:
    texts = [f"t{i}" for i in range(6)]
    found = answers({"c": texts, "k": index + first}, choices={"columns": ["c"], "label": "k", "first": first})
    assert found is not None
    assert found.right == texts[index]


def test_text_goes_around_every_choice_and_rules_clean_them() -> None:
    found = answers(
        {"a": "[x] cup", "b": "box", "s": "The _ fell.", "k": 1},
        choices={
            "columns": ["a", "b"],
            "label": "k",
            "drop": r"\[x\] ",
            "beginning": {"text": "the "},
            "ending": {"column": "s", "after": "_"},
        },
    )
    assert found == RowAnswers(("the cup fell.", "the box fell."), 1)


def test_several_texts_may_be_right_and_one_must_be_among_the_choices() -> None:
    given_as_text = {"choices": {"columns": ["c"], "right": "r", "drop": "'s$"}}
    found = answers({"c": ["Oslo", "Lund", "Rome"], "r": ["Rome", "Oslo's"]}, **given_as_text)
    assert found == RowAnswers(("Oslo", "Lund", "Rome"), 0, also_right=(2,))
    assert answers({"c": ["Oslo"], "r": []}, **given_as_text) is None
    with pytest.raises(DataError, match="no right answer is among the choices"):
        answers({"c": ["Oslo"], "r": ["Paris"]}, **given_as_text)


@given(st.floats(0, 5))
def test_a_number_is_rounded_to_the_nearest_label(value: float) -> None:
    labels = {"column": "k", "round": True, "original": {n: f"{n}" for n in range(6)}}
    for written in (value, str(value)):
        found = answers({"k": written}, labels=labels)
        assert found is not None
        assert abs(int(found.right) - value) <= 0.5
        assert int(found.right) == round(value)
    with pytest.raises(DataError, match="not in the task's list"):
        answers({"k": "near"}, labels=labels)
    assert answers({"k": -1}, labels=labels) is None


def test_yes_and_no_without_quotes_are_named_as_what_yaml_makes_of_them() -> None:
    labels = {"column": "k", "original": {True: "right", False: "wrong"}}
    with pytest.raises(DataError, match="not in the task's list") as caught:
        answers({"k": "yes"}, labels=labels)
    assert '"yes", because YAML reads yes as true' in caught.value.details["try"]


def test_the_target_may_be_another_column_than_the_references() -> None:
    both = {"references": "all", "target": "one"}
    assert answers({"one": "b", "all": ["a", "b", "c"]}, **both) == RowAnswers(("b", "a", "c"), None, ("b", "a", "c"))
    assert answers({"one": "b", "all": []}, **both) == RowAnswers(("b",), None, ("b",))
    for nothing in (None, "", " "):
        assert answers({"one": nothing, "all": ["a"]}, **both) is None


def test_an_empty_list_may_be_an_answer() -> None:
    assert answers({"y": []}, references="y") is None
    found = answers({"y": []}, references={"column": "y", "empty": "unanswerable"})
    assert found == RowAnswers(("unanswerable",), None, ("unanswerable",))
    assert answers({"y": None}, references={"column": "y", "empty": "unanswerable"}) is None
