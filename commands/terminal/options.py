"""What several commands share besides settings: `--json`, paths, and ranges of examples."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from kd.common.paths import StoreAddress, cache_folder, output_folder, path_of, store_address

Function = TypeVar("Function", bound=Callable[..., Any])


class LocalPath(click.ParamType[Path]):
    """A path on this machine; `folder` for one that the command writes. Addresses of other machines are refused."""

    name = "path"

    def __init__(self, *, folder: bool = False) -> None:
        self.folder = folder

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Called by click. Raises DataError."""
        return output_folder(value) if self.folder else path_of(value)


class CachePath(click.ParamType[Path]):
    """The path of a cache that must be on this machine."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """Called by click. Raises DataError."""
        return cache_folder(value)


class BuildPlace(click.ParamType[Path | StoreAddress]):
    """Where a cache is built: a path on this machine, or an address in an object store."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | StoreAddress:
        """Called by click. Raises DataError."""
        address = store_address(str(value))
        return path_of(value) if address is None else address


PATH, FOLDER, PLACE, CACHE = LocalPath(), LocalPath(folder=True), BuildPlace(), CachePath()

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")

dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Print what would be written, and how large it is. Nothing is written."
)


def parse_range(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, int] | None:
    """`A:B` as numbers. Raises click.BadParameter."""
    if value is None:
        return None
    first, sign, stop = value.partition(":")
    if not (sign and first.isdigit() and stop.isdigit()):
        raise click.BadParameter("expected A:B, e.g. 0:1000")
    return int(first), int(stop)
