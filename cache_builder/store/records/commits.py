"""Commits: one file per shard, which lists the shard's files with size and SHA-256.

A shard exists if and only if its commit does. Zarr reads a missing or emptied file as zeros without an error, so neither Zarr
nor a folder's listing is trusted to tell what is there. These functions take the folder on this disk; readers take
`CacheFiles`, which may fetch the commit first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from io import BufferedReader
from pathlib import Path
from typing import Any

from kd.cache_builder.store.encoding.arrays import ArraySpec
from kd.cache_builder.store.records.cache_tables import SHARDS, TABLES
from kd.cache_builder.store.records.manifest import (
    ANSWERS,
    BUILDING,
    MANIFEST,
    TARGETS,
    VOCABULARY,
    CacheManifest,
    load_manifest,
)
from kd.cache_builder.store.records.part import refuse_absent
from kd.cache_builder.store.records.shard_record import ShardRecord, parse_shard_record
from kd.common.errors import CacheDamageError, CacheError
from kd.common.files import read_json, sha256_of, unfinished
from kd.common.strangers.plain_files import NotPlainError, is_inside, open_plain

COMMIT_NAME = re.compile(r"[0-9]{5}\.json|[1-9][0-9]{5,9}\.json")
CACHE_NAMES = {MANIFEST, BUILDING, VOCABULARY, *TABLES, "lengths", "examples", TARGETS, "commits", ANSWERS}
"""Names of the files and folders of a cache."""


def commit_path(root: Path, index: int) -> Path:
    """Path of the commit of shard `index`."""
    return root / "commits" / f"{index:05d}.json"


def shard_files(arrays: Sequence[ArraySpec], index: int) -> dict[str, str]:
    """Array name (or `examples`) -> path in the cache of shard `index`'s file."""
    files = {}
    for a in arrays:
        numbers = [str(index)] if a.columns is None or a.ragged else [str(index), "0"]
        files[a.name] = f"{TARGETS}/{a.name}/" + a.separator.join(["c", *numbers])
    return files | {"examples": f"examples/{index:05d}.parquet"}


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file, as a commit records them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def committed(root: Path, shards: int) -> list[int]:
    """Indices of the committed shards among the first `shards`, ascending."""
    try:
        names = os.listdir(root / "commits")  # once, however many shards there are
    except (FileNotFoundError, NotADirectoryError):
        return []
    numbers = sorted(int(name.removesuffix(".json")) for name in names if COMMIT_NAME.fullmatch(name))
    return [i for i in numbers if i < shards]


def read_commit(root: Path, manifest: CacheManifest, index: int) -> ShardRecord:
    """The record of a committed shard, checked against the manifest. Raises CacheDamageError."""
    path = commit_path(root, index)
    if not os.path.lexists(path):
        refuse_absent(root, manifest, index)
    document = read_json(path, inside=root)
    record = parse_shard_record(document, path)
    first, stop, rows = manifest.shards[index]
    expected = (index, (first, stop), index * manifest.layout.shard_rows, rows, manifest.fingerprint)
    recorded = (record.index, record.examples, record.row_start, record.rows, record.fingerprint)
    names = set(shard_files(manifest.arrays, index).values())
    if recorded != expected or set(record.files) != names:
        raise CacheDamageError("a commit does not belong to this shard", where=path, shard=index)
    if manifest.complete and sha256_of(path) != manifest.commits[index]:
        raise CacheDamageError("a commit was changed after the cache was finished", where=path, shard=index)
    return record


def check_sizes(root: Path, manifest: CacheManifest, shards: Iterable[int]) -> None:
    """Compare the files of committed shards with their commits, by size alone. Raises CacheDamageError.

    Nothing is read but the commits, so this is fast enough for every build. `kd cache verify` compares the bytes.
    """
    for index in shards:
        for name, entry in read_commit(root, manifest, index).files.items():
            size = file_size(root, name, shard=index)
            if size != entry["bytes"]:
                raise CacheDamageError(
                    "a file of the cache has another size than its commit says",
                    file=root / name,
                    shard=index,
                    found=f"{size} bytes",
                    expected=f"{entry['bytes']} bytes",
                    try_=f"kd cache repair {root}",
                )


def open_file(root: Path, name: str, **where: object) -> BufferedReader:
    """Open a file of a cache. Raises CacheDamageError where it is missing, not a plain file, or outside the cache."""
    path = root / name
    try:
        return open_plain(path, inside=root)
    except NotPlainError as error:
        raise CacheDamageError(
            "a file of the cache is not a file in its folder",
            file=path,
            **where,
            found=error.strerror,
            try_="kd cache repair",
        ) from error
    except OSError as error:
        raise CacheDamageError(
            "a file of the cache is missing", file=path, **where, found=error.strerror, try_="kd cache repair"
        ) from error


def file_size(root: Path, name: str, **where: object) -> int:
    """Size of a file in bytes. Raises as `open_file`."""
    with open_file(root, name, **where) as file:
        return os.fstat(file.fileno()).st_size


def refuse_outside(root: Path, name: str) -> None:
    """Raise CacheError where a file of the cache would be written outside its folder, because a folder in it is a link."""
    if not is_inside((root / name).parent, root):
        raise CacheError(
            "a folder of the cache is a link that leaves it",
            where=(root / name).parent,
            found=os.path.realpath((root / name).parent),
            try_="remove the link",
        )


def existing_cache(out: Path) -> CacheManifest | None:
    """The manifest under `out`, None for a fresh directory.

    Raises CacheError for a directory without a manifest that holds other things than a cache does.
    """
    if not out.exists():
        return None
    if not out.is_dir():
        raise CacheError("the output is not a directory", where=out, try_="another --out")
    if (out / MANIFEST).exists() or (out / BUILDING).exists():
        return None if _only_begun(out) else load_manifest(out)
    foreign = sorted(p.name for p in out.iterdir() if p.name not in CACHE_NAMES and not unfinished(p.name))
    if foreign:
        raise CacheError(
            "the output directory is not empty and not a cache",
            where=out,
            found=", ".join(foreign[:5]),
            expected="an empty or new directory",
        )
    return None


def _only_begun(out: Path) -> bool:
    """Whether a builder has written `building.json` and was killed, or is at work, before the tables were at their names.

    There is no shard yet. `ShardWriter.create` compares what the document says with this build, and publishes what is missing.
    """
    document = read_json(out / BUILDING, inside=out) if not (out / MANIFEST).exists() else {}
    begun = SHARDS in (document.get("files") or ()) and not os.path.lexists(out / SHARDS)
    return begun and not os.path.isdir(out / "commits")
