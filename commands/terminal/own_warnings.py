"""Warnings of this package as plain lines on stderr; those of other libraries stay as they are.

A function of the package warns with `warnings.warn`, because a Python program wants it so. On the command line, the file and
the line of its source help nobody.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TextIO

from kd.commands.terminal.console import say

PACKAGE = Path(__file__).parents[2]


def say_own_warnings() -> None:
    """From now on, print this package's `UserWarning`s with `say`."""
    shown = warnings.showwarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if category is UserWarning and PACKAGE in Path(filename).parents:
            say(f"warning: {message}", err=True)
        else:
            shown(message, category, filename, lineno, file, line)

    warnings.showwarning = show
