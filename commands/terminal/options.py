"""What several commands share besides settings: `--json`, paths, and ranges of examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Function = TypeVar("Function", bound=Callable[..., Any])
PATH = click.Path(path_type=Path)

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def parse_range(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`A:B` as numbers. Raises click.BadParameter."""
    if value is None:
        return None
    first, sign, stop = value.partition(":")
    if not (sign and first.isdigit() and stop.isdigit()):
        raise click.BadParameter("expected A:B, e.g. 0:1000")
    return int(first), int(stop)
