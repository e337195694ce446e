"""Repair a damaged cache: from a second copy, or by building the damaged shards again. Sound files are not touched.

    for step in mend(root, copy, findings): ...    # damaged files from another copy, each compared with its digest
    reopen(root, findings)               # or: damaged shards are given up, and the cache is a build to continue

`reopen` removes the commits of damaged shards, then turns `manifest.json` back into `building.json`; the same build command
builds these shards and ends with the bytes there were. Killed at any point, the cache still records what it lacks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.cache_builder.store.cache_files import CacheFiles, LocalFiles
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.cache_tables import COMMITS, TABLES
from kd.cache_builder.store.records.manifest import BUILDING, MANIFEST, CacheManifest, load_manifest
from kd.cache_builder.store.records.shard_record import parse_shard_record
from kd.cache_builder.upkeep.verify import Finding
from kd.common.errors import CacheDamageError, CacheMismatchError
from kd.common.files import MAX_JSON_BYTES, process_tag, publish, read_json, sync_folder, write_error
from kd.common.progress import Progress
from kd.common.strangers.plain_files import read_plain


@dataclass(frozen=True)
class Mended:
    """What became of the damaged files."""

    mended: tuple[str, ...]
    """Files that were replaced."""
    failed: tuple[str, ...]
    """Files that are damaged or missing in the copy too."""


def mend_manifest(root: Path, copy: CacheFiles) -> list[str]:
    """Replace an unreadable manifest, and the tables that are read with it, by the copy's. Returns the files that were replaced.

    Raises CacheMismatchError where a commit shows that the copy is of another cache.
    """
    try:
        load_manifest(root)
    except CacheDamageError:
        theirs = load_manifest(copy.root)
        for index, (first, stop, rows) in enumerate(theirs.shards):
            with suppress(CacheDamageError):
                path = commits.commit_path(root, index)
                record = parse_shard_record(read_json(path, inside=root), path)
                names = set(commits.shard_files(theirs.arrays, index).values())
                stated = (record.fingerprint, record.examples, record.rows, set(record.files))
                if stated != (theirs.fingerprint, (first, stop), rows, names):
                    raise CacheMismatchError(
                        "the copy is of another cache",
                        cache=root,
                        copy=copy.root,
                        found=theirs.fingerprint,
                        expected=record.fingerprint,
                    ) from None
        replaced = []
        for name in (n for n in TABLES if n in theirs.files):
            if not is_sound(root, name, theirs.files[name]):
                _put(root, name, copy.verified_bytes(name, theirs.files[name]))
                replaced.append(name)
        document = read_plain(copy.root / MANIFEST, MAX_JSON_BYTES, inside=copy.root)
        if not _holds(root, MANIFEST, document):
            _put(root, MANIFEST, document)
            replaced.append(MANIFEST)
        (root / BUILDING).unlink(missing_ok=True)
        return replaced
    return []


def is_sound(root: Path, name: str, entry: dict[str, Any]) -> bool:
    """Whether a file of the cache is there with the recorded size and SHA-256."""
    try:
        LocalFiles(root).verify_file(name, entry)
    except CacheDamageError:
        return False
    return True


def _holds(root: Path, name: str, data: bytes) -> bool:
    with suppress(OSError):
        return read_plain(root / name, len(data), inside=root) == data
    return False


def mend(root: Path, copy: CacheFiles, findings: Sequence[Finding]) -> Iterator[Progress[Mended]]:
    """Replace the files that `findings` name by those of `copy`, if these match the digests that this cache has recorded.

    Progress counts damaged files and shards.
    """
    manifest, files = load_manifest(root), LocalFiles(root)
    shards = sorted({f.shard for f in findings if f.shard is not None})
    names = [f.where for f in findings if f.shard is None and f.where in manifest.files]
    mended: list[str] = []
    failed: list[str] = []
    total = len(names) + len(shards)
    done = 0
    for name in names:
        _take(root, copy, name, manifest.files[name], mended, failed)
        done += 1
        yield Progress(done, total, note=f"{len(mended)} files")
    for index in shards:
        commit = commits.commit_path(root, index).relative_to(root).as_posix()
        try:
            record = commits.read_commit(root, manifest, index)
        except CacheDamageError:
            if not _take_commit(root, copy, manifest, index):
                failed.append(commit)
                done += 1
                continue
            mended.append(commit)
            record = commits.read_commit(root, manifest, index)
        for name, entry in record.files.items():
            try:
                files.verify_file(name, entry)
            except CacheDamageError:
                _take(root, copy, name, entry, mended, failed)
        done += 1
        yield Progress(done, total, note=f"{len(mended)} files")
    yield Progress(total, total, Mended(tuple(mended), tuple(failed)), f"{len(mended)} files")


def _take(root: Path, copy: CacheFiles, name: str, entry: dict[str, Any], mended: list[str], failed: list[str]) -> None:
    try:
        _put(root, name, copy.verified_bytes(name, entry))
        mended.append(name)
    except CacheDamageError:
        failed.append(name)


def _take_commit(root: Path, copy: CacheFiles, manifest: CacheManifest, index: int) -> bool:
    """Replace a commit by the copy's, if its digest is the one in the manifest. Returns True if it was replaced."""
    if not manifest.complete or index not in copy.committed(len(manifest.shards)):
        return False
    try:
        copy.read_commit(manifest, index)
        data = read_plain(commits.commit_path(copy.root, index), MAX_JSON_BYTES, inside=copy.root)
    except (CacheDamageError, OSError):
        return False
    if hashlib.sha256(data).hexdigest() != manifest.commits[index]:
        return False
    _put(root, commits.commit_path(root, index).relative_to(root).as_posix(), data)
    return True


def _put(root: Path, name: str, data: bytes) -> None:
    path = root / name
    commits.refuse_outside(root, name)
    temporary = path.with_name(f".{path.name}.json.{process_tag()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        publish(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise write_error(root, error) from error


def reopen(root: Path, findings: Sequence[Finding]) -> CacheManifest:
    """Remove the damaged shards and files, so that the build command makes them again. Returns the manifest of that build."""
    try:
        return _reopened(root, load_manifest(root), findings)
    except OSError as error:
        raise write_error(root, error) from error


def _reopened(root: Path, manifest: CacheManifest, findings: Sequence[Finding]) -> CacheManifest:
    for index in sorted({f.shard for f in findings if f.shard is not None}):
        commits.commit_path(root, index).unlink(missing_ok=True)
    sync_folder(root / "commits")
    for name in {f.where for f in findings if f.shard is None} & set(manifest.files):
        (root / name).unlink(missing_ok=True)
    if manifest.complete:
        manifest = manifest.reopened()
        manifest.save(root, BUILDING)
        (root / MANIFEST).unlink()
        (root / COMMITS).unlink(missing_ok=True)
        sync_folder(root)
    return manifest
