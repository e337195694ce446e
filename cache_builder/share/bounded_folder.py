"""The bound on a mirror's shards: bytes are reserved before a file is fetched, and the files used longest ago make room.

Several mirrors, in this process and in others, may fill one folder under one bound. What is stored, and what each of them has
reserved, is kept in a small file beside the shards, which is changed under a lock:

    .staging-mirror/bound.json      {"stored": bytes, "fetched": bytes since the last count, "reserved": {mirror: bytes}}
    .staging-mirror/mirror-ID       locked while that mirror is in use: what a killed process had reserved is given back

The files are counted again after an eighth of the bound was fetched, and whenever it is reached.
"""

from __future__ import annotations

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from filelock import FileLock, Timeout

from kd.cache_builder.store.records.manifest import TARGETS
from kd.common.errors import CacheError
from kd.common.files import write_error

COUNTS_PER_BOUND = 8
"""The folder is counted again after the bound, divided by this, was fetched."""
EXPECTED_SECONDS = 6 * 3600.0
"""A file that was fetched ahead counts as used so much later than it was, until it is read. So the time of a file says to all
processes whether it may go, and what a killed one had fetched goes some hours later."""
POLL = 0.01
"""Seconds between two attempts to take a lock that another holds, or to find room that others have reserved."""
LEDGER = "bound.json"


@dataclass
class _Ledger:
    """What all mirrors of a folder know of its bytes."""

    stored: int = 0
    """Bytes of shards, as last counted, and those fetched since."""
    fetched: int = 0
    """Bytes fetched since the last count."""
    reserved: dict[str, int] = field(default_factory=dict)
    """Bytes of files that are being fetched, by mirror."""

    @property
    def total(self) -> int:
        return self.stored + sum(self.reserved.values())


class BoundedFolder:
    """The files of shards in a cache's folder, of at most `limit` bytes, whoever fetches them; thread-safe."""

    def __init__(self, root: Path, limit: int, locks: Path) -> None:
        """`locks` is a folder for the ledger and its locks. Raises CacheError where it cannot be written."""
        self.root, self.limit, self.locks = root, limit, locks
        self._name = uuid.uuid4().hex[:12]
        self._thread = threading.Lock()
        with self._ledger() as ledger:
            self._alive = FileLock(self._lock_of(self._name), thread_local=False)
            self._alive.acquire()
            for path in locks.glob("mirror-*"):
                self._in_use(path.name.removeprefix("mirror-"))
            self._count(ledger)

    def mirrors(self) -> int:
        """Number of mirrors that fill the folder, with those that ended a moment ago."""
        return max(1, sum(1 for _ in self.locks.glob("mirror-*")))

    def expected(self, path: Path) -> None:
        """Say that a file is going to be read soon: it is removed after all that were used. All mirrors of the folder see that."""
        later = time.time() + EXPECTED_SECONDS
        with suppress(OSError):  # it is not here, or has just been removed
            os.utime(path, (later, later))

    def used(self, path: Path) -> None:
        """Say that a file was used now."""
        with suppress(OSError):
            os.utime(path)

    def reserve(self, size: int) -> None:
        """Make room for a file of `size` bytes: remove the files that were used longest ago, expected ones after the others.

        Waits for what others are fetching, where that fills the bound. Every call is followed by one of `release`. Raises
        CacheError for a file that is larger than the bound.
        """
        if size > self.limit:
            raise CacheError(
                "the bound is smaller than one file of this cache",
                found=f"--cache-bytes {self.limit}",
                expected=f"several times {size}",
                try_="a larger --cache-bytes, or kd cache pull",
            )
        while size and not self._reserved(size):
            time.sleep(POLL)

    def _reserved(self, size: int) -> bool:
        with self._ledger() as ledger:
            if ledger.total + size > self.limit or ledger.fetched > self.limit / COUNTS_PER_BOUND:
                self._evict(ledger, size)
            if ledger.total + size > self.limit:
                return False
            ledger.reserved[self._name] = ledger.reserved.get(self._name, 0) + size
            return True

    def release(self, size: int, arrived: bool) -> None:
        """End a reservation; `arrived` says whether the file is on this disk now."""
        if not size:
            return
        with self._ledger() as ledger:
            ledger.reserved[self._name] = max(ledger.reserved.get(self._name, 0) - size, 0)
            if arrived:
                ledger.stored += size
                ledger.fetched += size

    @contextmanager
    def _ledger(self) -> Iterator[_Ledger]:
        """The ledger, under its lock; written when the block ends. Raises CacheError where that cannot be done."""
        path = self.locks / LEDGER
        try:
            self.locks.mkdir(exist_ok=True)
            with self._thread, FileLock(self.locks / "lock-bound", poll_interval=POLL):
                try:
                    ledger = _Ledger(**json.loads(path.read_text()))
                except (OSError, ValueError, TypeError):  # none yet, or cut short: the files say what is stored
                    ledger = _Ledger()
                    self._count(ledger)
                yield ledger
                path.write_text(json.dumps(asdict(ledger)))
        except OSError as error:
            raise write_error(self.root, error) from error

    def _count(self, ledger: _Ledger) -> list[tuple[int, int, Path]]:
        """Count the files, and give back what mirrors had reserved that are gone; returns the files."""
        files = self._files()
        ledger.stored, ledger.fetched = sum(size for _, size, _ in files), 0
        ledger.reserved = {name: size for name, size in ledger.reserved.items() if self._in_use(name)}
        return files

    def _evict(self, ledger: _Ledger, size: int) -> None:
        """Count the files, and remove some while they, the reserved bytes and `size` are over the bound."""
        files = self._count(ledger)
        for _, stored, path in sorted(files):
            if ledger.total + size <= self.limit:
                break
            with suppress(OSError):
                path.unlink()
                ledger.stored -= stored

    def _in_use(self, name: str) -> bool:
        """Whether the mirror of this name is in use; what it left behind is removed where it is not."""
        if name == self._name:
            return True
        path = self._lock_of(name)
        try:
            with FileLock(path, timeout=0):
                path.unlink(missing_ok=True)
                return False
        except (Timeout, OSError):
            return True

    def _lock_of(self, name: str) -> Path:
        return self.locks / f"mirror-{name}"

    def _files(self) -> list[tuple[int, int, Path]]:
        """Time of the last use, size and path of every file of a shard."""
        files = []
        for folder in (TARGETS, "examples"):
            for path in (self.root / folder).rglob("*"):
                with suppress(OSError):  # another process evicts too
                    if path.name != "zarr.json" and path.is_file():
                        status = path.stat()
                        files.append((status.st_mtime_ns, status.st_size, path))
        return files
