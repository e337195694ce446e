"""What a training will take, from its first steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.student_trainer.training_estimate import estimate_training


@pytest.fixture
def settings(kl_cache: Path, student_dir: Path) -> dict[str, object]:
    return {"cache": str(kl_cache), "student": str(student_dir), "device": "cpu", "batch_size": 2, "epochs": 3}


def test_an_estimate_knows_the_steps_of_the_run_and_keeps_nothing(
    run, settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    estimate = estimate_training(**settings, steps=4)
    assert list(tmp_path.iterdir()) == []
    trained = run(**settings, max_steps=None, log_every=100)
    assert estimate.steps == trained.result.steps > estimate.measured_steps == 4
    assert estimate.seconds == pytest.approx(estimate.seconds_per_step * estimate.steps)
    assert estimate.weights_bytes == pytest.approx(
        (trained.out / "model.safetensors").stat().st_size, rel=0.05
    )  # header
    assert estimate.memory_bytes > estimate.weights_bytes
    assert estimate.device == "cpu"


def test_a_checkpoint_is_as_large_as_estimated(run, settings) -> None:
    settings = settings | {"max_steps": 3, "epochs": 1}
    estimate = estimate_training(**settings)
    checkpoint = run(**settings, save_every=2).out / "checkpoint-2"
    size = sum((checkpoint / name).stat().st_size for name in ("model.safetensors", "optimizer.pt"))
    assert estimate.checkpoint_bytes == pytest.approx(size, rel=0.1)  # headers of two small files


def test_adapters_make_small_checkpoints(settings) -> None:
    pytest.importorskip("peft")
    whole = estimate_training(**settings | {"max_steps": 2})
    assert estimate_training(**settings | {"max_steps": 2, "lora": 2}).checkpoint_bytes < 0.2 * whole.checkpoint_bytes


def test_one_step_is_too_short_to_judge_by(settings) -> None:
    with pytest.raises(DataError, match="too short"):
        estimate_training(**settings | {"max_steps": 1})
