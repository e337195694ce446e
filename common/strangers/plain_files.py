"""Open and read files that a stranger may have made: plain files alone, inside their folder, and no larger than a bound.

A folder from elsewhere may hold a pipe, a device, a socket, a folder or a link where a file belongs. Opening a pipe waits for
ever, `/dev/zero` never ends, and a link may lead to a file that is not the stranger's to show. Every file of a cache or a run,
every YAML file and every index of weights is opened here.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from kd.common.errors import DataError

KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
"""Test of a file's mode, and the word for what it finds."""


class NotPlainError(OSError):
    """A path names no plain file, a file outside its folder, or one that is too large. `strerror` says which."""

    def __init__(self, reason: str, path: str | os.PathLike[str]) -> None:
        super().__init__(errno.EINVAL, reason, os.fspath(path))


def open_plain(path: str | os.PathLike[str], *, inside: Path | None = None) -> BufferedReader:
    """Open a plain file for reading; never waits.

    inside   the folder that the file has to lie in, with links followed; None allows a link to any plain file

    Raises FileNotFoundError where there is none, NotPlainError for anything but a plain file, and OSError.
    """
    _refuse_other_kinds(os.stat(path), path)  # before it is opened: opening a device can have an effect
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        _refuse_other_kinds(os.fstat(handle), path)  # it may have been exchanged in between
        if inside is not None and not _lies_in(_opened_path(handle, path), os.path.realpath(inside)):
            raise NotPlainError("a link that leaves its folder, not a plain file", path)
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_plain(path: str | os.PathLike[str], limit: int, *, inside: Path | None = None) -> bytes:
    """The bytes of a plain file, at most `limit`. Raises as `open_plain`, and NotPlainError for a larger file."""
    with open_plain(path, inside=inside) as file:
        size = os.fstat(file.fileno()).st_size
        data = b"" if size > limit else file.read(limit + 1)
    if size > limit or data is None or len(data) > limit:  # files of /proc have no size
        raise NotPlainError(f"too large: more than {limit} bytes", path)
    return data


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """True if a path, with links followed, lies in a folder."""
    return _lies_in(os.path.realpath(path), os.path.realpath(folder))


def _lies_in(real: str, folder: str) -> bool:
    return real == folder or real.startswith(folder.rstrip("/") + "/")


def _opened_path(handle: int, path: str | os.PathLike[str]) -> str:
    """Where the file that was opened lies; the kernel knows it, whatever the links have become since."""
    try:
        return os.readlink(f"/proc/self/fd/{handle}")
    except OSError:  # not Linux
        return os.path.realpath(path)


def refuse_special_files(folder: str | os.PathLike[str]) -> None:
    """Raise DataError for a pipe, a device or a socket in a folder whose files a library is going to open.

    Links are followed: the hub's own folders of models hold links to files elsewhere. Nothing happens where there is no folder.
    """
    for path in sorted(Path(folder).iterdir()) if os.path.isdir(folder) else ():
        try:
            mode = path.stat().st_mode
        except OSError:  # a link to nothing; whoever needs the file says so
            continue
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise DataError("a file of the folder is not a plain file", where=path, found=_kind(mode))


def _refuse_other_kinds(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise NotPlainError(f"{_kind(status.st_mode)}, not a plain file", path)


def _kind(mode: int) -> str:
    return next((word for test, word in KINDS if test(mode)), "something else")
