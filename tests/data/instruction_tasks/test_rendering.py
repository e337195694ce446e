"""Rows become text: every template of every task, choices and references, seeds, and rows that cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.data.data_settings import InstructionConfig
from kd.data.instruction_tasks.rendering import Rendered, options_text, render_rows, show_templates
from kd.data.instruction_tasks.task import TaskFile
from kd.data.instruction_tasks.task_files import load_task, parse_task, task_names
from kd.data.rows.example import Example, text_digest
from kd.data.rows.tables import rows_in

PLAIN = InstructionConfig(template=0)
BOOLQ = load_task("boolq").example


def render(task: TaskFile, rows: list[Any], config: InstructionConfig = PLAIN, **options: Any) -> Rendered:
    return render_rows(task, rows, split="train", config=config, location=rows_in("here"), **options)


def one(name: str, config: InstructionConfig = PLAIN, **changes: Any) -> Example:
    task = load_task(name)
    return render(task, [dict(task.example) | changes], config).examples[0]


@pytest.mark.parametrize("labels", ["original", "flan"])
@pytest.mark.parametrize("options", [None, False])
@pytest.mark.parametrize("name", task_names())
def test_every_template_renders_on_the_example_row(name: str, options: bool | None, labels: Any) -> None:
    task = load_task(name)
    shown = show_templates(task, InstructionConfig(options=options, labels=labels))
    assert len(shown) == len(task.templates)
    for template, example in zip(task.templates, shown, strict=True):
        check(example, task, template.inverted, options is not False)


def check(example: Example, task: TaskFile, inverted: bool, options: bool) -> None:
    """What holds for every rendered example."""
    assert example.prompt.strip() == example.prompt != ""
    assert example.target.strip()
    if inverted:
        assert (example.choices, example.answer, example.references) == ((), None, ())
    elif task.has_choices:
        assert example.answer is not None
        assert example.choices[example.answer] == example.target
        assert example.references == ()
    else:
        assert example.choices == ()
        assert example.target in example.references
    listed = example.prompt.endswith("\n\n" + options_text(example.choices)) if example.choices else False
    assert listed == (task.has_choices and options and not inverted)
    assert "OPTIONS" not in example.prompt or listed


REAL = {
    "anli_r1": "dev",
    "anli_r2": "dev",
    "anli_r3": "dev",
    "boolq": "sample200",
    "common_gen": "dev",
    "cosmos_qa": "sample200",
    "paws": "dev",
    "samsum": "validation",
    "squad": "train_part",
    "xsum": "sample200",
}


@pytest.mark.parametrize("name", REAL)
def test_every_template_renders_on_real_rows(name: str, shared: Path) -> None:
    from kd.data.rows.tables import read_table

    task = load_task(name)
    rows = read_table(shared / "tasks" / name / f"{REAL[name]}.jsonl").rows[:40]
    for index, template in enumerate(task.templates):
        for example in render(task, rows, replace(PLAIN, template=index)).examples:
            check(replace(example, prompt=example.prompt.strip()), task, template.inverted, True)


PAIR = {"sentence1": "premise", "sentence2": "hypothesis"}
OF_FLAN = {
    "mnli": ("glue/mnli/subset10k_dev", {}),
    "mnli_mismatched": ("glue/mnli/subset10k_dev", {}),
    "qnli": ("glue/qnli/subset10k_dev", {}),
    "rte": ("glue/rte/train", PAIR),
    "mrpc": ("glue/mrpc/train", {}),
    "qqp": ("glue/qqp/subset10k_dev", {}),
    "sst2": ("glue/sst2/train", {}),
    "cola": ("glue/cola/train", {}),
    "hellaswag": ("tasks/hellaswag/sample500", {}),
    "squad_v2": ("tasks/squad/train_part", {}),
}
"""Task of FLAN -> real rows of it, and other names of their columns."""


@pytest.mark.parametrize("labels", ["original", "flan"])
@pytest.mark.parametrize("name", OF_FLAN)
def test_every_template_of_flans_tasks_renders_on_real_rows(name: str, labels: Any, shared: Path) -> None:
    from kd.data.rows.tables import read_table

    path, renamed = OF_FLAN[name]
    task = load_task(name)
    rows = [{renamed.get(k, k): v for k, v in row.items()} for row in read_table(shared / f"{path}.jsonl").rows[:60]]
    if name == "squad_v2":
        rows[0] = rows[0] | {"answers": {"text": [], "answer_start": []}}
    for index, template in enumerate(task.templates):
        done = render(task, rows, replace(PLAIN, template=index, labels=labels))
        assert (len(done.examples), str(done.left_out)) == (60, "nothing")
        for example in done.examples:
            check(replace(example, prompt=example.prompt.strip()), task, template.inverted, True)
            assert not {"[header]", "[title]", "[step]"} & set(example.prompt.split())
    assert name != "squad_v2" or render(task, rows).examples[0].target == "unanswerable"


def test_an_ablation_keeps_the_first_templates_or_takes_the_instruction_away() -> None:
    task = load_task("wmt16_de")
    few = replace(PLAIN, template="round-robin", first_templates=2)
    assert len({e.prompt for e in render(task, [task.example] * 9, few).examples}) == 2
    shown = [e.prompt for e in show_templates(task, replace(PLAIN, first_templates=4))]
    assert shown == [e.prompt for e in show_templates(task, PLAIN)][:4]
    with pytest.raises(DataError, match="no such template"):
        render(task, [task.example], replace(PLAIN, template=2, first_templates=2))
    [bare] = show_templates(task, replace(PLAIN, task_prompt="bare"))
    [named] = show_templates(task, replace(PLAIN, task_prompt="name"))
    assert bare.prompt == "The train to Bremen leaves from platform four."
    assert named.prompt == "[translation: wmt16_de] The train to Bremen leaves from platform four."
    assert (
        (bare.target, bare.references)
        == (named.target, named.references)
        == (
            "Der Zug nach Bremen fährt von Gleis vier.",
            ("Der Zug nach Bremen fährt von Gleis vier.",),
        )
    )
    [choices] = show_templates(load_task("rte"), replace(PLAIN, task_prompt="bare"))
    assert choices.prompt.endswith("\n\nOPTIONS:\n- entailment\n- not entailment")


def test_settings_that_older_caches_do_not_name_are_named_only_where_they_are_used() -> None:
    assert (
        not {"first_templates", "task_prompt", "skip_missing"}
        & InstructionConfig(skip_missing=True).provenance().keys()
    )
    assert InstructionConfig(first_templates=2, task_prompt="bare").provenance() == InstructionConfig().provenance() | {
        "first_templates": "2",
        "task_prompt": "bare",
    }


def test_label_values_become_choices_in_the_documented_order() -> None:
    assert [one("anli_r1", label=i).target for i in range(3)] == ["entailment", "neutral", "contradiction"]
    assert one("anli_r1", replace(PLAIN, labels="flan"), label=1).target == "It's impossible to say"
    assert (one("boolq", answer=True).answer, one("boolq", answer=False).answer) == (0, 1)
    assert one("boolq", replace(PLAIN, labels="flan"), answer=True).choices == ("no", "yes")
    assert one("boolq", replace(PLAIN, labels="flan"), answer=True).target == "yes"
    assert (one("paws", label=1).choices, one("paws", label=1).target) == (("No", "Yes"), "Yes")
    assert one("cosmos_qa", label=2).target == "The bus had a broken window ."


def test_the_options_suffix_is_exact() -> None:
    assert one("paws").prompt.endswith("in other words?\n\nOPTIONS:\n- No\n- Yes")
    assert one("paws", replace(PLAIN, options=False)).prompt.endswith("in other words?")


def test_csv_strings_give_the_same_examples_as_typed_values() -> None:
    assert one("boolq", answer="True") == one("boolq", answer=True)
    assert one("anli_r1", label="2") == one("anli_r1", label=2)


def test_fields_are_read_as_the_files_say() -> None:
    assert one("squad").prompt.startswith("From an article on Stone bridge:")
    assert one("squad").references == ("a ferry", "a ferry, which had sunk")
    assert one("squad").target == "a ferry"
    assert one("common_gen").prompt.startswith("Words: boat, lake, row\n")
    assert one("python_code").prompt.startswith(
        "Write a function that returns the larger of two numbers.\na = 3, b = 5\n\n"
    )
    assert one("python_code", input="").prompt.startswith(
        "Write a function that returns the larger of two numbers.\n\n"
    )
    assert one("python_code").target.startswith("```python\ndef larger(a, b):\n")
    assert one("coqa").target == "1. Inkpot\n2. grey\n3. up the church tower"
    photo = one("samsum", dialogue="A: <file_photo> look!\r\nB: 3 < 4 > 2")
    assert photo.prompt.startswith("A:  look!\nB: 3 < 4 > 2\n\n")


def test_rows_of_one_concept_set_share_their_references() -> None:
    rows = [{"concept_set_idx": g, "concepts": ["a"], "target": t} for g, t in ((0, "x"), (1, "y"), (0, "z"), (0, "x"))]
    found = render(load_task("common_gen"), rows, cap=3).examples
    assert [(e.target, e.references) for e in found] == [("x", ("x", "z")), ("y", ("y",)), ("z", ("x", "z"))]


def test_long_rows_go_first_and_then_the_cap_counts() -> None:
    rows = [dict(BOOLQ) | {"passage": "p" * n} for n in (2001, 5, 2000, 7)]
    done = render(load_task("boolq"), rows, cap=2)
    assert [e.id for e in done.examples] == ["boolq/train/1", "boolq/train/2"]
    assert done.left_out.document() == {
        "over_max_chars": {"count": 1, "first": "boolq/train/0"},
        "beyond_limit": {"count": 1, "first": "boolq/train"},
    }


def test_unlabelled_rows_are_left_out_and_counted() -> None:
    rows = [load_task("paws").example | {"label": v} for v in (-1, 1, None, "", 0)]
    done = render(load_task("paws"), rows)
    assert ([e.answer for e in done.examples], done.left_out.count("unlabelled")) == ([1, 0], 3)
    with pytest.raises(DataError, match="no row has an answer") as caught:
        render(load_task("paws"), rows[:1])
    assert "1 unlabelled" in str(caught.value)


def test_rows_without_a_reference_are_unlabelled_too() -> None:
    rows = [{"concept_set_idx": 0, "concepts": ["a"], "target": t} for t in ("", None, "x", "  ")]
    done = render(load_task("common_gen"), rows)
    assert ([e.target for e in done.examples], done.left_out.count("unlabelled")) == (["x"], 3)
    assert done.examples[0].references == ("x",)


def test_dotted_paths_work_wherever_a_column_is_named() -> None:
    text = """
        {fields: {x: a.text}, max_chars: {a.text: 3}, labels: {column: a.label, original: {"none": "n", 1: "y"}},
         templates: [{prompt: "{x}"}]}"""
    task = parse_task(text, "mine", "mine.yaml")
    assert task.columns == ("a",)
    rows = [{"a": {"text": t, "label": v}} for t, v in (("one", 1), ("four", 1), ("two", "none"), ("six", -1))]
    done = render(task, rows)
    assert [(e.prompt.split()[0], e.target) for e in done.examples] == [("one", "y"), ("two", "n")]
    assert done.left_out.counts == {"over_max_chars": 1, "unlabelled": 1}


@pytest.mark.parametrize(
    ("name", "changes", "found"),
    [
        ("paws", {"label": 2}, "2"),
        ("boolq", {"answer": "maybe"}, "maybe"),
        ("cosmos_qa", {"label": 4}, "4"),
        ("anli_r1", {"label": "x"}, "x"),
    ],
)
def test_a_label_outside_the_list_names_the_row_and_the_list(name: str, changes: dict[str, Any], found: str) -> None:
    task = load_task(name)
    with pytest.raises(DataError, match="not in the task's list") as caught:
        render(task, [task.example, task.example | changes])
    assert caught.value.details["found"] == found
    assert "here row 2" in str(caught.value)


def test_a_missing_column_names_what_was_found_and_expected() -> None:
    with pytest.raises(DataError, match="columns are missing") as caught:
        render(load_task("boolq"), [{"passage": "p", "query": "q", "answer": True}])
    assert caught.value.details["found"] == "passage, query, answer"
    assert caught.value.details["expected"] == "question"
    with pytest.raises(DataError, match="columns are missing") as caught:
        one("squad", answers={"answer_start": [3]})
    assert caught.value.details["expected"] == "answers.text"


def test_a_value_that_is_not_text_is_an_error() -> None:
    with pytest.raises(DataError, match="not text"):
        one("boolq", passage={"a": "b"})
    with pytest.raises(DataError, match="a field is a list"):
        one("boolq", passage=["a", "b"])


# choice of templates


def test_round_robin_takes_the_templates_in_turn() -> None:
    task = load_task("paws")
    found = render(task, [task.example] * 23, replace(PLAIN, template="round-robin")).examples
    wanted = show_templates(task, PLAIN)
    assert [e.prompt for e in found] == [wanted[i % 10].prompt for i in range(23)]


def test_an_index_takes_one_template_and_none_outside_the_list() -> None:
    task = load_task("paws")
    assert len({e.prompt for e in render(task, [task.example] * 5, replace(PLAIN, template=9)).examples}) == 1
    for index in (-1, 10):
        with pytest.raises(DataError, match="no such template") as caught:
            render(task, [task.example], replace(PLAIN, template=index))
        assert caught.value.details["expected"] == "0..9"


@given(st.integers(0, 30), st.integers(1, 30), st.integers(0, 5))
def test_a_random_template_depends_on_seed_and_id_alone(start: int, count: int, seed: int) -> None:
    task, config = load_task("paws"), InstructionConfig(data_seed=seed)
    rows = [task.example] * 60
    part = render(task, rows[start : start + count], config, first=start).examples
    assert part == render(task, rows, config).examples[start : start + count]


def test_random_templates_are_all_used_and_change_with_the_seed() -> None:
    task = load_task("paws")
    prompts = [
        [e.prompt for e in render(task, [task.example] * 400, InstructionConfig(data_seed=s)).examples] for s in (0, 1)
    ]
    assert len(set(prompts[0])) == 10
    counts = [prompts[0].count(p) for p in set(prompts[0])]
    assert max(counts) < 70  # 40 expected, standard deviation 6
    assert prompts[0] != prompts[1]


def test_the_text_is_the_same_in_every_process() -> None:
    script = (
        "from kd.data.instruction_tasks.rendering import *; from kd.data.instruction_tasks.task_files import load_task;"
        "from kd.data.rows.example import text_digest;"
        "t = load_task('squad'); print(text_digest(render_rows(t, [t.example] * 50, split='train',"
        "config=InstructionConfig(data_seed=3), location=str).examples))"
    )
    runs = {
        subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    task = load_task("squad")
    assert runs == {text_digest(render(task, [task.example] * 50, InstructionConfig(data_seed=3)).examples)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"template": "round_robin"}, "unknown template choice"),
        ({"labels": "flann"}, "unknown labels"),
        ({"max_per_task": 0}, "--max-per-task must be at least 1"),
        ({"mix_maximum": 0}, "--mix-maximum must be at least 1"),
        ({"mix_draws": 5}, "draws need a rate maximum"),
    ],
)
def test_wrong_settings_are_errors(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        InstructionConfig(**settings)


def test_a_file_without_an_example_row_cannot_be_shown() -> None:
    task = parse_task("{references: y, fields: {x: x}, templates: [{prompt: '{x}'}]}", "mine", "mine.yaml")
    with pytest.raises(DataError, match="no example row"):
        show_templates(task, PLAIN)


def test_a_null_in_a_field_that_the_template_does_not_use_stops_nothing() -> None:
    text = """
        {fields: {x: x, note: note}, references: y,
         templates: [{prompt: "{x}?"}, {prompt: "{x}, {note}?"}]}"""
    task = parse_task(text, "mine", "mine.yaml")
    rows = [{"x": "a", "note": None, "y": "b"}]
    assert render(task, rows, replace(PLAIN, template=0)).examples[0].prompt == "a?"
    done = render(task, [*rows, {"x": "c", "note": "d", "y": "e"}], replace(PLAIN, template=1))
    assert ([e.prompt for e in done.examples], done.left_out.count("null_value")) == (["c, d?"], 1)


def test_a_number_that_is_none_is_nothing() -> None:
    text = "{fields: {x: x}, references: y, templates: [{prompt: '{x}'}]}"
    task = parse_task(text, "mine", "mine.yaml")
    nothing = render(task, [{"x": float("nan"), "y": "b"}])
    assert (nothing.examples, nothing.left_out.first) == ((), {"null_value": "mine/train/0"})
    done = render(task, [{"x": "a", "y": float("nan")}, {"x": "a", "y": "b"}])
    assert ([e.target for e in done.examples], done.left_out.count("unlabelled")) == (["b"], 1)
    labels = render(load_task("paws"), [load_task("paws").example | {"label": v} for v in (float("nan"), 1)])
    assert labels.left_out.count("unlabelled") == 1


def sorted_rows(n: int) -> list[dict[str, Any]]:
    return [dict(load_task("paws").example) | {"sentence1": f"s{i}", "label": int(i >= n // 2)} for i in range(n)]


def test_a_cap_does_not_take_one_label_of_rows_sorted_by_label() -> None:
    done = render(load_task("paws"), sorted_rows(400), cap=100)
    assert done.drawn
    assert 30 < sum(e.answer or 0 for e in done.examples) < 70  # 50 expected, standard deviation 4
    numbers = [int(e.id.rpartition("/")[2]) for e in done.examples]
    assert (len(numbers), numbers) == (100, sorted(numbers)), "drawn rows stay in their order"
    assert done.left_out.count("beyond_limit") == 300
    whole = {e.id: e for e in render(load_task("paws"), sorted_rows(400)).examples}
    assert all(whole[e.id] == e for e in done.examples)
    more = render(load_task("paws"), sorted_rows(400), cap=150)
    assert {e.id for e in done.examples} < {e.id for e in more.examples}
    other = render(load_task("paws"), sorted_rows(400), replace(PLAIN, data_seed=1), cap=100)
    assert [e.id for e in other.examples] != [e.id for e in done.examples]


def test_a_data_set_of_the_hub_is_drawn_from_as_a_file_is() -> None:
    from datasets import Dataset

    rows = sorted_rows(400)
    assert (
        render(load_task("paws"), Dataset.from_list(rows), cap=50).examples
        == render(load_task("paws"), rows, cap=50).examples
    )


def test_each_asks_a_row_in_every_template_that_asks_for_the_answer() -> None:
    task = load_task("boolq")
    rows = [dict(BOOLQ), dict(BOOLQ) | {"question": "is rye a grain", "answer": True}]
    asked = render(task, rows, InstructionConfig(template="each"), cap=2).examples
    plain = [k for k, template in enumerate(task.templates) if not template.inverted]
    assert [e.id for e in asked] == [f"boolq/train/{row} in template {k}" for row in (0, 1) for k in plain]
    one_by_one = [render(task, rows, InstructionConfig(template=k)).examples for k in plain]
    assert [e.prompt for e in asked] == [examples[row].prompt for row in (0, 1) for examples in one_by_one]
    assert all(e.choices for e in asked)
    bare = render(task, rows, InstructionConfig(template="each", task_prompt="bare")).examples
    assert [e.id for e in bare] == ["boolq/train/0 in template 0", "boolq/train/1 in template 0"]
