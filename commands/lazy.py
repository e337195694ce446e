"""Commands of a group that are imported when they are asked for, so that one command does not pay for all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from importlib import import_module

import click


class LazyCommands(MutableMapping[str, click.Command]):
    """Name -> command, for `click.Group(commands=…)`; a command given as "module:attribute" is imported on first use.

    The names alone need no import; whoever lists the help of all commands imports all their modules.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._entries: dict[str, str | click.Command] = dict(places)

    def __getitem__(self, name: str) -> click.Command:
        entry = self._entries[name]
        if isinstance(entry, str):
            module, _, attribute = entry.partition(":")
            entry = getattr(import_module(module), attribute)
            assert isinstance(entry, click.Command), f"{self._entries[name]} is not a command"
            self._entries[name] = entry
        return entry

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._entries[name] = command

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
