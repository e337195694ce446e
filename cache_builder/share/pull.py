"""Pull a cache, or a part of one, from a remote: verified, in parallel, and continued by the same command when it was cut.

The manifest comes first and has a checksum; commits are checked against the manifest, files against the commits. Files lie in
`.staging-pull` until they are verified, and `manifest.json` is published last. So a folder without a manifest holds no cache.
A file that is there with the recorded size and SHA-256 is not fetched again. This also repairs a damaged copy.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

from kd.cache_builder.share.fetching import fetch, fetch_small, in_parallel
from kd.cache_builder.share.places import open_remote
from kd.cache_builder.share.remotes import Entry, Remote, holds
from kd.cache_builder.share.transfer import COMMIT_BYTES, PlannedTransfer, Tally, Transferred, describe, raise_mismatch
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.cache_tables import TABLES
from kd.cache_builder.store.records.manifest import (
    ANSWERS,
    BUILDING,
    MANIFEST,
    TARGETS,
    VOCABULARY,
    CacheManifest,
    load_manifest,
)
from kd.cache_builder.store.records.part import PARTIAL, Part, load_part, part_of, whole
from kd.cache_builder.upkeep.verify import BESIDE
from kd.common.errors import CacheDamageError, CacheError
from kd.common.files import MAX_JSON_BYTES, publish, sync_folder, unfinished, write_error
from kd.common.paths import as_path
from kd.common.progress import Progress
from kd.common.strangers.plain_files import read_plain

STAGING = ".staging-pull"
"""Folder of files that have not fully arrived; see `files.unfinished`."""


def pull(
    url: str,
    path: str | Path,
    *,
    examples: tuple[int, int] | None = None,
    arrays: Callable[[CacheManifest], Collection[str]] | None = None,
    workers: int = 8,
) -> Iterator[Progress[Transferred]]:
    """Copy a cache, or a part of it, from `url` to `path`.

    examples   first example and one past the last: copy only the shards that hold them; None means all
    arrays     called with the manifest; returns the names of the arrays to copy, besides those that every reader needs;
               None means all
    workers    files that are fetched at once

    A copy of a part lists what it holds in `partial.json`; pulling more of the cache adds to it. Raises CacheError where there
    is no cache, CacheDamageError for files that arrive wrong, CacheMismatchError when another cache is at `path`.
    """
    root = as_path(path)
    try:
        yield from _pulled(url, root, examples, arrays, workers)
    except OSError as error:
        raise write_error(root, error) from error


def planned_pull(
    url: str,
    path: str | Path,
    *,
    examples: tuple[int, int] | None = None,
    arrays: Callable[[CacheManifest], Collection[str]] | None = None,
) -> PlannedTransfer:
    """What `pull` would fetch: its parameters are those of `pull`. Nothing is written to `path`.

    The records of the shards are fetched to find out: some kilobytes for each. Raises CacheError and CacheMismatchError as `pull`.
    """
    root, tally, stop = as_path(path), Tally(), threading.Event()
    remote = open_remote(url)
    with tempfile.TemporaryDirectory(prefix="kd-dry-run-") as folder:
        _refuse_other_files(root)
        staging = Path(folder)
        manifest, part = describe(remote, staging)
        wanted = part_of(manifest, examples=examples, arrays=None if arrays is None else arrays(manifest))
        wanted = _offered(remote, wanted, part, everything=examples is None and arrays is None)
        _held(root, staging, manifest)
        entries: dict[str, Entry] = dict(manifest.files) | {MANIFEST: commits.file_entry(staging / MANIFEST)}
        for index in wanted.shards:
            _bring_commit(remote, staging, staging, manifest, index, wanted, tally, stop)
            record = commits.read_commit(staging, manifest, index)
            entries[f"commits/{index:05d}.json"] = commits.file_entry(commits.commit_path(staging, index))
            entries |= {name: record.files[name] for name in _names(manifest, wanted, index)}
    return PlannedTransfer.of(entries, {name for name, entry in entries.items() if holds(root, name, entry)})


def _pulled(
    url: str,
    root: Path,
    examples: tuple[int, int] | None,
    arrays: Callable[[CacheManifest], Collection[str]] | None,
    workers: int,
) -> Iterator[Progress[Transferred]]:
    remote, tally, stop = open_remote(url), Tally(), threading.Event()
    with _staging(root) as staging:
        manifest, part = describe(remote, staging, held=root, arrived=lambda n: tally.add(moved=max(n, 0)))
        wanted = part_of(manifest, examples=examples, arrays=None if arrays is None else arrays(manifest))
        wanted = _offered(remote, wanted, part, everything=examples is None and arrays is None)
        held = _held(root, staging, manifest)
        part = held.joined(wanted, manifest) if held is not None else wanted
        wanted = part if held is None or held != whole(manifest) else wanted
        for name, entry in manifest.files.items():
            tally.add(total=int(entry["bytes"]))
            _bring(remote, root, staging, name, entry, tally, stop)
        jobs: Iterable[Callable[[], None]] = (
            partial(_bring_commit, remote, root, staging, manifest, i, wanted, tally, stop) for i in wanted.shards
        )
        for _ in in_parallel(jobs, workers, stop):
            yield tally.now()
        _refuse_full_disk(root, tally)
        jobs = _data_jobs(remote, root, staging, manifest, wanted, tally, stop)
        for _ in in_parallel(jobs, workers, stop):
            yield tally.now()
        for index in wanted.shards:
            _publish(staging, root, f"commits/{index:05d}.json")
        if part == whole(manifest):
            (root / PARTIAL).unlink(missing_ok=True)
            sync_folder(root)
        else:
            part.save(root, manifest)
        _publish(staging, root, MANIFEST)
    yield tally.end(None if part == whole(manifest) else part)


def _offered(remote: Remote, wanted: Part, offered: Part | None, everything: bool) -> Part:
    """The part to fetch from a remote that may hold a part itself. Raises CacheError where it does not hold all of `wanted`."""
    if offered is None:
        return wanted
    if everything:
        return offered
    if not (set(wanted.shards) <= set(offered.shards) and set(wanted.arrays) <= set(offered.arrays)):
        raise CacheError(
            "this copy does not hold all of that",
            where=remote.url,
            found=f"{len(offered.shards)} shards; arrays {', '.join(offered.arrays)}",
        )
    return wanted


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """The staging folder, locked against other pulls. It is removed at the end, and kept after an error for the next attempt."""
    _refuse_other_files(root)
    commits.refuse_outside(root, f"{STAGING}/lock")
    _refuse_foreign(root / STAGING)
    lock = FileLock(root / STAGING / "lock")
    try:
        (root / STAGING).mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise CacheError("another pull is writing there", where=root, try_="wait for it, or another path") from error
    except OSError as error:
        raise write_error(root, error) from error
    try:
        yield root / STAGING
        shutil.rmtree(root / STAGING)
        sync_folder(root)
    finally:
        lock.release()


def _refuse_other_files(root: Path) -> None:
    """Raise CacheError for a folder with files that are not a cache's."""
    if root.is_dir() and not (root / MANIFEST).exists():
        expected = {
            MANIFEST,
            VOCABULARY,
            *TABLES,
            "lengths",
            TARGETS,
            ANSWERS,
            "commits",
            "examples",
            PARTIAL,
            *BESIDE,
        }
        foreign = sorted(p.name for p in root.iterdir() if p.name not in expected and not unfinished(p.name))
        if foreign:
            building = BUILDING in foreign
            raise CacheError(
                "a build is not finished there" if building else "the directory is not empty and not a cache",
                where=root,
                found=", ".join(foreign[:5]),
                expected="an empty or new directory",
                try_="another path",
            )


