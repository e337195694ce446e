"""Steps run in order; what is finished is skipped, and what cannot be used is refused before the first step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.recipes.run_steps import is_begun, is_finished, run_steps
from kd.recipes.steps import Step


def steps(folder: Path) -> list[Step]:
    return [
        Step("train", {"cache": "c", "student": "demo", "out": str(folder / "run")}),
        Step("eval", {"data": "demo", "out": str(folder / "run" / "eval")}, (str(folder / "run"),)),
        Step("report", {"out": str(folder / "report")}, (str(folder / "run"),)),
    ]


def test_finished_steps_are_skipped(tmp_path: Path) -> None:
    runners = {command: lambda step: step.command for command in ("train", "eval", "report")}
    lines: list[str] = []
    assert run_steps(steps(tmp_path), runners, say=lines.append) == ["train", "eval", "report"]
    assert lines[2] == f"3/3  kd report {tmp_path}/run --out {tmp_path}/report"
    (tmp_path / "run" / "eval").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(json.dumps({"complete": False}))
    (tmp_path / "run" / "eval" / "eval.json").write_text("{}")
    assert is_begun(steps(tmp_path)[0])
    assert run_steps(steps(tmp_path), runners, keep_scores=True) == ["train", None, "report"]
    (tmp_path / "run" / "run.json").write_text(json.dumps({"complete": True}))
    assert run_steps(steps(tmp_path), runners, keep_scores=True) == [None, None, "report"]
    assert run_steps(steps(tmp_path), runners) == [None, "eval", "report"]  # a recipe may score with other options now
    assert not is_finished(steps(tmp_path)[2])


def test_classifiers_and_merges_are_made_once_and_scored_again(tmp_path: Path) -> None:
    options = {"pool": str(tmp_path), "out": str(tmp_path / "o")}
    made = [
        (Step("classify train", {"task": "rte", "model": "demo", "out": str(tmp_path / "rte")}), "classify.json", True),
        (Step("merge", options | {"method": "ties"}), "merge.json", True),
        (Step("classify matrix", options | {"out": str(tmp_path / "m")}), "matrix.json", False),
    ]
    for step, last, once in made:
        step.out.mkdir(parents=True)
        (step.out / "other.json").write_text("{}")
        runners = {step.command: lambda step: "ran"}
        assert run_steps([step], runners) == ["ran"]  # what was interrupted is begun again
        (step.out / last).write_text("{}")
        assert run_steps([step], runners) == ([None] if once else ["ran"])
        assert run_steps([step], runners, keep_scores=True) == [None]


def test_a_wrong_last_step_is_refused_before_the_first_runs(tmp_path: Path) -> None:
    wrong = Step("eval", {"tasks": "perplexity", "out": str(tmp_path)}, ("demo",))  # perplexity without a text
    with pytest.raises(DataError):
        run_steps([*steps(tmp_path), wrong], {}, say=lambda line: pytest.fail(line))
    typo = Step("report", {"out": "x", "basline": "a"})
    with pytest.raises(DataError, match="did you mean  baseline"):
        run_steps([*steps(tmp_path), typo], {}, say=lambda line: pytest.fail(line))


def test_an_interrupted_step_does_not_say_how_it_alone_continues(tmp_path: Path) -> None:
    def stop(step: Step) -> None:
        raise KeyboardInterrupt("stopped", "the same command with --resume continues")

    with pytest.raises(KeyboardInterrupt) as caught:
        run_steps(steps(tmp_path), {"train": stop})
    assert caught.value.args == ()
