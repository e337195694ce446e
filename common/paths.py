"""The one place where text becomes a path: the home folder is spelled out, and the address of another machine is refused.

A shell expands `~` at the beginning of a word alone: in `--out=~/runs`, in YAML and in Python it arrives as it was typed. Options,
settings, files and functions that take a path as text all use these functions; a test looks for others.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from kd.common.errors import DataError

ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""The beginning of an address. `Path` leaves one slash of two."""

MAX_NAME = 255
"""Most bytes of a file's name on the usual file systems."""


def as_path(text: str | os.PathLike[str]) -> Path:
    """The path that a text names if it names one: it may also be a hub id, a fingerprint or an address."""
    return Path(os.path.expanduser(text))


def path_of(text: str | os.PathLike[str]) -> Path:
    """The path on this machine that a text names. Raises DataError for an address, such as s3://bucket/key."""
    if ADDRESS.match(os.fspath(text)):
        raise DataError(
            "this is an address, and a path on this machine is wanted",
            found=os.fspath(text),
            try_="a path; kd cache push copies a finished cache to an address, kd cache pull from one",
        )
    return as_path(text)


def cache_folder(text: str | os.PathLike[str]) -> Path:
    """The path of a cache that must be on this machine. Raises DataError for an address, which says how to fetch the cache."""
    if ADDRESS.match(os.fspath(text)):
        raise DataError(
            "this is an address, and the folder of a cache is wanted",
            found=os.fspath(text),
            try_=f"kd cache pull {os.fspath(text)} FOLDER, then this command with FOLDER",
        )
    return as_path(text)


class StoreAddress(str):
    """The address of a folder in an object store, `s3://BUCKET/PATH`, where a cache can be built."""


def store_address(text: str) -> StoreAddress | None:
    """The address in an object store that a text is; None for any other text."""
    return StoreAddress(text.rstrip("/")) if re.fullmatch(r"s3://[^/]+/[^/](?:/?[^/])*/?", text) else None


def build_output(text: str) -> Path | StoreAddress:
    """Where a cache is to be built: a folder, or an address in an object store. Raises DataError for any other address."""
    address = store_address(text)
    if address is not None:
        return address
    if ADDRESS.match(text):
        raise DataError(
            "a cache cannot be built at this address",
            found=text,
            expected="a folder, or s3://BUCKET/PATH",
            try_="build into a folder, then kd cache push FOLDER ADDRESS",
        )
    return output_folder(text)


def output_folder(text: str | os.PathLike[str]) -> Path:
    """The path of a folder that is to be written, which may not exist yet. Raises DataError where it cannot be a folder."""
    path = path_of(text)
    if max(map(len, map(os.fsencode, path.parts)), default=0) > MAX_NAME:
        raise DataError(
            "the name of a folder is too long", found=f"{str(path)[:60]}…", expected=f"at most {MAX_NAME} bytes"
        )
    for parent in (path, *path.parents):
        if os.path.isdir(parent):
            return path
        if os.path.lexists(parent):
            raise DataError(
                "the output is not a directory",
                where=path,
                found=f"{parent} is a {'link that leads nowhere' if parent.is_symlink() else 'file'}",
                expected="a new directory, or one that this command has written",
                try_="another --out",
            )
    return path
