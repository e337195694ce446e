"""A step is one command: as it would be typed, and as the settings that it runs with."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from kd.cache_builder.build.build_settings import BuildSettings
from kd.cli import cli
from kd.common.errors import DataError
from kd.common.setting_fields import settings_of
from kd.recipes.steps import STEP_KINDS, Step
from kd.student_trainer.configuration.score_settings import ScoreSettings
from kd.student_trainer.configuration.train_config import TrainConfig

BUILD: dict[str, str | bool] = {
    "teacher": "demo",
    "data": "demo",
    "out": "x",
    "temperatures": "1,2",
    "load-in-4bit": True,
    "bos": False,
}


def test_words_and_settings_say_the_same() -> None:
    step = Step("cache build", BUILD)
    assert step.words == [
        *("cache", "build", "--teacher", "demo", "--data", "demo", "--out", "x"),
        *("--temperatures", "1,2", "--load-in-4bit", "--no-bos"),
    ]
    settings = step.setting(BuildSettings)
    assert (settings.data.spec, settings.kept.temperatures, settings.blocks.bos) == ("demo", (1.0, 2.0), False)
    assert settings.model.load_in_4bit
    assert step.out == Path("x")
    assert step.given["spec"] == "demo"
    assert step.given["bos"] is False


def test_options_of_one_command_may_belong_to_several_classes() -> None:
    step = Step("train", {"cache": "c", "student": "demo", "out": "x", "lr": "0.1", "eval-data": "mini"})
    assert step.setting(TrainConfig).optimization.lr == 0.1
    assert step.setting(ScoreSettings).eval_data == "mini"


def test_options_override_the_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("student: demo\nlr: 0.5\nmax_steps: 7\neval-limit: 3\n")
    step = Step("train", {"cache": "c", "out": "x", "config": str(tmp_path / "c.yaml"), "lr": "0.1"})
    config = step.setting(TrainConfig)
    assert (config.model.student, config.optimization.lr, config.batches.max_steps) == ("demo", 0.1, 7)
    assert step.setting(ScoreSettings).eval_limit == 3


@pytest.mark.parametrize(
    ("command", "options", "nearest"),
    [
        ("cache build", {**BUILD, "sequence-len": "3"}, "seq-len"),
        ("train", {"cache": "c", "student": "demo", "out": "x", "evel-data": "mini"}, "eval-data"),
        ("eval", {"task": "perplexity"}, "tasks"),
        ("report", {"out": "x", "base-line": "a"}, "baseline"),
    ],
)
def test_an_unknown_option_suggests_the_nearest(command: str, options: dict[str, str | bool], nearest: str) -> None:
    with pytest.raises(DataError, match="unknown option") as caught:
        _ = Step(command, options, where="mine").settings
    assert caught.value.details["did you mean"] == nearest
    assert caught.value.details["where"] == f"mine: kd {command}"


@pytest.mark.parametrize("name", STEP_KINDS)
def test_a_step_accepts_every_option_of_its_command(name: str) -> None:
    command: click.Command = cli
    for word in name.split():
        assert isinstance(command, click.Group)
        command = command.commands[word]
    kind = STEP_KINDS[name]
    options = {one.option for cls in kind.classes() for one in settings_of(cls).values() if not one.hidden}
    options |= {f"--{plain}" for plain in (*kind.plain, "config")}
    typed = {p.opts[0] for p in command.params if isinstance(p, click.Option) and not p.hidden} - {
        "--json",
        "--help",
        "--estimate",
        "--dry-run",
    }
    assert typed <= options
    assert options - {"--config"} <= typed
