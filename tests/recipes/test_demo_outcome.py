"""The demo at a hundredth of its size: every part of it runs, and what it prints is what it measured."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from kd.cli import cli
from kd.common.errors import DataError
from kd.recipes import demo_outcome
from kd.recipes.experiment_file import Experiment, load_experiment
from kd.student_trainer.configuration.score_settings import ScoreSettings
from kd.student_trainer.configuration.train_config import TrainConfig


def small(name: str) -> Experiment:
    """The demo's experiment of this name, on a few examples and for two steps."""
    chosen = load_experiment(name)
    limit, scored = (1, 2) if name == "demo-prose" else (14, 14)
    return dataclasses.replace(
        chosen,
        cache={**chosen.cache, "limit": limit},
        train={**chosen.train, "max-steps": 2},
        evaluations=tuple({**options, "limit": scored} for options in chosen.evaluations),
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
    for name in ("teacher", "finetuned", "distilled", "t5-teacher", "t5-finetuned", "t5-distilled"):
        assert re.search(rf"\b{name}\b", printed)
        assert (out / name / "eval.json").exists()
    assert f"{outcome['perplexity']['distilled']:.2f} ±" in printed
    assert f"{outcome['exact_match']['t5-distilled']:.3f}" in printed
    titles = [load_experiment(name).about for name in demo_outcome.NAMES]
    assert list(outcome["acts"]) == sorted(titles)
    four_bit = demo_outcome.has_bitsandbytes()
    assert outcome["acts"][titles[1]]["cache"]["quantization"] == ("bitsandbytes-nf4-double" if four_bit else "none")
    assert ("4 bits (nf4)" in printed) == four_bit
    page = (out / "report" / "report.html").read_text()
    assert all(html.escape(title) in page or title in html.unescape(page) for title in titles)
    assert "held out: perplexity" in (out / "distilled" / "README.md").read_text()
    with pytest.raises(DataError, match="was run here before"):
        run("--out", str(out))


def test_students_of_a_part_differ_in_the_loss_alone() -> None:
    for part in demo_outcome.demo_parts(Path("x")):
        trainings = [step for step in part.steps if step.command == "train"]
        first, second = (step.setting(TrainConfig).saved() for step in trainings)
        assert {name for name in first if first[name] != second[name]} <= {"out", "loss", "alpha"}
        assert first["loss"] == "ce"
        assert first["device"] == "cpu"
        assert all(step.setting(ScoreSettings) == ScoreSettings() for step in trainings)
