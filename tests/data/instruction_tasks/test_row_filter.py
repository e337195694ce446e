"""Rows that a task's rules leave out are counted, and nothing else is left out."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from kd.common.errors import DataError
from kd.data.data_settings import InstructionConfig
from kd.data.instruction_tasks.rendering import Rendered, render_rows
from kd.data.instruction_tasks.task_files import load_task, parse_task
from kd.data.rows.tables import rows_in

PLAIN = InstructionConfig(template=0)


def render(rows: list[dict[str, Any]], **changes: Any) -> Rendered:
    body = {"fields": {"x": "x"}, "references": "y", "templates": [{"prompt": "{x}!"}]} | changes
    task = parse_task(yaml.safe_dump({k: v for k, v in body.items() if v is not None}), "mine", "mine.yaml")
    return render_rows(task, rows, split="train", config=PLAIN, location=rows_in("here"))


def kept(done: Rendered) -> list[str]:
    return [example.prompt for example in done.examples]


def test_expressions_keep_and_leave_out_rows() -> None:
    rows = [{"x": x, "y": "a"} for x in ("one", "two", "", None, "UNK two")]
    done = render(rows, where={"x": "\\S"}, where_not={"x": "UNK"})
    assert (kept(done), done.left_out.counts) == (["one!", "two!"], {"filtered": 3})
    done = render([{"x": "a", "y": ["p", "q"]}, {"x": "b", "y": ["p"]}], where={"y": "^q$|\nq$"})
    assert kept(done) == ["a!"]


def test_rows_whose_input_is_the_answer_are_left_out() -> None:
    rows = [{"x": "Hi there", "y": "Hi there"}, {"x": "Hi there", "y": "Hi, there!"}]
    done = render(rows, differs=["x"])
    assert (len(done.examples), done.left_out.counts) == (1, {"filtered": 1})
    with pytest.raises(DataError, match="unknown field"):
        render(rows, differs=["z"])


def test_rows_with_a_skipped_label_or_another_number_of_choices_are_left_out() -> None:
    labels = {"column": "k", "original": {0: "bad", 4: "good"}, "skip": [2]}
    done = render([{"x": str(k), "k": k} for k in (0, 2, 4, -1)], references=None, labels=labels)
    assert (kept(done), done.left_out.counts) == (
        ["0!\n\nOPTIONS:\n- bad\n- good", "4!\n\nOPTIONS:\n- bad\n- good"],
        {"filtered": 1, "unlabelled": 1},
    )
    choices = {"columns": ["c"], "label": "k", "count": 3}
    done = render([{"x": n, "c": ["a"] * n, "k": 0} for n in (2, 3, 4)], references=None, choices=choices)
    assert (len(done.examples), done.left_out.counts) == (1, {"filtered": 2})


def test_rows_that_hold_nothing_in_a_choice_are_left_out() -> None:
    done = render(
        [{"x": "x", "c": c, "k": 0} for c in (["a", None], ["a", "b"])],
        references=None,
        choices={"columns": ["c"], "label": "k"},
    )
    assert (len(done.examples), done.left_out.counts) == (1, {"null_value": 1})


def test_a_cap_counts_rows_that_are_kept_and_round_robin_skips_no_template() -> None:
    task = load_task("paws")
    rows = [task.example | {"sentence1": None if i % 2 else f"s{i}"} for i in range(8)]
    config = InstructionConfig(template="round-robin")
    done = render_rows(task, rows, split="train", config=config, location=rows_in("here"), cap=3)
    assert [e.id for e in done.examples] == ["paws/train/0", "paws/train/2", "paws/train/4"]
    assert done.left_out.counts == {"null_value": 2, "beyond_limit": 3}
    whole = [task.example | {"sentence1": f"s{i}"} for i in (0, 2, 4)]
    expected = render_rows(task, whole, split="train", config=config, location=rows_in("here"))
    assert [e.prompt for e in done.examples] == [e.prompt for e in expected.examples]
