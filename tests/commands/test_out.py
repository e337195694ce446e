"""Every command that writes a folder refuses what can be none: a file, something below a file, the address of another machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from terminal import run_main

from kd.cli import cli
from kd.common.errors import KdError


def leaves(command: click.Command, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    if not isinstance(command, click.Group):
        yield words, command
        return
    for name in command.commands:
        yield from leaves(command.commands[name], (*words, name))


def arguments(command: click.Command) -> list[str]:
    """A value for each argument that must be given."""
    return [
        str(p.type.choices[0]) if isinstance(p.type, click.Choice) else "1"
        for p in command.params
        if isinstance(p, click.Argument) and p.required
        for _ in range(max(1, p.nargs))
    ]


WRITING = {
    " ".join(words): [*words, *arguments(command), "--out"]
    for words, command in leaves(cli)
    if any("--out" in parameter.opts for parameter in command.params)
} | {"cache pull": ["cache", "pull", "1"]}


def test_these_are_the_commands_that_write_a_folder():
    assert {"cache build", "cache slice", "cache merge", "train", "eval", "report", "merge", "demo"} <= set(WRITING)
    assert {"recipe run", "experiment", "classify train", "classify matrix", "cache pull"} & set(WRITING)


@pytest.mark.parametrize("name", WRITING)
def test_what_cannot_be_a_folder_is_refused_before_any_work(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to("away")
    builds = name in ("cache build", "cache plan")  # the ones that take an object store
    address = "a cache cannot be built at this address" if builds else "this is an address"
    for place, words in (
        ("file", "the output is not a directory"),
        ("file/below", "the output is not a directory"),
        ("nowhere", "the output is not a directory"),
        ("s3://bucket" if builds else "s3://bucket/key", address),
        ("hf://datasets/a/b", address),
    ):
        error = CliRunner().invoke(cli, [*WRITING[name], place]).exception
        assert isinstance(error, KdError), (place, error)
        assert error.headline.startswith(words), place
        assert error.exit_code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "nowhere"]
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "words", [("slice", "{}", "--out", "out"), ("merge", "{}", "{}", "--out", "out"), ("repair", "{}")]
)
def test_a_cache_at_an_address_is_refused_with_the_command_that_fetches_it(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    done = run_main("cache", *(word.format("s3://bucket/key") for word in words), code=1)
    assert "kd cache pull s3://bucket/key FOLDER" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [words for words, _ in leaves(cli)], ids=" ".join)
def test_wrong_usage_of_every_command_is_a_document_with_json(words: tuple[str, ...]):
    done = run_main(*words, "--no-such-option", "--json", code=2)
    error = json.loads(done.stdout)["error"]
    assert set(error) == {"kind", "headline", "details", "exit_code"}
    assert error["exit_code"] == 2
    assert "no-such-option" in error["headline"]
