"""Text becomes a path of this machine, or an error."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from kd.commands.terminal.options import PATH
from kd.commands.terminal.settings_options import settings_options
from kd.common.errors import DataError
from kd.common.paths import as_path, cache_folder, output_folder, path_of
from kd.common.settings import make

REPOSITORY = Path(__file__).parents[2]


def test_the_home_folder_is_spelled_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert path_of("~/runs") == path_of(Path("~/runs")) == tmp_path / "runs"
    assert output_folder("~/runs") == tmp_path / "runs"


@pytest.mark.parametrize("text", ["s3://bucket/key", "https://host/x", "hf://datasets/a/b", Path("s3://bucket")])
def test_an_address_is_no_path(text: str | Path) -> None:
    with pytest.raises(DataError, match="this is an address"):
        path_of(text)


@pytest.mark.parametrize("text", ["s3://bucket/key", "https://host/x", "hf://datasets/a/b"])
def test_a_cache_at_an_address_is_to_be_pulled_first(text: str) -> None:
    with pytest.raises(DataError, match="the folder of a cache is wanted") as caught:
        cache_folder(text)
    assert caught.value.details["try"] == f"kd cache pull {text} FOLDER, then this command with FOLDER"


def test_names_with_colons_are_paths() -> None:
    assert [str(path_of(t)) for t in ("a:b", "C:x", "./s3:/x", "12:30")] == ["a:b", "C:x", "s3:/x", "12:30"]


def test_a_folder_may_be_new_at_any_depth_or_a_link_to_one(tmp_path: Path) -> None:
    assert output_folder(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    assert output_folder(tmp_path / "link") == tmp_path / "link"
    assert not (tmp_path / "a").exists()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_tilde_at_the_beginning_is_the_home_folder(home: Path) -> None:
    assert as_path("~/a/~b") == as_path(Path("~/a/~b")) == as_path(as_path("~/a/~b")) == home / "a" / "~b"
    assert as_path("a/~") == Path("a/~")
    assert as_path("~nobody-of-that-name/x") == Path("~nobody-of-that-name/x")


@dataclass(frozen=True)
class Folders:
    """Settings with a path."""

    out: Path
    """Where things go."""
    extra: Path | None = None
    """Where more things go."""


def test_settings_expand_paths_of_every_kind(home: Path) -> None:
    expected = Folders(home / "x", home / "y")
    assert make(Folders, {"out": "~/x", "extra": Path("~/y")}) == expected

    @click.command()
    @settings_options(Folders)
    @click.option("--plain", type=PATH)
    def command(settings: Any, plain: Path) -> None:
        assert (settings, plain) == (expected, home / "z")

    (home / "c.yaml").write_text("extra: ~/y\n")
    words = ["--out=~/x", "--config", "~/c.yaml", "--plain=~/z"]
    assert CliRunner().invoke(command, words, catch_exceptions=False).exit_code == 0


def test_text_becomes_a_path_in_one_place() -> None:
    """Whatever names a file as text goes through `kd.common.paths`; click's own type of paths is not used."""
    folders = ("cache_builder", "commands", "common", "data", "evaluation", "models", "recipes", "student_trainer")
    found = {
        path.relative_to(REPOSITORY).as_posix()
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*.py")
        if re.search(r"expanduser\(|click\.Path\(", path.read_text(encoding="utf-8"))
    }
    assert found == {"common/paths.py"}
