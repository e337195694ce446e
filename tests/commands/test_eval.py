"""kd eval, its options and its file."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

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
