"""Commands of a group that are imported on first use, so that one command does not wait for the imports of all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module
from typing import Any

import click

from kd.commands.terminal.output_options import dressed


class ListedGroup(click.Group):
    """A group whose `--help` shows a line per command from a table, so that it imports none of them."""

    def __init__(self, *arguments: Any, lines: Mapping[str, str], **options: Any) -> None:
        """`lines` maps each command's name to its line."""
        super().__init__(*arguments, **options)
        self.lines = lines

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Called by click."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self.lines[name]) for name in self.list_commands(ctx)])


class LazyCommands(MutableMapping[str, click.Command]):
    """Name -> command, for `click.Group(commands=…)`. A command given as `module:attribute` is imported on first use.

    Listing the names imports nothing.
    """

    def __init__(self, modules: Mapping[str, str]) -> None:
        """`modules` maps a name to `module:attribute`."""
        self._entries: dict[str, str | click.Command] = dict(modules)

    def __getitem__(self, name: str) -> click.Command:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = getattr(import_module(module), attribute)
            assert isinstance(entry, click.Command), f"{self._entries[name]} is not a command"
            self._entries[name] = dressed(entry)
        return entry

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._entries[name] = dressed(command)

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
