"""Forge a cache of any number of shards out of one that has a full shard, to measure what many shards cost.

    python benchmarks/forged_cache.py SMALL OUT --shards 300000                # opened, listed, summed up
    python benchmarks/forged_cache.py SMALL OUT --shards 2000 --files          # read and verified too

Every shard is shard 0 of SMALL: with `--files`, 50,000 shards share each of its files by hard links, so that millions of
rows take no room. Pages of such files are shared in memory, so cold disks are slower than what is measured here. Commits, tables,
lengths and Zarr's metadata are those of a cache of so many shards, with every digest right. Format version 3.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.lengths import LengthPages, Lengths, write_length_pages
from kd.cache_builder.store.records.cache_tables import (
    COMMITS,
    SHARDS,
    sized_files,
    write_commit_table,
    write_shard_table,
)
from kd.cache_builder.store.records.commit_table import CommitTable
from kd.cache_builder.store.records.commits import commit_path, file_entry, read_commit, shard_files
from kd.cache_builder.store.records.manifest import MANIFEST, TARGETS, VOCABULARY, CacheManifest, load_manifest
from kd.cache_builder.store.records.shard_record import ShardRecord
from kd.cache_builder.store.records.shard_table import ShardTable
from kd.cache_builder.store.writers.staged_files import create_group
from kd.common.files import canonical_json, digest_of, sha256_of

LINKS = 50_000
"""Shards that share a file: file systems bound the links of one."""


def forge(small: Path, out: Path, shards: int, *, files: bool) -> CacheManifest:
    """Write the cache of `shards` times shard 0 of `small`; returns its manifest."""
    source = load_manifest(small)
    _, examples, rows = source.shards[0]
    record = read_commit(small, source, 0)
    out.mkdir(parents=True)
    attributes = {"kd_fingerprint": source.fingerprint}
    create_group(out / TARGETS, source.arrays, source.layout, shards, attributes)
    shutil.copy(small / VOCABULARY, out / VOCABULARY)
    table = ShardTable(np.full(shards, examples), np.full(shards, rows))
    write_shard_table(out / SHARDS, table)
    lengths = LengthPages(LocalFiles(small), source).read(0, examples)
    pages = write_length_pages(out, repeated(lengths, shards))
    commits = write_commits(small, out, source, record, shards, files=files)
    write_commit_table(out / COMMITS, commits)
    kept = [name for name in source.files if name.startswith(TARGETS)] + [VOCABULARY, SHARDS, COMMITS, *pages]
    manifest = replace(
        source,
        examples=examples * shards,
        rows=rows * shards,
        shards=table,
        files={name: file_entry(out / name) for name in kept},
        quality={name: value * shards for name, value in record.quality.items()},
        commits=commits,
    )
    manifest.save(out, MANIFEST)
    return manifest


def repeated(lengths: Lengths, shards: int) -> Iterator[Lengths]:
    """The lengths of all examples, a thousand shards at a time."""
    for first in range(0, shards, 1000):
        times = min(1000, shards - first)
        yield np.tile(lengths[0], times), np.tile(lengths[1], times)


def write_commits(
    small: Path, out: Path, source: CacheManifest, record: ShardRecord, shards: int, *, files: bool
) -> CommitTable:
    """Write the commit of every shard, and link its files where `files` says so."""
    names = sized_files([a.name for a in source.arrays])
    stored, digests = {name: np.zeros(shards, dtype=np.int64) for name in names}, list[str]()
    before = shard_files(source.arrays, 0)
    (out / "commits").mkdir()
    (out / "examples").mkdir()
    for index in range(shards):
        after = shard_files(source.arrays, index)
        entries = {after[name]: record.files[before[name]] for name in after}
        first = index * record.examples[1]
        forged = replace(
            record,
            index=index,
            examples=(first, first + record.examples[1]),
            row_start=index * source.layout.shard_rows,
            files=entries,
        )
        document = asdict(forged)
        path = commit_path(out, index)
        path.write_text(canonical_json(document | {"checksum": digest_of(document)}))
        digests.append(sha256_of(path))
        for name in after:
            stored[name][index] = entries[after[name]]["bytes"]
            if files and index % LINKS == 0:
                shutil.copy(small / before[name], out / after[name])
            elif files:
                os.link(out / shard_files(source.arrays, index - index % LINKS)[name], out / after[name])
        stored["commit"][index] = path.stat().st_size
    return CommitTable.from_hex(digests, stored)


def main() -> None:
    """Forge, and say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("small", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--shards", type=int, required=True)
    parser.add_argument("--files", action="store_true", help="Link the files of every shard too.")
    args = parser.parse_args()
    started = time.perf_counter()
    manifest = forge(args.small, args.out, args.shards, files=args.files)
    print(f"{len(manifest.shards)} shards, {manifest.rows} rows in {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