def _refuse_foreign(staging: Path) -> None:
    """Raise CacheError for a link, a pipe or a device among the files of an earlier pull: the pull would append to it."""
    for path in staging.rglob("*"):
        mode = path.lstat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise CacheError(
                "no pull has left this file", where=path, found="a link, a pipe or a device", try_=f"remove {staging}"
            )


def _held(root: Path, staging: Path, manifest: CacheManifest) -> Part | None:
    """The part of this cache that lies at `root`; None for nothing. Raises CacheMismatchError for another cache."""
    if not os.path.lexists(root / MANIFEST):
        return None
    try:
        held = read_plain(root / MANIFEST, MAX_JSON_BYTES, inside=root)
    except OSError:  # as an unreadable manifest
        return None
    if held != (staging / MANIFEST).read_bytes():
        try:
            other = load_manifest(root)
        except CacheDamageError:  # an unreadable manifest is replaced
            return None
        raise_mismatch(root, manifest, other)
    with suppress(CacheDamageError):
        return load_part(root, manifest) or whole(manifest)
    return None


def _bring(
    remote: Remote, root: Path, staging: Path, name: str, entry: Entry, tally: Tally, stop: threading.Event
) -> None:
    if holds(root, name, entry):
        tally.add(done=int(entry["bytes"]))
        return
    staged = staging / name
    tally.add(done=staged.stat().st_size if staged.exists() else 0)
    fetch(remote, name, staged, entry, stop=stop, arrived=tally.arrived)
    _publish(staging, root, name)
    tally.add(files=1)


