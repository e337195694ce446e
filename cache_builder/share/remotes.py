"""Remotes: the places where caches are shared, one class per kind of place.

    file://…, a path    a directory                                   read, write
    s3://BUCKET/KEY     an object store, through s3fs                 read, write      pip install 'kd-logit-cache[s3]'
    https://, http://   any web server; ranges are used if it has them     read
    hf://datasets/…     the hub, see `hub_remote`                     read, write

A remote is not trusted: file names are made here and never taken from it, no more bytes are taken than were requested, and the
caller compares digests.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.records.commits import refuse_outside
from kd.common.errors import CacheDamageError, CacheError
from kd.common.files import process_tag, publish, sweep, write_error
from kd.common.paths import as_path
from kd.common.strangers.plain_files import open_plain

Entry = Mapping[str, Any]
"""`bytes` and `sha256` of a file, as commits record them."""
PIECE = 2**18
"""Bytes that are handed on at once."""


class Transient(Exception):
    """A failure that may pass, so that another attempt makes sense: a cut connection, a busy server."""

    def __init__(self, reason: str, wait: float | None = None, *, slow: bool = False) -> None:
        super().__init__(reason)
        self.slow = slow
        """Whether too few bytes came in the time there was: then those that came are no progress."""
        self.wait = wait
        """Seconds that the server asked the client to wait; None if it did not say."""


class Remote(ABC):
    """A place that holds, or will hold, the files of one cache by their paths in it."""

    batch = 1
    """Number of files that one `write` should be given."""
    writers = 8
    """Number of writes that may run at once."""
    shows_card = False
    """True where the place shows a `README.md` as its front page: a push then adds a dataset card."""

    def __init__(self, url: str) -> None:
        self.url = url

    @abstractmethod
    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield bytes `[start, stop)` of a file in pieces; fewer where the file ends before.

        Raises FileNotFoundError; Transient for a failure that may pass; CacheError for any other.
        """

    def prepare(self, *, private: bool = False) -> None:
        """Make the place ready to be written to. Raises CacheError where it cannot be.

        `private` hides a place that is made here from others, where the place knows such a thing.
        """
        raise self._read_only()

    def exists(self) -> bool:
        """Whether there is a place to ask what it holds: a repository of a hub may have to be made first."""
        raise self._read_only()

    def held(self, root: Path, entries: Mapping[str, Entry]) -> set[str]:
        """Names of the files that are there already with the recorded contents; `root` holds the same files."""
        raise self._read_only()

    def write(self, root: Path, names: Sequence[str]) -> None:
        """Copy files of `root` there, each whole or not at all. Raises Transient or CacheError."""
        raise self._read_only()

    def close(self) -> None:  # noqa: B027 - most places have nothing to remove
        """Remove what writing has left at the place besides the files."""

    def _read_only(self) -> CacheError:
        return CacheError(
            "this place can only be read from",
            where=self.url,
            expected="hf://datasets/OWNER/NAME, s3://BUCKET/PATH or a directory",
        )


class FolderRemote(Remote):
    """A directory of this machine, or one that is mounted."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.root = local_path(url)

    def read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        """As `Remote.read`."""
        try:
            with open_plain(self.root / name, inside=self.root) as file:
                file.seek(start)
                while start < stop and (piece := file.read(min(PIECE, stop - start))):
                    start += len(piece)
                    yield piece
        except FileNotFoundError:
            raise
        except OSError as error:
            raise CacheError(
                "a file of the cache cannot be read", where=error.filename, found=error.strerror
            ) from error

    def prepare(self, *, private: bool = False) -> None:
        """As `Remote.prepare`. What a killed push of this machine left is removed."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            sweep(self.root)
        except OSError as error:
            raise write_error(self.root, error) from error

    def exists(self) -> bool:
        """As `Remote.exists`: a missing folder holds nothing."""
        return True

    def held(self, root: Path, entries: Mapping[str, Entry]) -> set[str]:
        """As `Remote.held`: size and SHA-256."""
        return {name for name, entry in entries.items() if holds(self.root, name, entry)}

    def write(self, root: Path, names: Sequence[str]) -> None:
        """As `Remote.write`: another name, flush, rename."""
        for name in names:
            refuse_outside(self.root, name)
            staged = self.root / f".staging-{process_tag()}" / name
            try:
                staged.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, staged)
                publish(staged, self.root / name)
            except OSError as error:
                raise write_error(self.root / name, error) from error

    def close(self) -> None:
        """As `Remote.close`: the staging folder."""
        shutil.rmtree(self.root / f".staging-{process_tag()}", ignore_errors=True)


def holds(root: Path, name: str, entry: Entry) -> bool:
    """True if a plain file of the cache at `root` is there with the recorded size and SHA-256."""
    try:
        LocalFiles(root).verify_file(name, entry)
    except CacheDamageError:
        return False
    return True


def local_path(address: str | os.PathLike[str]) -> Path:
    """The path that a path or a file:// address names. Raises CacheError for an address on another machine."""
    text = str(address)
    if not text.startswith("file://"):
        return as_path(address)
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise CacheError("a file:// address names a file of this machine", found=text, expected="file:///PATH")
    return Path(unquote(parts.path))
