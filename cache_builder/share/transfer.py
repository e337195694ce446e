"""Shared by push and pull: their progress, and the description of the cache at the other end."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from kd.cache_builder.share.fetching import fetch, fetch_small
from kd.cache_builder.share.remotes import Entry, Remote, holds
from kd.cache_builder.store.records.cache_identity import refuse_mismatch
from kd.cache_builder.store.records.manifest import MANIFEST, CacheManifest, listed_tables, load_manifest
from kd.cache_builder.store.records.part import PARTIAL, Part, load_part
from kd.common.errors import CacheError, CacheMismatchError, KdError
from kd.common.files import MAX_JSON_BYTES, read_json
from kd.common.progress import Progress

COMMIT_BYTES = 2**20
"""Most bytes of a commit. Its size is not recorded; a commit has a few kilobytes."""


@dataclass(frozen=True)
class Transferred:
    """What a push or a pull did."""

    bytes_total: int
    """Bytes that are at their place, including those that were there before."""
    bytes_moved: int
    """Bytes transferred in this run."""
    files: int
    """Files transferred in this run."""
    seconds: float
    """Seconds since the start of this run."""
    part: Part | None = None
    """What the copy of a pull holds; None for the whole cache."""


@dataclass(frozen=True)
class PlannedTransfer:
    """What a push or a pull would do."""

    files: int
    """Files that would be transferred."""
    bytes: int
    """Their bytes."""
    files_there: int
    """Files that are at their place already, with the recorded contents."""
    bytes_there: int

    @classmethod
    def of(cls, entries: Mapping[str, Entry], held: Collection[str]) -> PlannedTransfer:
        """The transfer of `entries`, of which `held` are there."""
        there = [int(entry["bytes"]) for name, entry in entries.items() if name in held]
        moved = [int(entry["bytes"]) for name, entry in entries.items() if name not in held]
        return cls(len(moved), sum(moved), len(there), sum(there))


class Tally:
    """Counters of a transfer, shared by its threads."""

    def __init__(self) -> None:
        self.done = self.total = self.moved = self.files = 0
        self.started = time.monotonic()
        self.lock = threading.Lock()

    def add(self, *, done: int = 0, total: int = 0, moved: int = 0, files: int = 0) -> None:
        with self.lock:
            self.done, self.total = self.done + done, self.total + total
            self.moved, self.files = self.moved + moved, self.files + files

    def arrived(self, count: int) -> None:
        """Count bytes from the network; a negative number takes back bytes that turned out wrong."""
        self.add(done=count, moved=max(count, 0))

    def now(self) -> Progress[Transferred]:
        """Progress in bytes that are at their place, including those that were there before."""
        rate = self.moved / max(time.monotonic() - self.started, 1e-9) / 1e6
        return Progress(self.done, self.total, note=f"{self.files} files, {rate:,.1f} MB/s")

    def end(self, part: Part | None = None) -> Progress[Transferred]:
        """The last record; `part` is what a copy holds, None for a whole cache."""
        done = Transferred(self.total, self.moved, self.files, time.monotonic() - self.started, part)
        return replace(self.now(), result=done)


def describe(
    remote: Remote, folder: Path, *, held: Path | None = None, arrived: Callable[[int], None] = lambda n: None
) -> tuple[CacheManifest, Part | None]:
    """Fetch the remote's manifest with its tables, and `partial.json` where it has one, to `folder`; returns both, checked.

    held      a copy of the cache, whose tables are taken where they are the same
    arrived   called with the number of bytes of tables that have arrived

    Raises CacheError where there is no complete cache, CacheDamageError for a damaged manifest.
    """
    try:
        data = fetch_small(remote, MANIFEST, MAX_JSON_BYTES)
    except FileNotFoundError as error:
        raise CacheError(
            "there is no cache",
            where=remote.url,
            found=f"no {MANIFEST}",
            try_="the address of the folder that holds it",
        ) from error
    (folder / MANIFEST).write_bytes(data)
    fetch_tables(remote, folder, held, arrived)
    listed = fetch_if_there(remote, PARTIAL)
    if listed is None:
        (folder / PARTIAL).unlink(missing_ok=True)
    else:
        (folder / PARTIAL).write_bytes(listed)
    try:
        manifest = load_manifest(folder)
        if not manifest.complete:
            raise CacheError("the cache is not complete", found=f"{len(manifest.commits)} commits")
        return manifest, load_part(folder, manifest)
    except KdError as error:
        error.details = {"where": remote.url, **{k: v for k, v in error.details.items() if k != "where"}}
        raise


def fetch_tables(
    remote: Remote, folder: Path, held: Path | None = None, arrived: Callable[[int], None] = lambda n: None
) -> None:
    """Fetch the tables that the manifest in `folder` lists, which are read with it, beside it. Raises CacheError.

    `held` and `arrived` are those of `describe`. A manifest that lists none, or is no manifest, is left to `load_manifest`.
    """
    try:
        listed = listed_tables(read_json(folder / MANIFEST))
    except (KdError, LookupError, TypeError, ValueError, AttributeError):
        return
    for name, entry in listed.items():
        if held is not None and holds(held, name, entry):
            shutil.copyfile(held / name, folder / name)
        fetch(remote, name, folder / name, entry, arrived=arrived)


def raise_mismatch(where: object, wanted: CacheManifest, other: CacheManifest) -> None:
    """Raise CacheMismatchError with the differences between the cache that was expected and the one that is there."""
    try:
        refuse_mismatch(Path(str(where)), wanted.identity, other)
    except CacheMismatchError as error:
        details = {k: v for k, v in error.details.items() if k not in ("cache", "try")}
    else:
        details = {"differs": "layout or files; made from the same"}
    raise CacheMismatchError("another cache is there", where=where, **details, try_="another place")


def fetch_if_there(remote: Remote, name: str) -> bytes | None:
    """A small file of the remote; None where it does not exist."""
    try:
        return fetch_small(remote, name, MAX_JSON_BYTES)
    except FileNotFoundError:
        return None
