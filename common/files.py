"""Write files that are whole or absent (temporary name, flush, rename), and read and write canonical JSON within bounds."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kd.common.errors import CacheDamageError, CacheError, DataError
from kd.common.processes import boot_mark, is_alive, is_free, own_mark
from kd.common.strangers.plain_files import NotPlainError, open_plain, read_plain

MAX_JSON_BYTES = 64 * 2**20
"""Most bytes of a JSON file; checked before a file is read."""


def canonical_json(value: Any) -> str:
    """JSON text in one spelling per value: sorted keys, no NaN, indented by two spaces, newline at the end."""
    return json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def digest_of(value: Any) -> str:
    """blake2b-256 hex of the canonical JSON."""
    return hashlib.blake2b(canonical_json(value).encode(), digest_size=32).hexdigest()


def sha256_of(path: Path) -> str:
    """SHA-256 hex of a plain file's bytes."""
    with open_plain(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(path: Path) -> None:
    """Force a written file to disk."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Force a folder's entries (renames) to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


STAGING_LOCK = "lock"
"""Name of the file in a staging folder that a builder keeps locked."""
ABANDONED_SECONDS = 24 * 3600
"""Age in seconds at which unfinished files of another host are removed, counted from the last change."""


TOKENS = ".tokens"
"""Folder of a build that holds its text in tokens until the cache is finished."""


def unfinished(name: str) -> bool:
    """True for the name of a file or folder that has not been published yet, or is there only while a build runs."""
    return name == TOKENS or re.fullmatch(r"\.staging-.*|\.ready-\d+|\..*\.tmp|\.\d+\.claim", name) is not None


_TAG = re.compile(r"(?P<host>.+-\d+)-(?P<pid>\d+)-(?P<mark>[0-9a-f]+)")


def _host() -> str:
    """The host's name and the pid namespace: process ids are only comparable where both are equal."""
    try:
        namespace = re.sub(r"\D", "", os.readlink("/proc/self/ns/pid"))
    except OSError:  # not Linux
        namespace = "0"
    return f"{socket.gethostname()}-{namespace}"


def process_tag() -> str:
    """`host-namespace-pid-mark`, which names the unfinished files of this process; see `processes.mark_of`."""
    return f"{_host()}-{os.getpid()}-{own_mark()}"


def sweep(folder: Path) -> None:
    """Remove what killed processes have left in `folder`: `.NAME.TAG.tmp` files and `.staging-TAG` folders.

    Removed are those of dead processes of this host, those of other containers of this machine whose lock is free, and those of
    other hosts that did not change for `ABANDONED_SECONDS`. Those of live processes stay.
    """
    name = re.compile(
        r"\.(?:.+\.(?:jsonl?|parquet|claim|md|csv|html)\.|staging-)(.+-\d+-\d+-[0-9a-f]+)(?:\.\d+)?(?:\.tmp)?"
    )
    for path in [*folder.glob(".*.tmp"), *folder.glob(".staging-*")]:
        match = name.fullmatch(path.name)
        alive = holder(match[1])[0] if match else None
        left = match is not None and alive is None and made_here(match[1]) and is_free(path / STAGING_LOCK)
        if alive is False or left or (alive is None and _untouched(path)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def holder(tag: str) -> tuple[bool | None, str]:
    """`(alive, words)` for the process of a `process_tag`; `alive` is None for a process of another host."""
    match = _TAG.fullmatch(tag)
    if match is None:
        return None, tag[:80]
    host, pid, mark = match["host"], int(match["pid"]), match["mark"]
    words = f"process {pid} on {host.rpartition('-')[0]}"
    if host != _host():
        return None, words
    return is_alive(pid, mark), words


def made_here(tag: str) -> bool:
    """Whether a tag was made since this machine was started, in whichever container: only then does a lock tell."""
    return bool(boot_mark()) and tag.rpartition("-")[2].startswith(boot_mark())


def _untouched(path: Path) -> bool:
    with suppress(OSError):  # it may be moved meanwhile
        newest = max(p.lstat().st_mtime for p in [path, *path.rglob("*")])
        return time.time() - newest > ABANDONED_SECONDS
    return False


def publish(temporary: Path, final: Path) -> None:
    """Move a finished file to its name, so that it is there and whole even after a power cut."""
    final.parent.mkdir(parents=True, exist_ok=True)
    sync_file(temporary)
    os.replace(temporary, final)
    sync_folder(final.parent)


def publish_first(temporary: Path, final: Path) -> bool:
    """As `publish`, unless the name is taken: then the temporary file is removed. Returns True if the file was published."""
    final.parent.mkdir(parents=True, exist_ok=True)
    sync_file(temporary)
    try:
        os.link(temporary, final)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if final.exists():
            return False
        os.replace(temporary, final)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(final.parent)
    return True


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it is whole or absent."""
    with _temporary(path, text) as temporary:
        publish(temporary, path)


def write_first(path: Path, text: str) -> bool:
    """As `write_atomic`, unless the file exists: then it stays as it is. Returns True if the file was written."""
    with _temporary(path, text) as temporary:
        return publish_first(temporary, path)


@contextmanager
def _temporary(path: Path, text: str) -> Iterator[Path]:
    """A file beside `path` that holds the text and is gone afterwards, also where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{process_tag()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def read_object(path: Path, *, inside: Path | None = None) -> dict[str, Any]:
    """Read a JSON object in any spelling. Raises DataError when the file is absent, not plain, too large, or no JSON object.

    inside   the folder that the file has to lie in, with links followed; None allows a link to any plain file
    """
    try:
        return _parsed(read_plain(path, MAX_JSON_BYTES, inside=inside))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError("a JSON file cannot be read", where=path, found=_reason(error)) from error


def read_json(path: Path, *, inside: Path | None = None) -> dict[str, Any]:
    """Read a JSON object that `canonical_json` has written, in a file of a cache.

    inside   the cache's folder, which the file has to lie in, with links followed; None allows a link to any plain file

    Raises CacheDamageError when the file is absent, not plain, too large, not a JSON object, or not in the canonical spelling:
    any change is noticed.
    """
    try:
        data = read_plain(path, MAX_JSON_BYTES, inside=inside)
        value = _parsed(data)
    except FileNotFoundError as error:
        raise CacheDamageError("a file of the cache is missing", where=path) from error
    except (OSError, ValueError, RecursionError) as error:
        raise CacheDamageError("a JSON file of the cache cannot be read", where=path, found=_reason(error)) from error
    if _spelled(value) != data:
        raise CacheDamageError("a JSON file of the cache was changed", where=path, found="not the canonical spelling")
    return value


def _parsed(data: bytes) -> dict[str, Any]:
    """The object in JSON text. Raises ValueError and RecursionError."""
    value = json.loads(data)
    if not isinstance(value, dict):
        raise ValueError(f"it is not an object but {type(value).__name__}")
    return value


def _reason(error: Exception) -> str:
    """What was wrong with a file, in words."""
    return str(error.strerror) if isinstance(error, NotPlainError) else f"{type(error).__name__}: {error}"


def _spelled(value: dict[str, Any]) -> bytes | None:
    try:
        return canonical_json(value).encode()
    except (ValueError, RecursionError):  # NaN, half a character, or too deep to write
        return None


SOME_ROOM = 2**20
"""Free bytes of a disk that is not full."""
FEW_FILES = 8
"""Inodes that a failed write may have given back."""


def no_inodes(path: Path) -> bool:
    """Whether the file system that `path` is on, or would be on, has refused a file for want of inodes, and not of room.

    What was half-written may be removed by now, so that a few inodes are free again; room for bytes tells the two apart then.
    """
    existing = next((p for p in (path, *path.parents) if p.exists()), None)
    if existing is None:
        return False
    with suppress(OSError):
        status = os.statvfs(existing)
        freed = status.f_favail <= FEW_FILES and status.f_bavail * status.f_frsize > SOME_ROOM
        return status.f_files > 0 and (status.f_favail == 0 or freed)
    return False


def write_error(path: Path, error: OSError) -> CacheError:
    """The error for the user after writing under `path` failed."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        inodes = error.errno == errno.ENOSPC and no_inodes(path)
        return CacheError(
            "the disk is full" if not inodes else "the file system can hold no more files",
            where=path,
            found=error.strerror if not inodes else "no free inode",
            try_="free some space, then run the same command again: it continues after the last whole shard"
            if not inodes
            else "remove some files, then run the same command again: it continues after the last whole shard",
        )
    if error.errno == errno.EFBIG:
        return CacheError(
            "a file would be larger than is allowed here",
            where=error.filename or path,
            found=error.strerror,
            try_="ulimit -f unlimited, or another file system; then run the same command again: it continues",
        )
    return CacheError(
        "cannot write the cache",
        where=error.filename or path,
        found=error.strerror or str(error),
        expected="a writable directory",
        try_="check permissions, then run the same command again: it continues",
    )
