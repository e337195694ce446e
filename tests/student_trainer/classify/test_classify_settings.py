"""Settings of a classifier's training: their names, what goes together, and how they are saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest

from kd.common.errors import DataError
from kd.common.settings import changed, flat, make, saved
from kd.student_trainer.classify.classify_settings import ClassifyConfig, ClassLoss
from kd.student_trainer.losses.loss_registry import LOSSES


def test_the_losses_are_the_row_losses_of_the_registry() -> None:
    assert get_args(ClassLoss) == tuple(name for name, loss in LOSSES.items() if not loss.any_tokenizer)


def test_settings_are_saved_flat_and_read_back(tmp_path: Path) -> None:
    config = make(ClassifyConfig, {"model": "m", "out": "o", "task": "sst2", "task_root": tmp_path, "lr": 1e-3})
    document = saved(config)
    assert document["task_root"] == str(tmp_path)
    assert document.keys() == flat(config).keys()
    assert make(ClassifyConfig, document) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"task": None}, "no task was named"),
        ({"cache": "c", "data": "glue/sst2"}, "its own rows"),
        ({"cache": "c", "split": "dev"}, "its own rows"),
        ({"alpha": 0.5}, "no teacher"),
        ({"temperature": 2.0}, "no teacher"),
        ({"cache": "c", "beta": 1.0}, "out of bounds"),
        ({"batch_size": 0}, "at least 1"),
        ({"max_steps": 0}, "at least 1"),
        ({"lora": 0}, "at least 1"),
        ({"lr": 0.0}, "greater than 0"),
        ({"optimizer": "adam"}, "unknown optimizer"),
        ({"schedule": "linaer"}, "unknown schedule"),
        ({"precision": "fp16"}, "unknown precision"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    config = make(ClassifyConfig, {"model": "m", "out": "o", "task": "sst2"})
    with pytest.raises(DataError, match=message):
        changed(config, **settings)
