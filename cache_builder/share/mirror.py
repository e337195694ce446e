"""Reading a cache from a URL: a bounded mirror on this disk, filled as files are first touched, and ahead of that.

    ~/.cache/kd/mirrors/DIGEST/     one per manifest; two addresses of one cache share it, and so do processes

Metadata (manifest, commits, Zarr's, the vocabulary) is fetched once and stays. Shards come when `commits` is asked for
one of their files, or earlier, when the reader has said which it will want next; each is verified on arrival and
again whenever it is read. Beyond `--cache-bytes` those that were used longest ago go, so an epoch over a cache larger
than the bound fetches every shard once. The reader keeps a window of shards in memory: a small bound costs no second fetch
inside an epoch.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kd.cache_builder.share.fetching import fetch, fetch_small
from kd.cache_builder.share.places import open_remote
from kd.cache_builder.share.remotes import Entry, Remote
from kd.cache_builder.share.transfer import COMMIT_BYTES, describe
from kd.cache_builder.store import commits
from kd.cache_builder.store.manifest import MANIFEST, TARGETS
from kd.cache_builder.store.part import PARTIAL, Part, whole
from kd.common.byte_sizes import byte_count
from kd.common.errors import CacheDamageError, CacheError
from kd.common.files import publish, write_error
from kd.common.home import kd_home

STAGING = ".staging-mirror"
LOCKS = 256
"""Lock files: two processes (or threads) never fetch the same file at once, and seldom wait for another's."""
AHEAD = 6
"""Threads that fetch what is wanted next."""

CACHE_BYTES = 20 * 10**9
"""Bytes of shards kept of a cache, unless --cache-bytes or KD_CACHE_BYTES says otherwise."""


def mirrors() -> Path:
    """Folder of the mirrors, which may be removed at any time. They are not whole: no list of caches should show them."""
    return kd_home() / "mirrors"


def cache_bytes(given: int | None = None) -> int:
    """The bound on a mirror's shards: `given`, else `$KD_CACHE_BYTES`, else the default."""
    named = os.environ.get("KD_CACHE_BYTES")
    return given if given is not None else byte_count(named) if named else CACHE_BYTES


def mirror_of(url: str, limit: int | None = None) -> Path:
    """The directory to read a cache at `url` from: its mirror on this disk, which keeps `limit` bytes of shards."""
    return Mirror(open_remote(url), cache_bytes(limit)).root


