"""The bound on a mirror's shards: bytes are reserved before a file is fetched, and the files used longest ago make room.

Several mirrors, in this process and in others, may fill one folder. Each counts the files again after it has fetched an eighth of
the bound, and whenever it is over it. What others have fetched since the last count may lie there on top of the bound.
"""

from __future__ import annotations

import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from kd.cache_builder.store.records.manifest import TARGETS
from kd.common.errors import CacheError

COUNTS_PER_BOUND = 8
"""The folder is counted again after the bound, divided by this, was fetched."""


class BoundedFolder:
    """The files of shards in a cache's folder, of at most `limit` bytes; thread-safe."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit
        self._lock = threading.Lock()
        self._stored = sum(size for _, size, _ in self._files())
        """Bytes on this disk, as last counted, and those fetched since."""
        self._reserved = 0
        """Bytes of files that are being fetched."""
        self._uncounted = 0
        """Bytes fetched since the last count."""

    def reserve(self, size: int, last: Collection[str] = ()) -> None:
        """Make room for a file of `size` bytes: remove the files that were used longest ago, those in `last` after the others.

        Every call is followed by one of `release`. Raises CacheError for a file that is larger than the bound.
        """
        if size > self.limit:
            raise CacheError(
                "the bound is smaller than one file of this cache",
                found=f"--cache-bytes {self.limit}",
                expected=f"several times {size}",
                try_="a larger --cache-bytes, or kd cache pull",
            )
        with self._lock:
            self._reserved += size
            full = self._stored + self._reserved > self.limit
            if full or self._uncounted > self.limit / COUNTS_PER_BOUND:
                self._evict(last)

    def release(self, size: int, arrived: bool) -> None:
        """End a reservation; `arrived` says whether the file is on this disk now."""
        with self._lock:
            self._reserved -= size
            if arrived:
                self._stored += size
                self._uncounted += size

    def _evict(self, last: Collection[str]) -> None:
        """Count the files, and remove some while they and the reserved bytes are over the bound."""
        files = self._files()
        self._stored, self._uncounted = sum(size for _, size, _ in files), 0
        for _, size, path in sorted(files, key=lambda file: (file[2].relative_to(self.root).as_posix() in last, *file)):
            if self._stored + self._reserved <= self.limit:
                break
            with suppress(OSError):
                path.unlink()
                self._stored -= size

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
