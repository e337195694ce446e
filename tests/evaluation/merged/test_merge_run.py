"""kd merge from pool to table: sweeps, what is chosen and on which rows, files that load, the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from kd.common.errors import DataError
from kd.common.settings import make
from kd.evaluation.merged.glue_scores import (
    BackboneScores,
    TaskHead,
    load_backbone,
    load_heads,
    score_backbone,
)
from kd.evaluation.merged.merge_run import MergeResult, merge_pool, row_sampler
from kd.evaluation.merged.merged_settings import GlueRowSettings, MergeRun
from kd.student_trainer.merging.merge_settings import FISHER_ROWS, GRAM_ROWS
from kd.student_trainer.merging.method_registry import MERGE_METHODS
from kd.student_trainer.merging.pool import ModelPool, PoolModel


@pytest.fixture
def heads(gpt2_pool: ModelPool, glue_root: Path) -> list[TaskHead]:
    return load_heads(gpt2_pool, GlueRowSettings(glue_root, max_length=64, device="cpu"))


def merge_run(pool: ModelPool, out: Path, **settings: Any) -> MergeRun:
    return make(MergeRun, {"pool": pool.file, "out": out, "device": "cpu", "max_length": 64, **settings})


def merged(
    pool: ModelPool, method: str, out: Path, heads: list[TaskHead], load_rows: Any = None, **settings: Any
) -> MergeResult:
    run = merge_run(pool, out, method=method, **settings)
    steps = list(merge_pool(pool, run, heads=heads, load_rows=load_rows))
    assert [s.done for s in steps] == sorted(s.done for s in steps)
    assert steps[-1].done == steps[-1].total
    result = steps[-1].result
    assert result is not None
    return result


def backbone_scores(model: PoolModel, heads: list[TaskHead]) -> BackboneScores:
    return score_backbone(load_backbone(model, "cpu"), heads, tokens_per_batch=4096)


def test_a_sweep_writes_every_point_and_the_model_of_the_best(
    gpt2_pool: ModelPool, heads: list[Any], tmp_path: Path
) -> None:
    sweep = (0.0, 0.5, 1.0)
    result = merged(gpt2_pool, "task-arithmetic", tmp_path / "m", heads, sweep=sweep)
    assert result.table is not None
    assert list(result.table.rows) == ["0", "0.5", "1"]
    assert result.scaling == float(result.table.best)
    assert result.warning is not None
    assert "chosen on the rows it is scored on" in result.warning
    for scaling in sweep:
        report = json.loads((tmp_path / "m" / f"task-arithmetic_scaling_factor_{scaling:g}.json").read_text())
        assert set(report) == {"cola", "mrpc", "mnli", "average"}
        assert {"accuracy", "loss"} <= set(report["cola"])
    single = merged(gpt2_pool, "task-arithmetic", tmp_path / "one", heads, scaling=result.scaling)
    assert single.warning is None
    assert single.table is not None
    assert single.table.rows["task-arithmetic"] == result.table.rows[result.table.best]
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "one"))
    assert all(np.array_equal(left[k], right[k]) for k in left)
    assert (tmp_path / "m" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    again = backbone_scores(PoolModel("merged", str(tmp_path / "m")), heads)
    assert {t: s.whole for t, s in again.items()} == result.table.rows[result.table.best]
    assert not list((tmp_path / "m").glob(".*"))


def test_scaling_zero_of_a_sweep_is_the_base_under_every_head(
    gpt2_pool: ModelPool, heads: list[Any], tmp_path: Path
) -> None:
    assert gpt2_pool.base is not None
    base = backbone_scores(gpt2_pool.base, heads)
    for method in ("task-arithmetic", "ties"):
        result = merged(gpt2_pool, method, tmp_path / method, heads, sweep=(0.0, 0.3))
        assert result.table is not None
        assert result.table.rows["0"] == {task: scores.whole for task, scores in base.items()}


def test_dev_half_chooses_on_even_rows_and_scores_on_odd_ones(
    gpt2_pool: ModelPool, heads: list[Any], tmp_path: Path
) -> None:
    sweep = (0.0, 0.4, 0.8)
    result = merged(gpt2_pool, "ties", tmp_path / "m", heads, sweep=sweep, select_on="dev-half")
    assert result.warning is None
    assert result.table is not None
    assert result.even is not None
    assert result.odd is not None
    best = result.even.best
    assert result.scaling == float(best)
    assert list(result.odd.rows) == [best]
    assert [t.rows[best]["cola"]["accuracy"].n for t in (result.table, result.even, result.odd)] == [20, 10, 10]
    model = PoolModel("merged", str(tmp_path / "m"))
    for table, numbers in ((result.table, range(20)), (result.even, range(0, 20, 2)), (result.odd, range(1, 20, 2))):
        part = [replace(h, rows=h.rows.take(numbers)) for h in heads]
        for task, scores in backbone_scores(model, part).items():
            assert scores.whole["accuracy"] == table.rows[best][task]["accuracy"]


def test_classifiers_carry_the_merged_backbone_and_their_own_head(
    gpt2_pool: ModelPool, heads: list[Any], tmp_path: Path
) -> None:
    merged(gpt2_pool, "simple-average", tmp_path / "m", heads, classifiers=True)
    for model in gpt2_pool.models:
        saved = load_file(tmp_path / "m" / "classifiers" / model.name / "model.safetensors")
        original = load_file(Path(model.path) / "model.safetensors")
        backbone = load_file(tmp_path / "m" / "model.safetensors")
        assert np.array_equal(saved["score.weight"], original["score.weight"])
        assert np.array_equal(saved["transformer.wte.weight"], backbone["wte.weight"])


@pytest.mark.parametrize("method", MERGE_METHODS)
def test_every_method_runs_to_a_table(
    gpt2_pool: ModelPool, glue_root: Path, heads: list[Any], tmp_path: Path, method: str
) -> None:
    settings = {"examples": 8, "batch_size": 4, "task_root": glue_root}
    run = merge_run(gpt2_pool, tmp_path / "m", method=method, **settings)
    load_rows = row_sampler(run, classifiers=True)
    result = merged(gpt2_pool, method, tmp_path / "m", heads, load_rows, **settings)
    assert result.table is not None
    assert list(result.table.rows) == [method]
    assert (result.parameters is None) == MERGE_METHODS[method].live
    assert (tmp_path / "m" / "model.safetensors").exists() != MERGE_METHODS[method].live
    document = json.loads((tmp_path / "m" / "merge.json").read_text())
    assert document["settings"]["method"] == method


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "fisher", "sweep": (0.1,)}, "no scaling to sweep"),
        ({"method": "fisher", "scaling": 0.3}, "no scaling"),
        ({"method": "ties", "select_on": "dev-half"}, "nothing to choose"),
        ({"method": "ties", "select_on": "test", "sweep": (0.1,)}, "unknown select on"),
        ({"method": "fisher"}, "training rows"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(
    gpt2_pool: ModelPool, heads: list[Any], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        merged(gpt2_pool, out=tmp_path / "m", heads=heads, **settings)


@pytest.mark.parametrize("settings", [{"method": "ties", "sweep": (0.1,)}, {"method": "ensemble"}])
def test_a_sweep_and_an_ensemble_need_tasks_to_score(
    gpt2_pool: ModelPool, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match="nothing to score"):
        merged(gpt2_pool, out=tmp_path / "m", heads=[], **settings)


def test_a_folder_with_something_in_it_is_left_alone(gpt2_pool: ModelPool, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").touch()
    with pytest.raises(DataError, match="not empty"):
        merged(gpt2_pool, "simple-average", tmp_path / "m", [])


def test_each_statistic_has_its_own_rows(gpt2_pool: ModelPool, tmp_path: Path) -> None:
    def sampled(method: str, **settings: Any) -> tuple[int, int, int | None] | None:
        sampler = row_sampler(merge_run(gpt2_pool, tmp_path, method=method, **settings), classifiers=True)
        return None if sampler is None else (sampler.examples, sampler.batch_size, sampler.pad_to)

    assert sampled("ties") is None
    assert sampled("fisher") == (FISHER_ROWS.examples, FISHER_ROWS.batch_size, None)
    assert sampled("regmean") == (GRAM_ROWS.examples, GRAM_ROWS.batch_size, 64)
    assert sampled("regmean", mask_pads=True) == (GRAM_ROWS.examples, GRAM_ROWS.batch_size, None)
    assert sampled("fisher", per_example=True, batch_size=4, examples=9) == (9, 1, None)
    assert sampled("regmean", per_example=True, batch_size=4) == (GRAM_ROWS.examples, 4, 64)
