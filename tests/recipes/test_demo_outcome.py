"""The demo at a hundredth of its size: every part of it runs, and what it prints is what it measured."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from kd.cli import cli
from kd.common.errors import DataError
from kd.recipes import demo_outcome


def small() -> list[demo_outcome.Act]:
    prose, instructions = demo_outcome.original()  # type: ignore[attr-defined]
    return [
        dataclasses.replace(
            prose,
            build={**prose.build, "limit": 1},
            training={**prose.training, "max_steps": 2},
            evaluation={**prose.evaluation, "limit": 2},
        ),
        dataclasses.replace(
            instructions,
            build={**instructions.build, "limit": 14},
            training={**instructions.training, "max_steps": 2},
            evaluation={**instructions.evaluation, "limit": 14},
        ),
    ]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(demo_outcome, "original", demo_outcome.acts, raising=False)
    monkeypatch.setattr(demo_outcome, "acts", small)

    def go(*words: str) -> str:
        result = CliRunner().invoke(cli, ["demo", *words], catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return go


def test_both_acts_run_and_say_what_they_measured(run, tmp_path: Path):
    out = tmp_path / "demo"
    printed = run("--out", str(out))
    outcome = json.loads((out / "outcome.json").read_text())
    for name in ("teacher", "finetuned", "distilled", "t5-teacher", "t5-finetuned", "t5-distilled"):
        assert re.search(rf"\b{name}\b", printed)
        assert (out / name / "eval.json").exists()
    assert f"{outcome['perplexity']['distilled']:.2f} ±" in printed
    assert f"{outcome['exact_match']['t5-distilled']:.3f}" in printed
    assert outcome["acts"][small()[1].title]["cache"]["quantization"] == (
        "bitsandbytes-nf4-double" if small()[1].load_in_4bit else "none"
    )
    page = (out / "report" / "report.html").read_text()
    assert all(html.escape(act.title) in page or act.title in html.unescape(page) for act in small())
    with pytest.raises(DataError, match="was run here before"):
        run("--out", str(out))


def test_students_of_an_act_differ_in_the_loss_alone():
    for act in demo_outcome.acts():
        first, second = (dataclasses.asdict(c) for c in act.train_configs(Path("x")))
        assert {k for k in first if first[k] != second[k]} <= {"out", "loss", "alpha"}
        assert first["loss"] == "ce"
