"""kd eval, its options and its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from system_reports import made_up_scores, save_student
from terminal import kd

from kd.cli import cli


def test_a_file_holds_all_of_an_evaluation(tmp_path: Path) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text(f"tasks: perplexity\ndata: demo\nsplit: heldout\nlimit: 1\nout: {tmp_path / 'scores'}\n")
    done = CliRunner().invoke(cli, ["eval", "demo", "--config", str(file), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    (printed,) = json.loads(done.stdout)
    assert json.loads((tmp_path / "scores" / "eval.json").read_text())["tasks"] == printed["tasks"]


def test_an_option_overrides_the_file_and_a_typo_suggests_the_nearest_name(tmp_path: Path) -> None:
    file = tmp_path / "eval.yaml"
    file.write_text("taks: perplexity\n")
    done = CliRunner().invoke(cli, ["eval", "demo", "--config", str(file)])
    assert "tasks" in str(done.exception)
    file.write_text("tasks: nothing\ndata: demo\nsplit: heldout\n")
    done = CliRunner().invoke(cli, ["eval", "demo", "--tasks", "perplexity", "--limit", "1", "--config", str(file)])
    assert done.exit_code == 0, done.output


def test_a_report_on_a_terminal_fits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for student, quality in (("ce", 0.4), ("uld", 0.6)):
        scores = {"test": made_up_scores(3, quality, examples=8)}
        save_student(tmp_path / student, "a/tiny", student, scores, 5_000_000)
    words = ["report", tmp_path / "ce", tmp_path / "uld", "--table", "oscarnav-ten", "--out", tmp_path / "report"]
    piped = kd(*words)
    assert "| tiny KD | 5.0 |" in piped
    monkeypatch.setattr("kd.commands.eval.terminal_width", lambda: 80)
    shown = kd(*words).partition("  markdown ")[0]
    assert max(map(len, shown.splitlines())) <= 80
    assert "| :--" not in shown
    assert shown.count("tiny KD") >= 4  # a table in parts, each with the names of its rows
    table = json.loads((tmp_path / "report" / "report.json").read_text())["system"][0]["rows"][1]["values"]
    assert f"{table[-1]:.1f} ± " in shown
