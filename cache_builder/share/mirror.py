"""Read a cache from a URL through a mirror on this disk, which is filled as files are read, and ahead of that.

    ~/.cache/kd/mirrors/DIGEST/     one folder per manifest, shared by all addresses of a cache and by processes

Metadata (manifest, tables, lengths, commits, Zarr's, the vocabulary) is fetched once and stays. A file of a shard is fetched when
it is read, or earlier, when the reader has announced the shard. It is verified on arrival and again whenever it is read. Beyond
`--cache-bytes`, the files that were used longest ago are removed, so an epoch over a cache larger than the bound fetches every
shard once. The reader keeps a window of shards in memory: with a small bound, nothing is fetched twice in an epoch.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from kd.cache_builder.share.bounded_folder import BoundedFolder
from kd.cache_builder.share.fetching import fetch, fetch_small
from kd.cache_builder.share.places import open_remote
from kd.cache_builder.share.remotes import Entry, Remote
from kd.cache_builder.share.transfer import COMMIT_BYTES, describe
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.cache_tables import TABLES
from kd.cache_builder.store.records.manifest import MANIFEST, CacheManifest
from kd.cache_builder.store.records.manifest_checks import length_pages
from kd.cache_builder.store.records.part import PARTIAL, Part, whole
from kd.cache_builder.store.records.shard_record import ShardRecord
from kd.common.byte_sizes import byte_count
from kd.common.disk.home import kd_home
from kd.common.errors import CacheDamageError
from kd.common.files import publish, write_error
from kd.common.strangers.plain_files import NotPlainError, read_plain

STAGING = ".staging-mirror"
LOCKS = 256
"""Number of lock files. Two threads or processes never fetch the same file at once, and seldom wait for another file's."""
POLL = 0.01
"""Seconds between two attempts to take a lock that another holds."""
AHEAD = 6
"""Threads that fetch announced files."""

CACHE_BYTES = 20 * 10**9
"""Default bound on the bytes of a cache's shards in its mirror; --cache-bytes and KD_CACHE_BYTES set another."""


def mirrors() -> Path:
    """Folder of the mirrors, which may be removed at any time. A mirror is not a whole cache, so no list of caches shows it."""
    return kd_home() / "mirrors"


def cache_bytes(given: int | None = None) -> int:
    """The bound on a mirror's shards: `given`, else `$KD_CACHE_BYTES`, else the default."""
    named = os.environ.get("KD_CACHE_BYTES")
    return given if given is not None else byte_count(named) if named else CACHE_BYTES


def open_mirror(url: str, limit: int | None = None) -> Mirror:
    """The files of the cache at `url`, through its mirror on this disk, which keeps `limit` bytes of shards."""
    return Mirror(open_remote(url), cache_bytes(limit))


