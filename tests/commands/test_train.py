"""kd train: what signals do, what is wrong usage, and what its settings mean."""

from __future__ import annotations

import os
import signal
import sys

import pytest
from click.testing import CliRunner

from kd.commands.terminal.settings_options import take_settings
from kd.commands.train import TrainCommand, run_training, stop_on_signals, train
from kd.common.settings import make
from kd.student_trainer.configuration.train_config import TrainConfig


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_interrupts(number: signal.Signals, capsys: pytest.CaptureFixture[str]):
    before = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
        assert "once more stops at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


NEEDED = ("--cache", "c", "--student", "s", "--out", "o")


@pytest.mark.parametrize(
    "words",
    [
        ("--loss", "klx"),
        ("--tail", "x"),
        ("--optimizer", "x"),
        ("--device", "cuda:1"),
        ("--temperature", "0"),
        ("--cache-bytes", "much"),
        ("--eval-every", "0"),
        ("--eval-every", "x"),
        ("--eval-protocol", "x"),
        ("--eval-limit", "0"),
    ],
)
def test_values_that_mean_nothing_are_wrong_usage_before_any_work(words: tuple[str, str]) -> None:
    result = CliRunner().invoke(train, [*NEEDED, *words])
    assert result.exit_code == 2
    assert f"Invalid value for '{words[0]}'" in result.output


def settings_of_words(*words: str) -> TrainCommand:
    """The settings that these words stand for."""
    return take_settings(TrainCommand, dict(train.make_context("train", [*NEEDED, *words]).params))


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ((), {}),
        (("--separator", "\\n"), {"separator": "\n"}),
        (("--eval-tasks", "perplexity, choices"), {"eval_tasks": ("perplexity", "choices")}),
        (("--eval-every", "5"), {"eval_every": 5}),
        (("--no-align-eos", "--packing"), {"align_eos": False, "packing": True}),
        (("--cache-bytes", "20GB"), {"cache_bytes": 20 * 10**9}),
    ],
)
def test_options_mean_what_python_and_files_say(words: tuple[str, ...], values: dict[str, object]) -> None:
    assert settings_of_words(*words) == make(TrainCommand, {"cache": "c", "student": "s", "out": "o"} | values)


def test_several_caches_make_a_mixture() -> None:
    words = ("--cache", "a=0.7", "--cache", "b=0.3", "--student", "s", "--out", "o")
    settings = take_settings(TrainCommand, dict(train.make_context("train", [*words]).params))
    assert settings.training.saved()["cache"] == "a=0.7,b=0.3"


@pytest.mark.parametrize(
    ("words", "tasks", "steps"),
    [
        ((), (), None),
        (("--eval-data", "demo"), ("perplexity",), None),
        (("--eval-tasks", "agreement", "--eval-every", "7"), ("agreement",), 7),
        (("--eval-data", "demo", "--eval-tasks", "choices"), ("choices",), None),
    ],
)
def test_what_is_scored_and_when_follows_from_the_options(
    words: tuple[str, ...], tasks: tuple[str, ...], steps: int | None
) -> None:
    scores = settings_of_words(*words).scores
    assert (scores.tasks, scores.steps_between) == (tasks, steps)


def test_what_a_library_prints_during_a_training_is_no_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kd.student_trainer.training.train", lambda config, **rest: sys.stdout.write("hello"))
    run_training(make(TrainConfig, {"cache": "cache", "student": "demo", "out": "out"}))
    assert capsys.readouterr().out == ""
