"""kd merge from pool to table: sweeps, what is chosen and on which rows, files that load, the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file

from kd.cli import cli
from kd.commands.merge import parse_sweep
from kd.common.errors import DataError
from kd.evaluation.merged.glue_scores import load_backbone, load_heads, score_backbone
from kd.evaluation.merged.sweep import MergeResult, run_merge
from kd.student_trainer.merging.merge_methods import MERGE_METHODS
from kd.student_trainer.merging.merger import MergeSettings
from kd.student_trainer.merging.pool import ModelPool, PoolModel
from kd.student_trainer.merging.training_rows import RowSampler


@pytest.fixture
def heads(gpt2_pool: ModelPool, glue_root: Path) -> list[Any]:
    return load_heads(gpt2_pool, task_root=glue_root, max_length=64, device="cpu")


def run(pool: ModelPool, settings: MergeSettings, out: Path, **options: Any) -> MergeResult:
    steps = list(run_merge(pool, settings, out, device="cpu", **options))
    assert [s.done for s in steps] == sorted(s.done for s in steps)
    assert steps[-1].done == steps[-1].total
    result = steps[-1].result
    assert result is not None
    return result


def test_a_sweep_writes_every_point_and_the_model_of_the_best(
    gpt2_pool: ModelPool, heads: list[Any], tmp_path: Path
) -> None:
    sweep = (0.0, 0.5, 1.0)
    result = run(gpt2_pool, MergeSettings("task-arithmetic"), tmp_path / "m", sweep=sweep, heads=heads)
    assert result.table is not None
    assert list(result.table.rows) == ["0", "0.5", "1"]
    assert result.scaling == float(result.table.best)
    assert result.warning is not None
    assert "chosen on the rows it is scored on" in result.warning
    for scaling in sweep:
        report = json.loads((tmp_path / "m" / f"task-arithmetic_scaling_factor_{scaling:g}.json").read_text())
        assert set(report) == {"cola", "mrpc", "mnli", "average"}
        assert {"accuracy", "loss"} <= set(report["cola"])
    single = run(gpt2_pool, MergeSettings("task-arithmetic", result.scaling), tmp_path / "one", heads=heads)
    assert single.warning is None
    assert single.table is not None
    assert single.table.rows["task-arithmetic"] == result.table.rows[result.table.best]
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "one"))
    assert all(np.array_equal(left[k], right[k]) for k in left)
    assert (tmp_path / "m" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    again = score_backbone(load_backbone(PoolModel("merged", str(tmp_path / "m")), "cpu"), heads)
    assert {t: s[0] for t, s in again.items()} == result.table.rows[result.table.best]
    assert not list((tmp_path / "m").glob(".*"))


def test_scaling_zero_of_a_sweep_is_the_base_under_every_head(
    gpt2_pool: ModelPool, heads: list[Any], tmp_path: Path
) -> None:
    assert gpt2_pool.base is not None
    base = score_backbone(load_backbone(gpt2_pool.base, "cpu"), heads)
    for method in ("task-arithmetic", "ties"):
        result = run(gpt2_pool, MergeSettings(method), tmp_path / method, sweep=(0.0, 0.3), heads=heads)
        assert result.table is not None
        assert result.table.rows["0"] == {task: scores[0] for task, scores in base.items()}


def test_dev_half_chooses_on_even_rows_and_scores_on_odd_ones(
    gpt2_pool: ModelPool, heads: list[Any], tmp_path: Path
) -> None:
    sweep = (0.0, 0.4, 0.8)
    options = {"sweep": sweep, "heads": heads, "select_on": "dev-half"}
    result = run(gpt2_pool, MergeSettings("ties"), tmp_path / "m", **options)
    assert result.warning is None
    assert result.table is not None
    assert result.even is not None
    assert result.odd is not None
    best = result.even.best
    assert result.scaling == float(best)
    assert list(result.odd.rows) == [best]
    assert [t.rows[best]["cola"]["accuracy"].n for t in (result.table, result.even, result.odd)] == [20, 10, 10]
    backbone = load_backbone(PoolModel("merged", str(tmp_path / "m")), "cpu")
    for table, numbers in ((result.table, range(20)), (result.even, range(0, 20, 2)), (result.odd, range(1, 20, 2))):
        part = [replace(h, rows=h.rows.take(numbers)) for h in heads]
        for task, scores in score_backbone(backbone, part).items():
            assert scores[0]["accuracy"] == table.rows[best][task]["accuracy"]


def test_classifiers_carry_the_merged_backbone_and_their_own_head(
    gpt2_pool: ModelPool, heads: list[Any], tmp_path: Path
) -> None:
    run(gpt2_pool, MergeSettings("simple-average"), tmp_path / "m", heads=heads, classifiers=True)
    for model in gpt2_pool.models:
        saved = load_file(tmp_path / "m" / "classifiers" / model.name / "model.safetensors")
        own = load_file(Path(model.path) / "model.safetensors")
        merged = load_file(tmp_path / "m" / "model.safetensors")
        assert np.array_equal(saved["score.weight"], own["score.weight"])
        assert np.array_equal(saved["transformer.wte.weight"], merged["wte.weight"])


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_every_method_runs_to_a_table(
    gpt2_pool: ModelPool, glue_root: Path, heads: list[Any], tmp_path: Path, method: str
) -> None:
    measure = RowSampler(classifiers=True, examples=8, batch_size=4, max_length=64, task_root=glue_root, device="cpu")
    result = run(gpt2_pool, MergeSettings(method), tmp_path / "m", heads=heads, measure=measure)
    assert result.table is not None
    assert list(result.table.rows) == [method]
    assert (result.parameters is None) == MERGE_METHODS[method].live
    assert (tmp_path / "m" / "model.safetensors").exists() != MERGE_METHODS[method].live
    document = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert document["settings"]["method"] == method


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        (MergeSettings("fisher"), {"sweep": (0.1,)}, "no scaling to sweep"),
        (MergeSettings("ties"), {"sweep": (0.1,), "heads": []}, "nothing to score"),
        (MergeSettings("ensemble"), {"heads": []}, "nothing to score"),
        (MergeSettings("ties"), {"select_on": "dev-half"}, "nothing to choose"),
        (MergeSettings("ties"), {"select_on": "test", "sweep": (0.1,)}, "unknown choice"),
        (MergeSettings("fisher"), {}, "training rows"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    gpt2_pool: ModelPool,
    heads: list[Any],
    tmp_path: Path,
    settings: MergeSettings,
    options: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(DataError, match=message):
        run(gpt2_pool, settings, tmp_path / "m", **({"heads": heads} | options))


def test_a_folder_with_something_in_it_is_left_alone(gpt2_pool: ModelPool, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").touch()
    with pytest.raises(DataError, match="not empty"):
        run(gpt2_pool, MergeSettings("simple-average"), tmp_path / "m")


def test_sweeps_are_exact_decimals() -> None:
    assert parse_sweep(None, None, "0:1:0.1") == (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # type: ignore[arg-type]
    assert parse_sweep(None, None, "0.2,0.5") == (0.2, 0.5)  # type: ignore[arg-type]
    for wrong in ("0:1", "1:0:0.1", "0:1:0", "a:b:c", "0:1:0.1:2"):
        outcome = CliRunner().invoke(cli, ["merge", "--method", "ties", "--pool", "x", "--out", "y", "--sweep", wrong])
        assert outcome.exit_code == 2, wrong


def test_the_commands_print_tables_and_json(gpt2_pool: ModelPool, glue_root: Path, tmp_path: Path) -> None:
    common = ["--pool", str(gpt2_pool.file), "--task-root", str(glue_root), "--max-length", "64", "--device", "cpu"]
    options = ["--method", "ties", "--sweep", "0:1:0.5", "--out", str(tmp_path / "m")]
    outcome = CliRunner().invoke(cli, ["merge", *common, *options], catch_exceptions=False)
    assert outcome.exit_code == 0
    assert "| scaling | cola | mrpc | mnli | average |" in outcome.stdout
    assert "warning: scaling" in outcome.stderr
    options = ["--method", "fisher", "--examples", "8", "--per-example", "--out", str(tmp_path / "f"), "--json"]
    outcome = CliRunner().invoke(cli, ["merge", *common, *options], catch_exceptions=False)
    assert json.loads(outcome.stdout)["table"]["rows"]["fisher"]["average"]["accuracy"] > 0
    outcome = CliRunner().invoke(
        cli, ["classify", "matrix", *common, "--out", str(tmp_path / "x")], catch_exceptions=False
    )
    assert "| backbone | cola | mrpc | mnli | average |" in outcome.stdout
    assert (tmp_path / "x" / "matrix.json").is_file()
    cola = gpt2_pool.models[0].path
    outcome = CliRunner().invoke(
        cli,
        ["classify", "eval", cola, "--task", "cola", "--task-root", str(glue_root), "--max-length", "64", "--json"],
        catch_exceptions=False,
    )
    assert set(json.loads(outcome.stdout)[cola]["scores"]) == {"accuracy", "loss", "mcc"}
