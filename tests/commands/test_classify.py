"""kd classify as a command: tables, JSON, configuration files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from terminal import run_kd

from kd.common.errors import DataError
from kd.student_trainer.merging.pool import ModelPool


def test_a_matrix_prints_a_table_and_writes_it(common: list[str], tmp_path: Path) -> None:
    outcome = run_kd("classify", "matrix", *common, "--out", str(tmp_path / "x"))
    assert "| backbone | cola | mrpc | mnli | average |" in outcome.stdout
    assert (tmp_path / "x" / "matrix.json").is_file()


def test_an_evaluation_prints_the_metrics_of_the_task(gpt2_pool: ModelPool, common: list[str]) -> None:
    cola = gpt2_pool.models[0].path
    outcome = run_kd("classify", "eval", cola, "--task", "cola", *common[2:6], "--json")
    assert set(json.loads(outcome.stdout)[cola]["scores"]) == {"accuracy", "loss", "mcc"}


def test_a_file_of_settings_gives_what_the_options_give(
    layouts: dict[str, Path], glue_root: Path, tmp_path: Path
) -> None:
    options = {"model": str(layouts["llama"]), "data": str(glue_root / "sst2"), "max_length": 64, "max_steps": 2}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    run_kd("classify", "train", *words, "--lr", "1e-3", "--device", "cpu", "--out", str(tmp_path / "a"))
    settings = {**options, "steps": {"lr": 1e-3, "max_steps": options.pop("max_steps")}, "device": "cpu"}
    del settings["max_steps"]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    run_kd("classify", "train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "b"))
    names = ("a", "b")
    assert len({(tmp_path / n / "model.safetensors").read_bytes() for n in names}) == 1
    saved = [json.loads((tmp_path / n / "classify.json").read_text(encoding="utf-8"))["settings"] for n in names]
    assert saved[0] | {"out": ""} == saved[1] | {"out": ""}


def test_a_typo_in_a_file_suggests_the_nearest_setting(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("batch_sise: 4\n", encoding="utf-8")
    with pytest.raises(DataError, match="unknown setting") as caught:
        run_kd("classify", "train", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "b"))
    assert caught.value.details["did you mean"] == "batch_size"
