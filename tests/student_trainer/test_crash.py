"""A run that is killed anywhere continues to the weights of one that was not."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path

import pytest
from crashing import child, dies_at, operations, some_of, watch
from safetensors.torch import load_file

from kd.common.settings import make
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.training import train


@pytest.fixture
def settings(tmp_path: Path, kl_cache: Path, make_student):
    """Six steps with dropout, a checkpoint after every second."""
    student = str(make_student(dropout=0.1))

    def of_name(name: str) -> TrainConfig:
        values = {"cache": kl_cache, "student": student, "out": tmp_path / name, "device": "cpu"}
        steps = {"max_steps": 6, "save_every": 2, "batch_size": 2, "log_every": 1}
        return make(TrainConfig, values | steps)

    return of_name


def kill_at_operations(tmp_path: Path, settings, few: int | None) -> None:
    total = operations(partial(train, settings("whole")), tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert total > 20
    for number in some_of(total, few):
        out = tmp_path / f"k{number}"

        def doomed(out: Path = out, number: int = number) -> None:
            watch(out, dies_at(number))
            train(settings(out.name))

        assert child(doomed)[0] == -signal.SIGKILL, number
        code, text = child(partial(train, settings(out.name), resume=True, say=lambda sentence: None))
        assert code == 0 or "is finished" in text, (number, text)
        found = load_file(out / "model.safetensors")
        assert found.keys() == whole.keys()
        assert all((found[name] == whole[name]).all() for name in whole), number
        assert not list(out.glob(".*"))


def test_a_killed_run_continues_to_the_same_weights(tmp_path, settings):
    kill_at_operations(tmp_path, settings, few=3)


@pytest.mark.slow
def test_killed_everywhere(tmp_path, settings):
    kill_at_operations(tmp_path, settings, few=None)
