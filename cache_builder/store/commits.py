"""What exists: commits, one per shard, and the files they name with size and SHA-256.

Zarr reads a missing or emptied file as zeros without a word, so nothing trusts it, or a folder's listing, to say what
is there: a shard exists if and only if its commit does, and a file is read after it was compared with its commit.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from kd.cache_builder.store.arrays import ArraySpec
from kd.cache_builder.store.manifest import (
    ANSWERS,
    BUILDING,
    MANIFEST,
    TARGETS,
    VOCABULARY,
    CacheManifest,
    ShardRecord,
    shard_record,
)
from kd.cache_builder.store.part import load_part, refuse_absent
from kd.common.errors import CacheDamageError
from kd.common.files import read_json, sha256_of

OWN_NAMES = {MANIFEST, BUILDING, VOCABULARY, "examples", TARGETS, "commits", ANSWERS}
"""What lies in a cache's folder."""


class Origin(Protocol):
    """Where files of a cache come from that are not on this disk yet; see `mirror`."""

    def commit(self, index: int) -> None:
        """Have a commit on this disk."""

    def verified(self, name: str, entry: Mapping[str, Any]) -> bytes:
        """The bytes of a file, as recorded in `entry`."""

    def ask(self, shards: Sequence[int], arrays: Iterable[str] | None) -> None:
        """Say which shards will be read next, and which of their `shard_files`; None = all."""


ORIGINS: dict[Path, Origin] = {}
"""Directories that are mirrors -> what they mirror."""


def ask(root: Path, shards: Sequence[int], arrays: Iterable[str] | None = None) -> None:
    """Say what will be read next; nothing to do where all of the cache is on this disk."""
    if root in ORIGINS:
        ORIGINS[root].ask(shards, arrays)


def commit_path(root: Path, index: int) -> Path:
    """Where shard `index` is committed."""
    return root / "commits" / f"{index:05d}.json"


def shard_files(arrays: Sequence[ArraySpec], index: int) -> dict[str, str]:
    """Array name (or `examples`) -> path in the cache of shard `index`'s file."""
    files = {a.name: f"{TARGETS}/{a.name}/c/{index}" + ("" if a.columns is None else "/0") for a in arrays}
    return files | {"examples": f"examples/{index:05d}.parquet"}


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a commit records them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def committed(root: Path, shards: int) -> list[int]:
    """Indices of committed shards, ascending."""
    if root in ORIGINS:
        return list(range(shards))
    return [i for i in range(shards) if commit_path(root, i).is_file()]


def read_commit(root: Path, manifest: CacheManifest, index: int) -> ShardRecord:
    """The record of a committed shard, checked against the manifest. Raises CacheDamageError."""
    path = commit_path(root, index)
    if root in ORIGINS:
        ORIGINS[root].commit(index)
    if not path.exists():
        refuse_absent(root, manifest, index)
    document = read_json(path)
    record = shard_record(document, path)
    first, stop, rows = manifest.shards[index]
    expected = (index, (first, stop), index * manifest.layout.shard_rows, rows, manifest.fingerprint)
    found = (record.index, record.examples, record.row_start, record.rows, record.fingerprint)
    names = set(shard_files(manifest.arrays, index).values())
    if found != expected or set(record.files) != names:
        raise CacheDamageError("a commit does not belong to this shard", where=path, shard=index)
    if manifest.complete and sha256_of(path) != manifest.commits[index]:
        raise CacheDamageError("a commit was changed after the cache was finished", where=path, shard=index)
    return record


def file_size(root: Path, name: str, **where: object) -> int:
    """Bytes of a file of the cache. Raises CacheDamageError where it is missing, no plain file, or outside the cache."""
    path = root / name
    try:
        found = path.stat()
    except OSError as error:
        raise CacheDamageError("a file of the cache is missing", file=path, **where, try_="kd cache repair") from error
    if not stat.S_ISREG(found.st_mode) or not inside(root, path):
        raise CacheDamageError(
            "a file of the cache is not a file in its folder",
            file=path,
            **where,
            found="a link that leaves it, or no plain file",
            try_="kd cache repair",
        )
    return found.st_size


def inside(root: Path, path: Path) -> bool:
    """Does a path stay in the cache, links followed?"""
    return path.resolve().is_relative_to(root.resolve())


def stored_bytes(root: Path, manifest: CacheManifest, index: int) -> dict[str, int]:
    """Array name (or `examples`) -> bytes of each file of a shard that this copy holds; a mirror's as committed."""
    files = shard_files(manifest.arrays, index)
    if root in ORIGINS:
        entries = read_commit(root, manifest, index).files
        return {array: int(entries[name]["bytes"]) for array, name in files.items()}
    part = load_part(root, manifest)
    return {
        array: file_size(root, name, shard=index)
        for array, name in files.items()
        if part is None or array == "examples" or array in part.arrays
    }


def verified_bytes(root: Path, name: str, entry: Mapping[str, Any], **where: object) -> bytes:
    """The bytes of a file of the cache. Raises CacheDamageError unless size and SHA-256 are the recorded ones."""
    if root in ORIGINS:
        return ORIGINS[root].verified(name, entry)
    path, size = root / name, file_size(root, name, **where)
    data = path.read_bytes() if size == entry["bytes"] else b""
    _refuse(path, entry, len(data) if data else size, lambda: hashlib.sha256(data).hexdigest(), where)
    return data


def verify_file(root: Path, name: str, entry: Mapping[str, Any], **where: object) -> None:
    """The same without holding the bytes: for files that nobody reads now."""
    if root in ORIGINS:
        ORIGINS[root].verified(name, entry)
        return
    path, size = root / name, file_size(root, name, **where)
    _refuse(path, entry, size, lambda: sha256_of(path), where)


def _refuse(
    path: Path, entry: Mapping[str, Any], size: int, digest: Callable[[], str], where: Mapping[str, object]
) -> None:
    if size != entry["bytes"]:
        raise CacheDamageError(
            "a file of the cache has another size",
            file=path,
            **where,
            found=f"{size} bytes",
            expected=f"{entry['bytes']} bytes",
            try_="kd cache repair",
        )
    if digest() != entry["sha256"]:
        raise CacheDamageError(
            "a file of the cache was changed",
            file=path,
            **where,
            found="another SHA-256 than committed",
            try_="kd cache repair",
        )
