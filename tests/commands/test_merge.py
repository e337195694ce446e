"""kd merge as a command: tables, JSON, configuration files, wrong usage."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from terminal import run_kd


def test_a_sweep_prints_a_table_and_a_warning(common: list[str], tmp_path: Path) -> None:
    outcome = run_kd("merge", *common, "--method", "ties", "--sweep", "0:1:0.5", "--out", str(tmp_path / "m"))
    assert "| scaling | cola | mrpc | mnli | average |" in outcome.stdout
    assert "warning: scaling" in outcome.stderr


def test_a_merge_prints_json(common: list[str], tmp_path: Path) -> None:
    options = ["--method", "fisher", "--examples", "8", "--per-example", "--out", str(tmp_path / "f"), "--json"]
    document = json.loads(run_kd("merge", *common, *options).stdout)
    assert document["table"]["rows"]["fisher"]["average"]["accuracy"] > 0


def test_a_file_of_settings_gives_what_the_options_give(common: list[str], tmp_path: Path) -> None:
    options = ["--method", "ties", "--elect", "mean", "--threshold", "50", "--exclude", "wte", "--no-score"]
    run_kd("merge", *common, *options, "--out", str(tmp_path / "a"))
    settings = {
        "pool": common[1],
        "method": "ties",
        "ties": {"elect": "mean", "threshold": 50},
        "exclude": ["wte"],
        "score": False,
        "device": "cpu",
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run_kd("merge", "--config", str(tmp_path / "merge.yaml"), "--out", str(tmp_path / "b"))
    names = ("a", "b")
    assert len({(tmp_path / n / "model.safetensors").read_bytes() for n in names}) == 1
    saved = [json.loads((tmp_path / n / "merge.json").read_text(encoding="utf-8"))["settings"] for n in names]
    assert saved[0] == saved[1]


@pytest.mark.parametrize(
    ("option", "value"), [("--method", "tise"), ("--sweep", "0:1"), ("--limit", "0"), ("--select-on", "test")]
)
def test_a_value_that_cannot_be_is_wrong_usage(option: str, value: str) -> None:
    run_kd("merge", "--method", "ties", "--pool", "x", "--out", "y", option, value, code=2)


@pytest.mark.parametrize("command", ["merge", "classify train", "classify eval", "classify matrix"])
def test_help_needs_no_torch(command: str) -> None:
    script = (
        "import sys, kd.cli; from click.testing import CliRunner; "
        f"r = CliRunner().invoke(kd.cli.cli, {[*command.split(), '--help']!r}); "
        "print(r.exit_code, sorted({'torch', 'transformers', 'zarr', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0 []"
