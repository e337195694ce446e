"""How much `kd` says, and where: `-q`, `-v` and `--log-file`, which go with every command and stand before or after it.

kd -q train …               errors and results alone
kd train … --log-file FILE  every line that is printed is also added to FILE, with the time
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from kd.commands.terminal.console import OUTPUT
from kd.common.paths import path_of

NAMES = ("quiet", "verbose", "log_file")
"""Names of these options. They change nothing that is stored, so no record of a command holds them."""


def output_options(*, hidden: bool) -> list[click.Option]:
    """The three options; `hidden` where the help of `kd` itself already shows them."""
    return [
        click.Option(
            ["-q", "--quiet"],
            is_flag=True,
            hidden=hidden,
            expose_value=False,
            callback=_set_quiet,
            help="Print results and errors alone: no progress and no notes.",
        ),
        click.Option(
            ["-v", "--verbose"],
            is_flag=True,
            hidden=hidden,
            expose_value=False,
            callback=_set_verbose,
            help="Keep the notes of the libraries, and print where an error was raised.",
        ),
        click.Option(
            ["--log-file"],
            metavar="FILE",
            hidden=hidden,
            expose_value=False,
            callback=_open_log,
            help="Also add every line that is printed to FILE, with the time.",
        ),
    ]


def dressed(command: click.Command) -> click.Command:
    """The command with the three options, and so are all commands below it that are there already."""
    if isinstance(command, click.Group):
        if isinstance(command.commands, dict):  # else its commands are imported one by one, and dressed then
            for below in command.commands.values():
                dressed(below)
    elif not any(parameter.name in NAMES for parameter in command.params):
        command.params += output_options(hidden=True)
    return command


def _set_quiet(_: click.Context, __: click.Parameter, value: bool) -> None:
    OUTPUT.quiet |= value


def _set_verbose(_: click.Context, __: click.Parameter, value: bool) -> None:
    OUTPUT.verbose |= value


def _open_log(_: click.Context, __: click.Parameter, value: Any) -> None:
    """Raises click.BadParameter for a file that cannot be written."""
    if value is None:
        return
    path: Path = path_of(value)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        OUTPUT.log = path.open("a", encoding="utf-8", buffering=1)
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be written: {error.strerror}") from error
