"""Publish a shard so that one builder's files become the shard, whole, and no late builder replaces them.

    folder = prepare_shard(staging, manifest, 3, quality)     # TAG/: all files of the shard, and its commit
    offer(root, 3, folder)                              # one rename to `.ready-00003`
    settle(root, manifest, 3)                           # the files to their names, then the commit to `commits/00003.json`

A rename of a folder onto a folder that is not empty fails on every file system, so of several builders one is chosen. From then
on the bytes of the shard are decided: whoever settles it, once or twice, before or after a crash, moves the same files. The
commit comes last, is never replaced, and ends the offer. A builder that offers after the commit finds the commit, and its own
files are removed. One that was stopped in the middle moves nothing of a later offer, because TAG is in all its paths.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kd.cache_builder.store.records.commits import commit_path, file_entry, shard_files
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.cache_builder.store.records.shard_record import ShardRecord, parse_shard_record
from kd.common.errors import CacheDamageError
from kd.common.files import (
    canonical_json,
    digest_of,
    process_tag,
    publish_first,
    read_json,
    sha256_of,
    sync_file,
    sync_folder,
)

COMMIT = "commit.json"
"""Name of the commit in an offer. The other files have the names of their arrays."""


def prepare_shard(staging: Path, manifest: CacheManifest, index: int, quality: dict[str, float]) -> Path:
    """Gather a shard's files, which lie under `staging` as they will in the cache, and its commit. Returns their folder."""
    folder = staging / f"ready-{index}"
    shutil.rmtree(folder, ignore_errors=True)
    inner = folder / staging.name.removeprefix(".staging-")
    inner.mkdir(parents=True)
    names = shard_files(manifest.arrays, index)
    first, stop, rows = manifest.shards[index]
    record = ShardRecord(
        index=index,
        examples=(first, stop),
        row_start=index * manifest.layout.shard_rows,
        rows=rows,
        files={name: file_entry(staging / name) for name in names.values()},
        quality=quality,
        fingerprint=manifest.fingerprint,
    )
    for key, name in names.items():
        (staging / name).rename(inner / key)
    document = asdict(record)
    text = canonical_json(document | {"checksum": digest_of(document)})
    (inner / COMMIT).write_text(text, encoding="utf-8")
    return folder


def offer(root: Path, index: int, folder: Path) -> bool:
    """Offer the shard in `folder`, which holds one folder of a unique name. Returns False where another was offered before."""
    for inner in folder.iterdir():
        for path in inner.iterdir():
            sync_file(path)
        sync_folder(inner)
    sync_folder(folder)
    try:
        os.rename(folder, offer_path(root, index))
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return False
        raise
    sync_folder(root)
    return True


def settle(root: Path, manifest: CacheManifest, index: int, *, trusted: bool = False) -> bool:
    """Finish what was offered of shard `index`, if anything was. Returns whether the shard is committed.

    Files of an offer that are missing or not as its commit says end the offer; `trusted` skips that check.
    """
    offer = offer_path(root, index)
    with suppress(FileNotFoundError):
        for folder in list(offer.iterdir()):
            if not commit_path(root, index).exists() and (trusted or _is_whole(root, manifest, index, folder)):
                _move(root, manifest, index, folder)
            _discard(root, folder)
        with suppress(OSError):  # another offer
            offer.rmdir()
    return commit_path(root, index).exists()


def settle_all(root: Path, manifest: CacheManifest) -> None:
    """Finish all offers that killed builders have left."""
    for offer in sorted(root.glob(".ready-*")):
        number = offer.name.removeprefix(".ready-")
        if number.isdigit() and int(number) < len(manifest.shards):
            settle(root, manifest, int(number))


def offer_path(root: Path, index: int) -> Path:
    """Folder of the offer of shard `index`."""
    return root / f".ready-{index:05d}"


def _move(root: Path, manifest: CacheManifest, index: int, folder: Path) -> None:
    for key, name in shard_files(manifest.arrays, index).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # somebody else moved it
            os.replace(folder / key, root / name)
        sync_folder((root / name).parent)
    commit_path(root, index).parent.mkdir(parents=True, exist_ok=True)
    with suppress(FileNotFoundError):
        publish_first(folder / COMMIT, commit_path(root, index))


def _is_whole(root: Path, manifest: CacheManifest, index: int, folder: Path) -> bool:
    """Whether every file of the offer is as its commit says, in the offer or at its name already."""
    try:
        record = parse_shard_record(read_json(folder / COMMIT), folder / COMMIT)
    except CacheDamageError:
        return False
    files = shard_files(manifest.arrays, index)
    if record.fingerprint != manifest.fingerprint or record.index != index or set(record.files) != set(files.values()):
        return False
    return all(
        _holds(folder / key, record.files[name]) or _holds(root / name, record.files[name])
        for key, name in files.items()
    )


def _holds(path: Path, entry: Mapping[str, Any]) -> bool:
    try:
        return bool(path.stat().st_size == entry["bytes"] and sha256_of(path) == entry["sha256"])
    except OSError:
        return False


def _discard(root: Path, folder: Path) -> None:
    """End an offer. Its folder is moved away first, so that nobody finds half of it."""
    trash = root / f".staging-{process_tag()}.{10**6 + secrets.randbelow(10**9)}"  # beyond the numbers of writers
    with suppress(FileNotFoundError):
        os.rename(folder, trash)
        shutil.rmtree(trash, ignore_errors=True)
