"""Mend a damaged cache: from a second copy, or by building the damaged shards again. Nothing sound is touched.

    for step in mend(root, copy): ...    # damaged files from another copy, each compared with its digest
    reopen(root, findings)               # or: damaged shards are given up, and the cache is a build to continue

`reopen` takes the commits of damaged shards away, then turns `manifest.json` back into `building.json`; the same build command
fills the gaps and ends with the bytes there were. Killed anywhere in between, the cache says what it lacks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd.cache_builder.store import commits
from kd.cache_builder.store.manifest import BUILDING, MANIFEST, CacheManifest, load_manifest, shard_record
from kd.cache_builder.upkeep.verify import Finding
from kd.common.errors import CacheDamageError, CacheMismatchError
from kd.common.files import process_tag, publish, read_json, sync_folder


@dataclass(frozen=True)
class MendProgress:
    """Damaged files looked at so far."""

    done: int
    total: int
    mended: tuple[str, ...]
    """Files that were replaced."""
    failed: tuple[str, ...]
    """Files that the copy does not have as they were committed either."""


def mend_manifest(root: Path, copy: Path) -> bool:
    """Replace an unreadable manifest by the copy's, if both are of one cache. Returns whether it did.

    Raises CacheMismatchError where a commit says that the copy is of another cache.
    """
    try:
        load_manifest(root)
    except CacheDamageError:
        theirs = load_manifest(copy)
        for index, (first, stop, rows) in enumerate(theirs.shards):
            with suppress(CacheDamageError):
                path = commits.commit_path(root, index)
                found = shard_record(read_json(path), path)
                if (found.fingerprint, found.examples, found.rows) != (theirs.fingerprint, (first, stop), rows):
                    raise CacheMismatchError(
                        "the copy is of another cache",
                        cache=root,
                        copy=copy,
                        found=theirs.fingerprint,
                        expected=found.fingerprint,
                    ) from None
        _put(root, MANIFEST, (copy / MANIFEST).read_bytes())
        (root / BUILDING).unlink(missing_ok=True)
        return True
    return False


def mend(root: Path, copy: Path, findings: Sequence[Finding]) -> Iterator[MendProgress]:
    """Replace what `findings` name by the files of `copy`, where those are what this cache's own commits want."""
    manifest = load_manifest(root)
    shards = sorted({f.shard for f in findings if f.shard is not None})
    names = [f.where for f in findings if f.shard is None and f.where in manifest.files]
    mended: list[str] = []
    failed: list[str] = []
    total = len(names) + len(shards)
    done = 0
    for name in names:
        _take(root, copy, name, manifest.files[name], mended, failed)
        done += 1
        yield MendProgress(done, total, tuple(mended), tuple(failed))
    for index in shards:
        commit = commits.commit_path(root, index).relative_to(root).as_posix()
        try:
            record = commits.read_commit(root, manifest, index)
        except CacheDamageError:
            if not manifest.complete or not _take_commit(root, copy, commit, manifest.commits[index], mended):
                failed.append(commit)
                done += 1
                continue
            record = commits.read_commit(root, manifest, index)
        for name, entry in record.files.items():
            try:
                commits.verify_file(root, name, entry)
            except CacheDamageError:
                _take(root, copy, name, entry, mended, failed)
        done += 1
        yield MendProgress(done, total, tuple(mended), tuple(failed))
    yield MendProgress(total, total, tuple(mended), tuple(failed))


def _take(root: Path, copy: Path, name: str, entry: dict[str, Any], mended: list[str], failed: list[str]) -> None:
    try:
        _put(root, name, commits.verified_bytes(copy, name, entry))
        mended.append(name)
    except CacheDamageError:
        failed.append(name)


def _take_commit(root: Path, copy: Path, name: str, sha256: str, mended: list[str]) -> bool:
    try:
        data = (copy / name).read_bytes()
    except OSError:
        return False
    if hashlib.sha256(data).hexdigest() != sha256:
        return False
    _put(root, name, data)
    mended.append(name)
    return True


def _put(root: Path, name: str, data: bytes) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.json.{process_tag()}.tmp")
    temporary.write_bytes(data)
    publish(temporary, path)


def reopen(root: Path, findings: Sequence[Finding]) -> CacheManifest:
    """Give the damaged shards and files up, so that the build command continues where they were. Returns its manifest."""
    manifest = load_manifest(root)
    for index in sorted({f.shard for f in findings if f.shard is not None}):
        commits.commit_path(root, index).unlink(missing_ok=True)
    sync_folder(root / "commits")
    for name in {f.where for f in findings if f.shard is None} & set(manifest.files):
        (root / name).unlink(missing_ok=True)
    if manifest.complete:
        manifest = replace(manifest, commits=(), quality={})
        manifest.save(root, BUILDING)
        (root / MANIFEST).unlink()
        sync_folder(root)
    return manifest