def _publish(staging: Path, root: Path, name: str) -> None:
    if (staging / name).exists():
        commits.refuse_outside(root, name)
        try:
            publish(staging / name, root / name)
        except OSError as error:
            raise write_error(root / name, error) from error


def _bring_commit(
    remote: Remote,
    root: Path,
    staging: Path,
    manifest: CacheManifest,
    index: int,
    part: Part,
    tally: Tally,
    stop: threading.Event,
) -> None:
    """Fetch a commit to the staging folder, checked against the manifest, and add its files of this part to the total."""
    name = f"commits/{index:05d}.json"
    if not any(_has_commit(folder, name, manifest.commits[index]) for folder in (root, staging)):
        try:
            data = fetch_small(remote, name, COMMIT_BYTES, sha256=manifest.commits[index], stop=stop)
        except FileNotFoundError as error:
            raise CacheDamageError("a file is missing from the cache", where=remote.url, file=name) from error
        (staging / "commits").mkdir(exist_ok=True)
        (staging / name).write_bytes(data)
        tally.add(moved=len(data), files=1)
    record = commits.read_commit(staging if (staging / name).exists() else root, manifest, index)
    tally.add(total=sum(int(record.files[n]["bytes"]) for n in _names(manifest, part, index)))


def _has_commit(folder: Path, name: str, sha256: str) -> bool:
    try:
        return hashlib.sha256(read_plain(folder / name, COMMIT_BYTES, inside=folder)).hexdigest() == sha256
    except OSError:
        return False


def _names(manifest: CacheManifest, part: Part, index: int) -> list[str]:
    """Files of a shard that belong to a part. The names are made here; those in a commit are only compared with them."""
    arrays = [a for a in manifest.arrays if a.name in part.arrays]
    return list(commits.shard_files(arrays, index).values())


def _data_jobs(
    remote: Remote, root: Path, staging: Path, manifest: CacheManifest, part: Part, tally: Tally, stop: threading.Event
) -> Iterator[Callable[[], None]]:
    for index in part.shards:
        staged = (staging / f"commits/{index:05d}.json").exists()
        record = commits.read_commit(staging if staged else root, manifest, index)
        for name in _names(manifest, part, index):
            yield partial(_bring, remote, root, staging, name, record.files[name], tally, stop)


def _refuse_full_disk(root: Path, tally: Tally) -> None:
    """Raise CacheError where the rest cannot fit on the disk. Files that are there already may be counted twice."""
    there = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    free = shutil.disk_usage(root).free
    if tally.total - there > free:
        raise CacheError(
            "the disk is too small for this",
            where=root,
            found=f"{free:,} bytes free",
            expected=f"{tally.total - there:,}",
            try_="--examples or --arrays for a part of it",
        )
