"""Commands by name: known without an import, imported when asked for, one at a time."""

from __future__ import annotations

import subprocess
import sys

import click
import pytest

from kd.cli import COMMANDS, LINES, cli
from kd.commands.terminal.lazy import LazyCommands


def loaded(*words: str) -> set[str]:
    """Command modules in memory after `kd WORDS --help`, in a fresh process."""
    script = (
        "import sys; from click.testing import CliRunner; from kd.cli import cli; "
        "r = CliRunner().invoke(cli, [*sys.argv[1:], '--help']); assert r.exit_code == 0, r.output; "
        "print(*(n for n in sys.modules if n.startswith('kd.commands.')))"
    )
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_one_command_imports_its_own_module_and_what_commands_share() -> None:
    shared = {
        "kd.commands.terminal",
        *(f"kd.commands.terminal.{name}" for name in ("console", "lazy", "output_options")),
    }
    assert loaded() == shared, "the help of `kd` imports no command"
    options = {f"kd.commands.terminal.{name}" for name in ("options", "settings_options")}
    assert loaded("data", "show") == shared | options | {"kd.commands.data"}


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_line_of_a_command_is_the_first_sentence_of_its_help(name: str) -> None:
    whole = " ".join((cli.commands[name].help or "").split("\n\n")[0].split())
    assert LINES[name].rstrip(".") == whole.partition(". ")[0].rstrip(".")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_command_is_called_what_the_table_calls_it(name: str) -> None:
    assert cli.commands[name].name == name


def test_names_need_no_import_and_commands_are_the_same_each_time() -> None:
    commands = LazyCommands({"gone": "kd.commands.nowhere:gone", "data": "kd.commands.data:data"})
    assert (list(commands), len(commands), "gone" in list(commands)) == (["gone", "data"], 2, True)
    assert commands["data"] is commands["data"] is cli.commands["data"]
    with pytest.raises(ModuleNotFoundError):
        commands["gone"]
    del commands["gone"]
    assert commands.get("gone") is None


def test_commands_may_be_added_as_to_any_group() -> None:
    group = click.Group("g", commands=LazyCommands({"data": "kd.commands.data:data"}))

    @group.command("mine")
    def mine() -> None: ...

    assert group.list_commands(click.Context(group)) == ["data", "mine"]
    assert group.get_command(click.Context(group), "mine") is mine
