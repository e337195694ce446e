"""Digests of a folder's files: `digests.json` is written last, and what it lists is whole if and only if it agrees.

    write_digests(folder)             force every file to disk, then write down its size and SHA-256
    damage_of(folder)                 what differs, in words; None for a folder that is whole
    refuse_damage(folder)             the same as an error

Checkpoints, finished runs and merged models have such a file. A folder without one says nothing about itself: models of
others have none. Writing reads every file once, about one second per gigabyte; docs/reliability.md has what that costs a run.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from kd.common.errors import DamagedFilesError, DataError
from kd.common.files import (
    canonical_json,
    read_object,
    sha256_of,
    sync_file,
    sync_folder,
    unfinished,
    write_atomic,
)

DIGESTS = "digests.json"
FORMAT, FORMAT_VERSION = "kd-digests", 1
OWN_DIGEST = "digest"
"""Key under which a JSON document holds its own digest."""


def write_digests(folder: Path, names: Iterable[str] | None = None) -> None:
    """Force files to disk, then write their sizes and digests. Raises OSError.

    names   files to list, relative to `folder`; None = every file in it and in its folders
    """
    chosen = sorted(_files(folder) if names is None else names)
    listed = {}
    for name in chosen:
        path = folder / name
        sync_file(path)
        listed[name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    for parent in sorted({(folder / name).parent for name in chosen} | {folder}):
        sync_folder(parent)
    document = {"format": FORMAT, "format_version": FORMAT_VERSION, "files": listed}
    write_atomic(folder / DIGESTS, canonical_json(with_digest(document)))


def _files(folder: Path) -> list[str]:
    files = [path for path in folder.rglob("*") if path.is_file() and not unfinished(path.name)]
    return [name for path in files if (name := path.relative_to(folder).as_posix()) != DIGESTS]


def has_digests(folder: Path) -> bool:
    """Whether the folder says what its files must be."""
    return (folder / DIGESTS).is_file()


def damage_of(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> str | None:
    """The first file that differs from what was written, in words; None where none does. `wanted` chooses names.

    Raises FileNotFoundError for a folder without digests.
    """
    try:
        document = read_object(folder / DIGESTS)
        files = {str(name): _entry(entry) for name, entry in checked_digest(document)["files"].items()}
    except (DataError, KeyError, TypeError, ValueError, AttributeError) as error:
        if not has_digests(folder):
            raise FileNotFoundError(folder / DIGESTS) from error
        return f"{DIGESTS} cannot be read"
    for name, (size, digest) in files.items():
        if wanted(name) and (reason := _difference(folder, name, size, digest)) is not None:
            return f"{name} {reason}"
    return None


def _entry(entry: Mapping[str, Any]) -> tuple[int, str]:
    return int(entry["bytes"]), str(entry["sha256"])


def _difference(folder: Path, name: str, size: int, digest: str) -> str | None:
    path = folder / name
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        return "lies outside the folder"
    if not path.is_file():
        return "is missing"
    try:
        current = path.stat().st_size
        if current != size:
            return f"has {current:,} bytes and not {size:,}"
        return None if file_sha256(path) == digest else "has other bytes than were written"
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def refuse_damage(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Raise DamagedFilesError where a file is not what was written. A folder without digests passes."""
    if has_digests(folder) and (reason := damage_of(folder, wanted)) is not None:
        raise DamagedFilesError(
            "a file is not what was written",
            where=folder,
            found=reason,
            expected=f"the files that {DIGESTS} lists",
            try_=f"a copy of the folder; if the change is wanted, remove {DIGESTS}",
        )


def document_digest(document: Mapping[str, Any]) -> str:
    """SHA-256 hex of a JSON document's values; how it is spelled does not matter. Raises ValueError for NaN."""
    text = json.dumps(dict(document), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def with_digest(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document with its own digest in it."""
    return {**document, OWN_DIGEST: document_digest(document)}


def checked_digest(document: Mapping[str, Any]) -> dict[str, Any]:
    """The document without its own digest; one that has none passes. Raises ValueError where it does not agree."""
    plain = {key: value for key, value in document.items() if key != OWN_DIGEST}
    if OWN_DIGEST in document and document_digest(plain) != document[OWN_DIGEST]:
        raise ValueError("it was changed after it was written: its own digest differs")
    return plain


RACY_SECONDS = 2.0
"""A file that was changed less than this many seconds ago may change again without another time: its digest is not remembered."""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, remembered for this process while its size and times stay the same."""
    stat = path.resolve().stat()
    if time.time() - max(stat.st_mtime, stat.st_ctime) < RACY_SECONDS:
        return sha256_of(path)
    # a program can set the time of a change back (mtime), but not the time at which it did so (ctime)
    return _remembered_sha256(path.resolve(), stat.st_size, (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino))


@lru_cache(maxsize=1024)
def _remembered_sha256(path: Path, size: int, state: tuple[int, ...]) -> str:
    return sha256_of(path)