class Mirror:
    """`CacheFiles` of a cache elsewhere. Several mirrors of one cache, in any processes, share a folder."""

    on_disk = False

    def __init__(self, remote: Remote, limit: int) -> None:
        """Fetch the metadata. Raises CacheError where there is no cache.

        remote   place of the cache
        limit    most bytes of shards on this disk
        """
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
                for name in (PARTIAL, *TABLES, MANIFEST):
                    if (Path(folder) / name).exists():
                        publish(Path(folder) / name, self.root / name)
        except OSError as error:
            raise write_error(mirrors(), error) from error
        self.part: Part = offered or whole(self.manifest)
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._space = BoundedFolder(self.root, limit, self.root / STAGING)
        self._early_limit = limit / 2
        """Bytes of announced files that may be here before they are read."""
        self._early: dict[str, tuple[int, int]] = {}
        """Announced files that are here and were not read yet -> shard and size in bytes."""
        self._queue: deque[tuple[int, str | None]] = deque()
        """(shard, array), or (shard, None) for all of `_arrays`."""
        self._arrays: set[str] = set()
        self._threads: list[threading.Thread] = []
        pages = set(length_pages(self.manifest.examples))  # these are fetched when they are read
        for name, entry in self.manifest.files.items():
            if name not in pages:
                self._there(name, entry, metadata=True)

    def committed(self, shards: int) -> list[int]:
        """As `CacheFiles.committed`: what the address offers."""
        return [index for index in self.part.shards if index < shards]

    def read_commit(self, manifest: CacheManifest, index: int) -> ShardRecord:
        """As `CacheFiles.read_commit`; the commit is fetched where it is not here."""
        self._fetch_commit(index)
        return commits.read_commit(self.root, manifest, index)

    def stored_bytes(self, manifest: CacheManifest, index: int) -> dict[str, int]:
        """As `CacheFiles.stored_bytes`, as recorded."""
        entries = self.read_commit(manifest, index).files
        paths = commits.shard_files(manifest.arrays, index)
        return {array: int(entries[path]["bytes"]) for array, path in paths.items()}

    def _fetch_commit(self, index: int) -> None:
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

    def verify_file(self, name: str, entry: Mapping[str, Any], **where: object) -> None:
        """As `CacheFiles.verify_file`; the file is fetched where it is not here."""
        self.verified_bytes(name, entry, **where)

    def verified_bytes(self, name: str, entry: Mapping[str, Any], **where: object) -> bytes:
        """As `CacheFiles.verified_bytes`: from this disk where they are right, else fetched. Raises CacheError too."""
        with self._lock:
            self._early.pop(name, None)
        while True:
            data = self._held_bytes(name, entry)
            if data is not None:
                return data
            self._there(name, entry, metadata=name in self.manifest.files)

    def _held_bytes(self, name: str, entry: Entry) -> bytes | None:
        """The bytes of a file that is here; None where it is not, or where it was wrong and is removed now."""
        path = self.root / name
        try:
            data = read_plain(path, int(entry["bytes"]), inside=self.root)
            if len(data) == entry["bytes"] and hashlib.sha256(data).hexdigest() == entry["sha256"]:
                self._space.used(path)
                return data
        except FileNotFoundError:  # never fetched, or another process has just evicted it
            return None
        except NotPlainError:
            pass
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise write_error(path, error) from error
        return None

    def expect(self, shards: Sequence[int], arrays: Iterable[str] | None = None) -> None:
        """As `CacheFiles.expect`: fetched on threads, up to half the bound. A new call replaces the one before.

        Processes that read through one mirror share that half: what one fetches early must not push out what another did.
        """
        early_limit = self.limit / 2 / self._space.mirrors()
        with self._wake:
            self._early_limit = early_limit
            self._arrays = {*self.part.arrays, "examples"} if arrays is None else set(arrays)
            self._queue = deque((i, None) for i in shards if i in self.part.shards)
            dropped = [name for name, (index, _) in self._early.items() if index not in shards]
            for name in dropped:
                del self._early[name]
                self._space.used(self.root / name)
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
            with suppress(Exception):  # the reader of the file will meet the same error and raise it
                if array is None:
                    self._expand(index)
                else:
                    self._fetch_early(index, array)

    def _expand(self, index: int) -> None:
        """Have a commit here, and put its shard's files at the head of the queue."""
        self.read_commit(self.manifest, index)
        with self._wake:
            self._queue.extendleft(
                (index, a) for a in commits.shard_files(self.manifest.arrays, index) if a in self._arrays
            )
            self._wake.notify_all()

    def _fetch_early(self, index: int, array: str) -> None:
        name = commits.shard_files(self.manifest.arrays, index)[array]
        entry = self.read_commit(self.manifest, index).files[name]
        with self._lock:
            if sum(size for _, size in self._early.values()) + entry["bytes"] > self._early_limit:
                self._queue.clear()  # that much is used; the reader will announce more
                return
            self._early[name] = (index, int(entry["bytes"]))
        try:
            self._space.expected(self.root / name)  # where it is here already
            self._there(name, entry)
            self._space.expected(self.root / name)
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
            size, arrived = 0 if metadata else int(entry["bytes"]), False
            self._space.reserve(size)
            try:
                fetch(self.remote, name, self.root / STAGING / name, entry)
                publish(self.root / STAGING / name, path)
                arrived = True
            except OSError as error:
                raise write_error(path, error) from error
            finally:
                self._space.release(size, arrived)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Keep other threads and processes from fetching this file meanwhile."""
        number = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little") % LOCKS
        lock = FileLock(self.root / STAGING / f"lock-{number}", poll_interval=POLL)
        try:
            (self.root / STAGING).mkdir(exist_ok=True)
            lock.acquire()
        except OSError as error:
            raise write_error(self.root, error) from error
        try:
            yield
        finally:
            lock.release()
