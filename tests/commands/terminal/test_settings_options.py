"""Options made from settings: one for each, refused before any work, and a file of them that options override."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner, Result

from kd.commands.terminal.settings_options import GIVEN, RecordingCommand, settings_options, take_settings
from kd.common.byte_sizes import byte_count
from kd.common.errors import DataError
from kd.common.setting_fields import settings_of
from kd.common.settings import flat, make, setting


@dataclass(frozen=True)
class Inner:
    """Settings in a group."""

    rate: float = setting(5e-4, above=0)
    """Learning rate."""
    decay: float = setting(0.1, minimum=0)
    """Decay."""
    mode: Literal["slow", "fast"] = "slow"
    """How fast it goes."""
    weights: tuple[float, ...] = (1.0, 2.0)
    """Weights of the parts."""
    names: tuple[str, ...] = setting((), multiple=True, metavar="NAME")
    """Names; may be repeated."""
    size: int | None = setting(None, parse=byte_count, metavar="SIZE", shown="all of it")
    """Bytes that are kept."""
    folder: Path | None = None
    """Where things lie."""
    careful: bool = True
    """Whether to look twice."""
    quick: bool = False
    """Whether to hurry."""
    secret: int = setting(3, hidden=True)
    """Not an option."""


@dataclass(frozen=True)
class Outer:
    """The outermost class."""

    spec: str = setting(flag="--data")
    """Source of the text."""
    steps: int = setting(10, minimum=1)
    """Number of steps."""
    inner: Inner = field(default_factory=Inner)


def run(
    *words: str, cls: type = Outer, kind: type[click.Command] = click.Command, **options: Any
) -> tuple[Any, Result]:
    """What a command with these options was called with, and how it ended."""
    made: list[Any] = []

    @click.command(cls=kind)
    @settings_options(cls, **options)
    @click.option("--more", default="m")
    def command(settings: Any, more: str) -> None:
        made.append((settings, more, click.get_current_context().meta.get(GIVEN)))

    result = CliRunner().invoke(command, words)
    return (made[0] if made else None), result


def settings(*words: str, **options: Any) -> Any:
    made, result = run(*words, **options)
    assert result.exit_code == 0, result.output
    return made[0]


def file_of(tmp_path: Path, text: str) -> str:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    return str(path)


def test_every_setting_of_a_class_has_an_option_with_its_help_and_default() -> None:
    _, result = run("--help")
    text = " ".join(result.output.split())
    for one in settings_of(Outer).values():
        assert (f" {one.option}" in text) is not one.hidden
        if not one.hidden:
            assert one.doc.rstrip(".") in text
    for default in ("[default: 10]", "[default: 0.0005]", "[default: slow]", "[default: 1,2]", "[default: all of it]"):
        assert default in text
    assert "Source of the text. [required]" in text
    assert "[slow|fast]" in text


def test_without_options_every_setting_has_its_default() -> None:
    made, _ = run("--data", "d")
    assert made == (make(Outer, {"spec": "d"}), "m", None)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--steps", "3"], "steps", 3),
        (["--rate", "5e-3"], "rate", 5e-3),
        (["--decay", "0"], "decay", 0.0),
        (["--mode", "fast"], "mode", "fast"),
        (["--weights", "1,2.5"], "weights", (1.0, 2.5)),
        (["--names", "a", "--names", "b"], "names", ("a", "b")),
        (["--size", "20GB"], "size", 20 * 10**9),
        (["--folder", "a/b"], "folder", Path("a/b")),
        (["--no-careful"], "careful", False),
        (["--careful"], "careful", True),
        (["--quick"], "quick", True),
        (["--no-quick"], "quick", False),
    ],
)
def test_an_option_s_text_is_the_value_that_it_stands_for(words: list[str], name: str, value: Any) -> None:
    made = settings("--data", "d", *words)
    assert flat(made) == flat(make(Outer, {"spec": "d"})) | {name: value}
    assert type(flat(made)[name]) is type(value)


@pytest.mark.parametrize(
    "words",
    [
        ["--steps", "0"],
        ["--steps", "x"],
        ["--rate", "0"],
        ["--decay", "-1"],
        ["--mode", "fats"],
        ["--weights", "1,x"],
        ["--size", "much"],
        ["--secret", "3"],
        ["--step", "3"],
    ],
)
def test_what_means_nothing_is_wrong_usage(words: list[str]) -> None:
    made, result = run("--data", "d", *words)
    assert made is None
    assert result.exit_code == 2
    assert words[0] in result.output


def test_a_missing_setting_is_wrong_usage_and_named_by_its_option() -> None:
    made, result = run("--steps", "3")
    assert (made, result.exit_code) == (None, 2)
    assert "Missing option: --data" in result.output


def test_an_option_overrides_the_file_and_the_file_the_default(tmp_path: Path) -> None:
    file = file_of(tmp_path, "data: f\nsteps: 4\ninner: {rate: 5e-2, careful: false, names: [a]}\n")
    made = settings("--config", file, "--steps", "5", "--careful")
    assert made == make(Outer, {"spec": "f", "steps": 5, "rate": 0.05, "careful": True, "names": ("a",)})


def test_a_hidden_setting_may_stand_in_the_file(tmp_path: Path) -> None:
    assert settings("--data", "d", "--config", file_of(tmp_path, "secret: 7\n")).inner.secret == 7


def test_a_typo_in_the_file_suggests_the_nearest_and_names_the_file(tmp_path: Path) -> None:
    file = file_of(tmp_path, "step: 4\n")
    _, result = run("--data", "d", "--config", file)
    assert isinstance(result.exception, DataError)
    assert result.exception.details["did you mean"] == "steps"
    assert str(result.exception.details["where"]) == file


def test_settings_that_the_command_sets_have_no_option_and_no_line_in_the_file(tmp_path: Path) -> None:
    _, result = run("--data", "d", "--steps", "3", leave_out=("steps",))
    assert result.exit_code == 2
    _, result = run("--data", "d", "--config", file_of(tmp_path, "steps: 4\n"), leave_out=("steps",))
    assert isinstance(result.exception, DataError)
    assert "sets this itself" in str(result.exception)


def test_a_command_may_do_without_a_file() -> None:
    assert run("--data", "d", "--config", "x", config=False)[1].exit_code == 2


def test_options_that_are_no_settings_are_left_to_the_command() -> None:
    made, _ = run("--data", "d", "--more", "x")
    assert made[1] == "x"
    options: dict[str, Any] = {name: None for name in settings_of(Outer) if name != "secret"}
    options |= {"spec": "d", "names": (), "other": 1}
    assert take_settings(Outer, options) == make(Outer, {"spec": "d"})
    assert options == {"other": 1}


def test_what_was_typed_is_noted_and_what_the_file_said_as_one_would_type_it(tmp_path: Path) -> None:
    file = file_of(tmp_path, "weights: [1, 2.5]\nsteps: 4\n")
    made, _ = run("--data", "d", "--config", file, "--size", "1KB", "--no-careful", kind=RecordingCommand)
    noted = {"spec": "d", "config_file": file, "size": "1KB", "careful": False, "weights": "1.0,2.5", "steps": "4"}
    assert made[2] == noted
