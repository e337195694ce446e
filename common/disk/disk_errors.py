"""Failed writes in words: a full or read-only disk, no inodes, a limit on the size of files, a folder that is a file.

    with clear_write_errors(out, "make room, then run the same command again"):
        figure.savefig(out / "loss.png")

Libraries report a full disk in their own ways. An OSError has a number; safetensors puts it into its text; torch's archives
only say that a position is not the expected one.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd.common.errors import KdError

FULL = (errno.ENOSPC, errno.EDQUOT)
NUMBERS = (
    *FULL,
    *(errno.EROFS, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EMFILE, errno.ENFILE, errno.ENXIO, errno.ESTALE, errno.ENOTEMPTY),
    *(errno.EBUSY, errno.ETXTBSY, errno.EMLINK, errno.EXDEV),
)
"""Numbers of errors that a place on disk gives, and not a network or a pipe."""


class WriteError(KdError):
    """Something could not be written; nothing of it was left half-written."""


@contextmanager
def clear_write_errors(path: Path, try_: str) -> Iterator[None]:
    """A context for writing under `path`: raises WriteError where the disk refuses. `try_` is the advice."""
    try:
        yield
    except Exception as error:
        if write_failure(error, path) is None:
            raise
        raise write_error_of(error, path, try_) from error


def write_error_of(error: Exception, path: Path, try_: str) -> WriteError:
    """The error for the user after writing under `path` failed."""
    number = _number(error)
    full = number in FULL
    limit = number == errno.EFBIG
    headline = "the disk is full" if full else "a file is larger than files may be here" if limit else "cannot write"
    named = error.filename if isinstance(error, OSError) else None
    advice = (
        {"expected": "a larger ulimit -f"} if limit else {} if full else {"expected": "a folder that can be written"}
    )
    return WriteError(headline, where=named or path, found=write_failure(error, path), **advice, try_=try_)


def write_failure(error: BaseException, path: Path) -> str | None:
    """Why the disk refused a write, in words; None for an error that is about something else."""
    number = _number(error)
    if number in NUMBERS:
        return os.strerror(number)
    if isinstance(error, RuntimeError) and re.search(r"inline_container|PytorchStreamWriter|write failed", str(error)):
        return os.strerror(errno.ENOSPC) if _is_full(path) else "the file could not be written whole"
    return None


def is_size_limit(error: BaseException) -> bool:
    """Whether a write failed because files may only grow to a certain size (`ulimit -f`)."""
    return _number(error) == errno.EFBIG


def _number(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if type(error).__name__ == "SafetensorError":
        match = re.search(r"\(os error (\d+)\)", str(error))
        return int(match[1]) if match else None
    return None


def free_bytes(path: Path) -> int:
    """Free bytes of the disk that a path is on, or would be on."""
    existing = next((path for path in (path, *path.parents) if path.exists()), Path("/"))
    return shutil.disk_usage(existing).free


def _is_full(path: Path) -> bool:
    return free_bytes(path) < 2**20
