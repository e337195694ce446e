"""The demo at a hundredth of its size: every part of it runs, and what it prints is what it measured."""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from kd.cli import cli
from kd.common.errors import DataError
from kd.evaluation.report.comparison import value_with_error
from kd.evaluation.results import load_report
from kd.recipes import demo_outcome
from kd.recipes.experiment_file import Experiment, load_experiment
from kd.student_trainer.configuration.score_settings import ScoreSettings
from kd.student_trainer.configuration.train_config import TrainConfig


def small(name: str) -> Experiment:
    """The demo's experiment of this name, on a few examples and for two steps."""
    chosen = load_experiment(name)
    return dataclasses.replace(
        chosen,
        seeds=(0,),
        cache={**chosen.cache, "limit": 1},
        train={**chosen.train, "max-steps": 2},
        evaluations=tuple({**options, "limit": 2} for options in chosen.evaluations),
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.setattr(demo_outcome, "load_experiment", small)

    def go(*words: str) -> str:
        result = CliRunner().invoke(cli, ["demo", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return go


def test_both_parts_run_and_say_what_they_measured(run: Callable[..., str], tmp_path: Path) -> None:
    out = tmp_path / "demo"
    printed = run("--out", str(out))
    outcome = json.loads((out / "outcome.json").read_text())
    for name in ("finetuned", "distilled", "text-finetuned", "text-distilled"):
        assert (out / f"{name}-seed0" / "eval.json").exists()
    parts = [load_experiment(name) for name in demo_outcome.NAMES]
    assert list(outcome["acts"]) == sorted(part.about for part in parts)
    prose, other = (outcome["acts"][part.about] for part in parts)
    score = load_report(out / "distilled-seed0").tasks["perplexity"]["perplexity"]["value"]
    assert prose["scores"]["distilled"]["perplexity"]["value"] == pytest.approx(score)
    for part, act in ((parts[0], prose), (parts[1], other)):
        title, line = next(iter(next(iter(act["differences"].values())).items()))
        assert part.about in printed
        assert f"{value_with_error(line['difference'], line['error'], signed=True)}  {line['verdict']}" in printed, (
            title
        )
    page = html.unescape((out / "report" / "report.html").read_text())
    assert all(part.about in page for part in parts)
    assert "text-distilled against text-finetuned" in page
    assert "held out: perplexity" in (out / "distilled-seed0" / "README.md").read_text()
    with pytest.raises(DataError, match="was run here before"):
        run("--out", str(out))


def test_students_of_a_part_differ_in_the_loss_alone() -> None:
    for part in demo_outcome.demo_parts(Path("x")):
        trainings = [step for step in part.steps if step.command == "train"]
        first, second = (step.setting(TrainConfig).saved() for step in trainings[:2])
        assert {name for name in first if first[name] != second[name]} <= {"out", "loss"}
        assert first["loss"] == "ce"
        assert first["device"] == "cpu"
        assert all(step.setting(ScoreSettings) == ScoreSettings() for step in trainings)