class Mirror:
    """One cache elsewhere, and what is here of it; registered with `commits`, which asks it for files."""

    def __init__(self, remote: Remote, limit: int) -> None:
        """Fetches the metadata. Raises CacheError where there is no cache."""
        self.remote, self.limit = remote, limit
        try:
            mirrors().mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=mirrors(), prefix=".staging-") as folder:
                self.manifest, offered = describe(remote, Path(folder))
                digest = hashlib.sha256()
                for name in (MANIFEST, PARTIAL):
                    path = Path(folder) / name
                    digest.update(path.read_bytes() if path.exists() else b"")
                self.root = mirrors() / digest.hexdigest()[:32]
                self.root.mkdir(exist_ok=True)
                for name in (PARTIAL, MANIFEST):
                    if (Path(folder) / name).exists():
                        publish(Path(folder) / name, self.root / name)
        except OSError as error:
            raise write_error(mirrors(), error) from error
        self.part: Part = offered or whole(self.manifest)
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._stored = sum(p.stat().st_size for p in self._evictable())
        """Bytes of shards on this disk; counted again before anything is evicted."""
        self._coming = 0
        """Bytes being fetched."""
        self._early: dict[str, tuple[int, int]] = {}
        """Files fetched (or kept) for a reader that has not touched them yet: shard and bytes."""
        self._queue: deque[tuple[int, str | None]] = deque()
        """(shard, array), or (shard, None) for all of `_arrays`."""
        self._arrays: set[str] = set()
        self._threads: list[threading.Thread] = []
        for name, entry in self.manifest.files.items():
            self._there(name, entry, metadata=True)
        commits.ORIGINS[self.root] = self

    def commit(self, index: int) -> None:
        """Have a commit on this disk, checked against the manifest."""
        name = f"commits/{index:05d}.json"
        if index not in self.part.shards or (self.root / name).exists():
            return
        with self._alone(name):
            if (self.root / name).exists():
                return
            try:
                data = fetch_small(self.remote, name, COMMIT_BYTES, sha256=self.manifest.commits[index])
            except FileNotFoundError as error:
                raise CacheDamageError("a file is missing from the cache", where=self.remote.url, file=name) from error
            try:
                staged = self.root / STAGING / name
                staged.parent.mkdir(parents=True, exist_ok=True)
                staged.write_bytes(data)
                publish(staged, self.root / name)
            except OSError as error:
                raise write_error(self.root / name, error) from error

    def verified(self, name: str, entry: Mapping[str, Any]) -> bytes:
        """The bytes of a file, from this disk where they are right, else fetched. Raises CacheDamageError, CacheError."""
        with self._lock:
            self._early.pop(name, None)
        while True:
            with suppress(OSError):  # not here, or evicted by another process this moment
                data = (self.root / name).read_bytes()
                if len(data) == entry["bytes"] and hashlib.sha256(data).hexdigest() == entry["sha256"]:
                    os.utime(self.root / name)
                    return data
                (self.root / name).unlink()
            self._there(name, entry, metadata=name in self.manifest.files)

    def ask(self, shards: Sequence[int], arrays: Iterable[str] | None) -> None:
        """Say what will be read next, in order: fetched on threads, up to half the bound. Replaces what was asked before.

        `arrays` are names of `commits.shard_files`; None = all that are here to be had, none = commits alone.
        """
        with self._wake:
            self._arrays = {*self.part.arrays, "examples"} if arrays is None else set(arrays)
            self._queue = deque((i, None) for i in shards if i in self.part.shards)
            self._early = {name: kept for name, kept in self._early.items() if kept[0] in shards}
            if not self._threads:
                self._threads = [
                    threading.Thread(target=self._work, name="kd-mirror", daemon=True) for _ in range(AHEAD)
                ]
                for thread in self._threads:
                    thread.start()
            self._wake.notify_all()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._queue:
                    self._wake.wait()
                index, array = self._queue.popleft()
            with suppress(Exception):  # whoever reads the file meets the same error, and says so
                if array is None:
                    self._expand(index)
                else:
                    self._fetch_early(index, array)

    def _expand(self, index: int) -> None:
        """A commit, and then its files to the head of the queue."""
        commits.read_commit(self.root, self.manifest, index)
        with self._wake:
            self._queue.extendleft(
                (index, a) for a in commits.shard_files(self.manifest.arrays, index) if a in self._arrays
            )
            self._wake.notify_all()

    def _fetch_early(self, index: int, array: str) -> None:
        name = commits.shard_files(self.manifest.arrays, index)[array]
        entry = commits.read_commit(self.root, self.manifest, index).files[name]
        with self._lock:
            if sum(size for _, size in self._early.values()) + entry["bytes"] > self.limit / 2:
                self._queue.clear()  # enough; the reader will ask again
                return
            self._early[name] = (index, int(entry["bytes"]))
        with suppress(OSError):  # what is here already and wanted soon is not what was used longest ago
            os.utime(self.root / name)
        try:
            self._there(name, entry)
        except BaseException:
            with self._lock:
                self._early.pop(name, None)
            raise

    def _there(self, name: str, entry: Entry, metadata: bool = False) -> None:
        """Have a file on this disk, verified on arrival."""
        path = self.root / name
        if path.exists():
            return
        with self._alone(name):
            if path.exists():
                return
            size = 0 if metadata else int(entry["bytes"])
            self._make_room(size)
            try:
                fetch(self.remote, name, self.root / STAGING / name, entry)
                publish(self.root / STAGING / name, path)
                with self._lock:
                    self._stored += size
            except OSError as error:
                raise write_error(path, error) from error
            finally:
                with self._lock:
                    self._coming -= size

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") % LOCKS
        try:
            (self.root / STAGING).mkdir(exist_ok=True)
            lock = (self.root / STAGING / f"lock-{number}").open("w")
        except OSError as error:
            raise write_error(self.root, error) from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _evictable(self) -> list[Path]:
        return [
            p
            for folder in (TARGETS, "examples")
            for p in (self.root / folder).rglob("*")
            if p.name != "zarr.json" and p.is_file()
        ]

    def _make_room(self, size: int) -> None:
        """Count `size` bytes more, and remove what was used longest ago where that is over the bound.

        What was fetched ahead and not used yet goes last.
        """
        if size > self.limit:
            raise CacheError(
                "the bound is smaller than one file of this cache",
                found=f"--cache-bytes {self.limit}",
                expected=f"several times {size}",
                try_="a larger --cache-bytes, or kd cache pull",
            )
        with self._lock:
            self._coming += size
            if self._stored + self._coming <= self.limit:
                return
            found = []
            for path in self._evictable():
                with suppress(OSError):  # another process evicts too
                    stat = path.stat()
                    early = path.relative_to(self.root).as_posix() in self._early
                    found.append((early, stat.st_mtime_ns, stat.st_size, path))
            self._stored = sum(length for _, _, length, _ in found)
            for _, _, length, path in sorted(found):
                if self._stored + self._coming <= self.limit:
                    break
                with suppress(OSError):
                    path.unlink()
                    self._stored -= length
