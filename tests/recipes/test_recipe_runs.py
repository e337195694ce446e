"""Every recipe runs to its end with stand-ins: tiny models with random weights, and a few rows of the true shape."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from glue_fixtures import made_up_rows
from numbered_rows import save_hellaswag, save_rows, save_task
from teacher_server import TeacherServer
from terminal import kd
from tiny_encoder import save_encoder

from kd.data.instruction_tasks.glue import glue_tasks
from kd.data.instruction_tasks.mixing.mixture_names import EIGHT
from kd.evaluation.report.systems.table_file import load_table
from kd.recipes.recipe_file import Recipe, recipe_names
from kd.recipes.steps import Step

NAMES = recipe_names()
SMALLER = {
    "seq-len": "64",
    "target-len": "16",
    "epochs": "0.5",
    "dtype": "float32",
    "precision": "fp32",
    "tokens-per-batch": "512",
    "max-new-tokens": "8",
}
"""What is too large for a tiny model, in place of what the recipe says."""


@pytest.fixture(scope="module")
def served(model_dir: Path) -> Iterator[str]:
    """Address of a server that runs the tiny teacher."""
    server = TeacherServer(model_dir)
    yield server.url
    server.close()


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, save_student, t5_dir: Path, model_dir: Path, served: str) -> dict[str, dict[str, str]]:
    """Variables of each recipe: a tiny teacher, a student, rows."""
    folder = tmp_path_factory.mktemp("stand-ins")
    student = str(save_student(folder / "student", n_positions=512, n_embd=16, n_layer=1))
    other = str(save_student(folder / "other", n_positions=512, n_embd=8, n_layer=1))
    for size in ("flan-small", "flan-xl"):
        shutil.copytree(t5_dir, folder / size)
    text = "".join(f"The keeper counted {n} ships in the fog. " * 8 + "\n<|endoftext|>\n" for n in range(12))
    (folder / "text.txt").write_text(text)
    (folder / "held.txt").write_text("The baker sold bread to the keeper. " * 12)  # what was trained on is refused
    rows = folder / "tasks"
    for task in EIGHT:
        save_task(rows, task)
    save_hellaswag(rows)
    for task in glue_tasks():
        for split, first in (("train", 0), ("dev", 100)):
            save_rows(folder / "glue" / task / f"{split}.jsonl", made_up_rows(task, 12, first))
    save_encoder(folder / "encoder")
    none = {"flan-base": "", "flan-large": "", "flan-xl": "", "flan-xxl": ""}
    tasks = {"teacher": str(t5_dir), "student": student, "task-root": str(rows), "eval-limit": "2"}
    family = none | {"flan-small": str(folder / "flan-small"), "task-limits": "xsum=1"}
    prose = {"student": student, "data": str(folder / "text.txt"), "eval-data": str(folder / "held.txt")}
    prose |= {"eval-split": "train", "teacher": str(model_dir)}
    encoder = {"bertscore-model": str(folder / "encoder"), "bertscore-layer": "2"}
    return {
        "oscarnav-four": tasks | family,
        "oscarnav-ten": tasks
        | family
        | encoder
        | {"data": "flan:eight", "flan-xl": str(folder / "flan-xl"), "pythia": other, "smollm": ""},
        "uld-paper": tasks | {"teacher": str(model_dir)},
        "flan": tasks
        | {
            "student": str(t5_dir),
            "data": "flan:tasks=xsum,samsum",
            "eval-data": "flan:tasks=anli_r1",
            "max-steps": "1",
        },
        "glue-merging": {
            "base": other,
            "task-root": str(folder / "glue"),
            "epochs": "0.5",
            "max-length": "32",
            "train-limit": "8",
            "eval-limit": "6",
            "examples": "2",
            "sweep": "0:1:0.5",
        },
        "neo-wikitext": prose | {"task-root": str(rows), "eval-limit": "6"},
        "served-teacher": prose | {"teacher-url": f"{served}/v1"},
    }


@pytest.fixture
def run(tmp_path: Path, stand_ins, monkeypatch: pytest.MonkeyPatch):
    """Runs a recipe's own commands, but for what is too large for a tiny model; returns the folder."""
    original = Recipe.fill

    def shortened(recipe: Recipe, out: Path, variables: dict[str, str]) -> list[Step]:
        steps = []
        for step in original(recipe, out, variables):
            options = {k: SMALLER.get(k, v) for k, v in step.options.items() if k != "load-in-4bit"}
            if step.command in ("train", "classify train"):
                options["device"] = "cpu"
            if step.command == "eval" and "generation" in str(options["tasks"]):
                options["max-new-tokens"] = "8"
            steps.append(replace(step, options=options))
        return steps

    monkeypatch.setattr(Recipe, "fill", shortened)

    def go(name: str) -> Path:
        words = [f"--set={k}={v}" for k, v in stand_ins[name].items()]
        assert "done" in kd("recipe", "run", name, "--out", tmp_path / "run", *words)
        return tmp_path / "run"

    return go


