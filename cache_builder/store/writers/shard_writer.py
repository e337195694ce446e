"""Write shards of a cache whole: staged under another name, then published and committed.

    manifest.json  building.json     see `manifest`
    shards.parquet  commits.parquet  see `cache_tables`
    lengths/00000.parquet            see `lengths`
    vocabulary.parquet               the bytes every teacher id stands for
    examples/00000.parquet           id, task, split, prompt, target, context ids, number of rows, digest of the tokens
    targets.zarr/                    a plain Zarr v3 group; every array is [slots] or [slots, columns]
    commits/00000.json               one per shard, written last: row range, bytes and SHA-256 of each file

Shard i owns the row slots [i * shard_rows, (i+1) * shard_rows) of every array, one file per array, and the examples in one
Parquet file. Codecs are those of the Zarr v3 specification: sharding_indexed, transpose, bytes, blosc (zstd, shuffle or
bitshuffle), crc32c.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd.cache_builder.store.encoding.arrays import Arrays
from kd.cache_builder.store.lengths import Lengths, write_length_pages
from kd.cache_builder.store.records.cache_identity import refuse_mismatch
from kd.cache_builder.store.records.cache_tables import (
    COMMITS,
    SHARDS,
    write_shard_table,
)
from kd.cache_builder.store.records.commit_table import CommitTable
from kd.cache_builder.store.records.commits import (
    check_sizes,
    commit_path,
    committed,
    file_entry,
    read_commit,
)
from kd.cache_builder.store.records.manifest import (
    ANSWERS,
    BUILDING,
    MANIFEST,
    TARGETS,
    VOCABULARY,
    CacheManifest,
    group_files,
    load_manifest,
)
from kd.cache_builder.store.records.manifest_checks import check_limits, length_pages
from kd.cache_builder.store.writers.claims import Claims, all_claims, claim_path, void_claims
from kd.cache_builder.store.writers.commit_publishing import publish_commits, stored_bytes
from kd.cache_builder.store.writers.shard_publishing import offer, prepare_shard, settle, settle_all
from kd.cache_builder.store.writers.staged_files import create_group, stage_rows
from kd.common.errors import CacheError, CacheMismatchError
from kd.common.files import (
    MAX_JSON_BYTES,
    STAGING_LOCK,
    process_tag,
    publish,
    publish_first,
    read_json,
    sha256_of,
    sweep,
    sync_folder,
    unfinished,
    write_first,
)
from kd.common.processes import lock_of

_WRITERS = count()
START_SECONDS = 5.0
"""Time that a builder waits for the table of shards of another one that has just begun."""


class ShardWriter:
    """Writes whole shards of one cache. Any number of writers may work on disjoint shards."""

    def __init__(self, root: Path, manifest: CacheManifest) -> None:
        self.root = root
        self.manifest = manifest
        self.arrays = manifest.arrays
        self.staging = root / f".staging-{process_tag()}.{next(_WRITERS)}"
        self._began = False
        """Whether this writer has laid out the directory."""
        self._lock: int | None = None
        """Descriptor that keeps the staging folder locked; None before there is one, or where there are no locks."""

    def claims(self, name: str) -> Claims:
        """The claims of a builder of this name on shards of the cache."""
        return Claims(self.root, name)

    def committed(self) -> set[int]:
        """The shards that are committed."""
        return set(committed(self.root, len(self.manifest.shards)))

    def is_committed(self, index: int) -> bool:
        """Whether a shard is committed."""
        return commit_path(self.root, index).exists()

    def check_sizes(self, shards: Iterable[int]) -> None:
        """Compare the files of committed shards with their commits, by size alone. Raises CacheDamageError."""
        check_sizes(self.root, self.manifest, shards)

    def withdraw(self) -> None:
        """Remove the layout that `create` has made, if nothing came of it: the corrected command may use the folder.

        Where a shard was committed, or where another builder is at work, everything stays.
        """
        building = self.root / BUILDING
        held = any(claim.void is None for claim in all_claims(self.root))
        if not self._began or held or any((self.root / "commits").glob("*.json")) or not building.exists():
            return
        self.close()
        building.unlink()  # first: without it this is no cache, and a build begins anew
        for name in self._names():
            (self.root / name).unlink(missing_ok=True)
        for folder in [
            self.root / "lengths",
            *(self.root / TARGETS / a.name for a in self.arrays),
            self.root / TARGETS,
            self.root / "commits",
        ]:
            with suppress(OSError):  # it is not there, or holds what others put there
                folder.rmdir()

    def sweep(self) -> None:
        """Remove what killed builds have left behind on this host."""
        for folder in (self.root, self.root / "commits"):
            sweep(folder)
        void_claims(self.root)

    def recover(self, index: int | None = None) -> None:
        """Publish the whole shards, or the one shard, that killed builders had ready."""
        if index is None:
            settle_all(self.root, self.manifest)
        else:
            settle(self.root, self.manifest, index)

    def tidy(self) -> None:
        """Remove everything but the finished cache and what live builders on other hosts have staged."""
        self.close()
        self.sweep()
        self.recover()
        for claim in all_claims(self.root):  # a shard of a finished cache has no builder
            claim_path(self.root / "commits", claim.shard).unlink(missing_ok=True)
        if (self.root / BUILDING).exists():  # checked first: a finished cache may be on a read-only disk
            (self.root / BUILDING).unlink(missing_ok=True)
            sync_folder(self.root)

    def create(self, vocabulary: list[bytes], codes: np.ndarray, lengths: Iterable[Lengths]) -> CacheManifest:
        """Lay out the directory unless that was done: `building.json`, metadata, vocabulary, tables.

        vocabulary   bytes of every id
        codes        [V] those of `codes_by_count`
        lengths      tokens and rows of every example, in batches of any size: no more than a million are held at once

        `building.json` comes first and holds the digests of the rest. If two builders start at once, the second continues with
        the first one's document, or is refused where that describes another cache. Returns the manifest with the digests. Raises
        CacheMismatchError, and CacheError for a cache that could not be read.
        """
        names = self._names()
        if self.manifest.files and all((self.root / name).is_file() for name in names):
            return self.manifest
        check_limits(self.manifest.shards)
        self.root.mkdir(parents=True, exist_ok=True)
        self._stage()
        if self.manifest.format_version > 2:
            self._stage_tables(lengths)
        table = pa.table(
            {
                "id": pa.array(range(len(vocabulary)), pa.int32()),
                "piece": pa.array(vocabulary, pa.binary()),
                "code": pa.array(codes, pa.int32()),
            }
        )
        encodings = {"id": "DELTA_BINARY_PACKED", "piece": "DELTA_LENGTH_BYTE_ARRAY", "code": "BYTE_STREAM_SPLIT"}
        pq.write_table(
            table,
            self.staging / VOCABULARY,
            compression="zstd",
            compression_level=19,
            use_dictionary=False,
            column_encoding=encodings,
            write_statistics=False,
        )
        files = {n: file_entry(self.staging / n) for n in names}
        answers = sorted((self.root / ANSWERS).glob("*.*"))
        files |= {f"{ANSWERS}/{p.name}": file_entry(p) for p in answers if not unfinished(p.name)}
        mine = CacheManifest(**{**_shallow(self.manifest), "files": files})
        if not self.manifest.files and not (self.root / MANIFEST).exists():
            _write_bounded(self.staging / BUILDING, mine.to_json())
            self._began = publish_first(self.staging / BUILDING, self.root / BUILDING)
        self._have_shard_table(files)
        theirs = load_manifest(self.root)
        refuse_mismatch(self.root, mine.identity, theirs)
        if (theirs.layout, theirs.reopened().files) != (mine.layout, files):
            raise CacheMismatchError(
                "another builder laid this directory out differently",
                cache=self.root,
                found=f"{theirs.layout.shard_rows} rows per shard",
                expected=f"{mine.layout.shard_rows}, and files by the same library versions",
                try_="the same --shard-rows and versions for all builders",
            )
        self.manifest = theirs
        for name in names:
            if not (self.root / name).is_file():
                publish(self.staging / name, self.root / name)
        self.close()
        return self.manifest

    def _names(self) -> list[str]:
        """Files that are there before the first shard is."""
        tables = [*length_pages(self.manifest.examples), SHARDS] if self.manifest.format_version > 2 else []
        return [*group_files(self.arrays), VOCABULARY, *tables]

    def _stage_tables(self, lengths: Iterable[Lengths]) -> None:
        """Write the table of shards and the lengths of all examples under the staging folder."""
        write_shard_table(self.staging / SHARDS, self.manifest.shards)
        pages = write_length_pages(self.staging, lengths)
        if pages != length_pages(self.manifest.examples):
            raise AssertionError(f"{len(pages)} pages of lengths for {self.manifest.examples} examples")

    def _have_shard_table(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        """Have the table at its name, without which no manifest can be read: ours where it is the one that is listed.

        Another builder that has just written its `building.json` publishes its own table in a moment.
        """
        deadline = time.monotonic() + START_SECONDS
        while SHARDS in files and not (self.root / SHARDS).is_file():
            document = read_json(_document_path(self.root), inside=self.root)
            if (document.get("files") or {}).get(SHARDS) == files[SHARDS]:
                publish(self.staging / SHARDS, self.root / SHARDS)
            elif time.monotonic() > deadline:
                raise CacheMismatchError(
                    "another builder laid this directory out differently, and was ended at once",
                    cache=self.root,
                    try_=f"remove {self.root / BUILDING}, if no other builder is at work",
                )
            else:
                time.sleep(0.05)

    def _stage(self) -> None:
        if not (self.staging / TARGETS / "zarr.json").exists():
            self.staging.mkdir(parents=True, exist_ok=True)
            self._keep_locked()
            attributes = {"kd_fingerprint": self.manifest.fingerprint}
            create_group(
                self.staging / TARGETS, self.arrays, self.manifest.layout, len(self.manifest.shards), attributes
            )

    def write(
        self,
        index: int,
        stored: Arrays,
        examples: Sequence[Mapping[str, Any]],
        quality: dict[str, float],
        *,
        ours: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Stage, publish and commit one shard. Returns whether the shard is committed now, by this or by another builder.

        stored     the arrays of its rows, as `codecs.encode` returns them
        examples   its rows of `example_schema`
        quality    sums of the quality figures over its rows
        ours       asked before anything is published; where it says no, nothing is

        A shard that another builder has published meanwhile stays as it is: its commit records the digests of its own bytes.
        """
        self._stage()
        stage_rows(self.root, self.staging, self.manifest, index, stored, examples)
        folder = prepare_shard(self.staging, self.manifest, index, quality)
        if ours() and not self.is_committed(index):
            self._publish(index, folder)
        shutil.rmtree(folder, ignore_errors=True)  # another builder was faster
        return self.is_committed(index)

    def _publish(self, index: int, folder: Path) -> None:
        """Offer the shard in `folder`, and settle whichever offer was the first."""
        settle(self.root, self.manifest, index, trusted=offer(self.root, index, folder))

    def _keep_locked(self) -> None:
        """Lock the staging folder, so that builders in other containers can see when this one has ended."""
        if self._lock is None:
            unlocked = self.staging / f"{STAGING_LOCK}.new"
            unlocked.touch()
            self._lock = lock_of(unlocked)
            unlocked.rename(self.staging / STAGING_LOCK)

    def close(self) -> None:
        """Remove the staging folder."""
        shutil.rmtree(self.staging, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def finish(self) -> CacheManifest:
        """Write `manifest.json` once every shard is committed; the cache is then complete."""
        records = [read_commit(self.root, self.manifest, i) for i in range(len(self.manifest.shards))]
        quality: dict[str, float] = {}
        for record in records:
            for name, value in record.quality.items():
                quality[name] = quality.get(name, 0.0) + value
        digests = [sha256_of(commit_path(self.root, i)) for i in range(len(records))]
        files, stored = self.manifest.files, dict[str, np.ndarray]()
        if self.manifest.format_version > 2:
            stored = stored_bytes(self.root, self.arrays, records)
            files = files | {COMMITS: publish_commits(self.root, self.arrays, CommitTable.from_hex(digests, stored))}
        finished = {"quality": quality, "commits": CommitTable.from_hex(digests, stored), "files": files}
        self.manifest = CacheManifest(**{**_shallow(self.manifest), **finished})
        write_first(self.root / MANIFEST, self.manifest.to_json())  # another builder may have been faster
        self.tidy()
        return self.manifest


def _write_bounded(path: Path, text: str) -> None:
    """Write a manifest. Raises CacheError for one that no reader would read."""
    data = text.encode("utf-8")
    if len(data) > MAX_JSON_BYTES:
        raise CacheError(
            "the manifest would be too large",
            found=f"{len(data)} bytes",
            expected=f"at most {MAX_JSON_BYTES}",
            try_="shorter options",
        )
    path.write_bytes(data)


def _document_path(root: Path) -> Path:
    return root / MANIFEST if (root / MANIFEST).exists() else root / BUILDING


def _shallow(manifest: CacheManifest) -> dict[str, Any]:
    return {name: getattr(manifest, name) for name in CacheManifest.__dataclass_fields__}