def system_rows(folder: Path) -> dict[str | None, dict[str, list[float | None]]]:
    """Block -> label of a measured row -> its figures."""
    blocks = json.loads((folder / "report" / "report.json").read_text())["system"]
    return {b["split"]: {r["label"]: r["values"] for r in b["rows"] if not r["published"]} for b in blocks}


def test_every_recipe_has_its_run_here() -> None:
    assert set(NAMES) == {
        *("flan", "glue-merging", "neo-wikitext", "oscarnav-four", "oscarnav-ten", "served-teacher", "uld-paper"),
    }


@pytest.mark.parametrize("name", ["uld-paper", "served-teacher"])
def test_a_recipe_of_two_students_ends_with_its_report_and_trains_nothing_twice(name: str, run) -> None:
    folder = run(name)
    assert (folder / "report" / "report.html").exists()
    before = {}
    for student in ("distilled", "finetuned"):
        assert json.loads((folder / student / "run.json").read_text())["complete"]
        before[student] = (folder / student / "metrics.jsonl").stat().st_mtime_ns
    run(name)
    assert {s: (folder / s / "metrics.jsonl").stat().st_mtime_ns for s in before} == before


def test_system_000_ends_with_both_blocks_of_its_table(run) -> None:
    blocks = system_rows(run("oscarnav-four"))
    assert list(blocks) == ["train", "test"]
    for rows in blocks.values():
        assert list(rows) == ["flan-small", "student FT", "student KD"]
        assert all(value is not None for values in rows.values() for value in values)


def test_system_001_ends_with_three_kinds_of_models_and_all_columns(run) -> None:
    folder = run("oscarnav-ten")
    blocks = system_rows(folder)
    assert list(blocks) == ["train", "test"]
    for rows in blocks.values():
        assert list(rows) == ["flan-small", "flan-xl", "student FT", "student KD", "other FT", "other KD"]
        assert all(len(values) == 13 and None not in values for values in rows.values())
    text = (folder / "report" / "report.md").read_text()
    assert "published: GPT-2-Med KD" in text
    counted = {line for line in text.splitlines() if line.startswith("Figures are over ")}
    assert any("1 examples: XSum R-L, XSum BERTScore" in line for line in counted)
    (scores,) = [json.loads(p.read_text()) for p in (folder / "students-train").glob("0-*/eval.json")]
    assert "contaminated" in scores["settings"]["choices"]
    first = [
        scores["tasks"][t][m]["value"] for t, m in (("choices", "accuracy/boolq"), ("generation", "squad_f1/squad"))
    ]
    assert blocks["train"]["student FT"][:2] == pytest.approx([100 * value for value in first])
    assert len(load_table("oscarnav-ten").columns) == 11


def test_system_002_ends_with_gpt2_before_and_after_beside_its_published_score(run) -> None:
    folder = run("neo-wikitext")
    rows = system_rows(folder)[None]
    assert list(rows) == ["student", "student FT", "student KD"]
    assert all(value is not None for values in rows.values() for value in values)
    assert "| published: GPT-2 (124M) |  | 0.2859 | 0.2955 |" in (folder / "report" / "report.md").read_text()


def test_system_003_ends_with_its_table_of_methods(run, tmp_path: Path) -> None:
    interrupted = tmp_path / "run" / "classifiers" / "cola" / "metrics.jsonl"
    interrupted.parent.mkdir(parents=True)
    interrupted.write_text('{"step": 1}\n')  # a classifier's training begins again
    folder = run("glue-merging")
    assert '{"step": 1}' not in interrupted.read_text()
    text = (folder / "report" / "report.md").read_text()
    section = text.partition("## Methods\n")[2].partition("\n## ")[0]
    labels = [line.split("|")[1].strip() for line in section.splitlines() if line.startswith("| ")]
    assert [label.partition(",")[0] for label in labels if label not in ("method", ":--")] == [
        *("most frequent class", "base", "fine-tuned", "ensemble", "simple-average", "fisher", "regmean"),
        *("task-arithmetic", "ties"),
    ]
    assert "## Sweep of ties" in text


def test_system_004_scores_the_held_out_cluster_unseen(run) -> None:
    folder = run("flan")
    text = (folder / "report" / "report.md").read_text()
    assert "(unseen)" in text
    assert "(seen)" not in text
    for student in ("distilled", "finetuned"):
        assert json.loads((folder / student / "run.json").read_text())["complete"]
