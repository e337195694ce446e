"""Reading a cache's arrays whole, by this project and by the public Zarr readers: rows per CPU-second, taking turns.

    OMP_NUM_THREADS=1 RAYON_NUM_THREADS=1 python benchmarks/readers.py CACHE --repeats 5

    kd            the decoder of `kd.cache_builder.store.chunks` on bytes whose SHA-256 is compared with the commit
    tensorstore   one thread, crc32c checked
    zarr-python   crc32c checked
    zarrs         the same through the Rust pipeline, where the package `zarrs` is installed

All read the same files from a warm disk cache into arrays as they are stored, a shard at a time.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
import zarr

from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.chunks import decode_shard
from kd.cache_builder.store.records.commits import read_commit, shard_files
from kd.cache_builder.store.records.manifest import CacheManifest, load_manifest

Read = dict[str, list[np.ndarray]]
"""Of every array, its shards."""


def by_kd(root: Path, manifest: CacheManifest) -> Read:
    arrays: Read = {a.name: [] for a in manifest.arrays}
    for index, (_, _, rows) in enumerate(manifest.shards):
        record, paths = read_commit(root, manifest, index), shard_files(manifest.arrays, index)
        for spec in manifest.arrays:
            data = LocalFiles(root).verified_bytes(paths[spec.name], record.files[paths[spec.name]])
            arrays[spec.name].append(decode_shard(data, spec, manifest.layout, rows))
    return arrays


def by_tensorstore(root: Path, manifest: CacheManifest) -> Read:
    one = tensorstore.Context({"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}})
    arrays: Read = {}
    for spec in manifest.arrays:
        store = {"driver": "file", "path": str(root / "targets.zarr" / spec.name)}
        array = tensorstore.open({"driver": "zarr3", "kvstore": store}, open=True, context=one).result()
        arrays[spec.name] = [np.asarray(array[part].read().result()) for part in parts(manifest)]
    return arrays


def by_zarr(root: Path, manifest: CacheManifest) -> Read:
    group = zarr.open_group(root / "targets.zarr", mode="r")
    arrays: Read = {}
    for spec in manifest.arrays:
        array: Any = group[spec.name]
        arrays[spec.name] = [np.asarray(array[part]) for part in parts(manifest)]
    return arrays


def by_zarrs(root: Path, manifest: CacheManifest) -> Read:
    with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 1}):
        return by_zarr(root, manifest)


def parts(manifest: CacheManifest) -> list[slice]:
    """The rows of each shard."""
    starts = [index * manifest.layout.shard_rows for index in range(len(manifest.shards))]
    return [slice(start, start + rows) for start, (_, _, rows) in zip(starts, manifest.shards, strict=True)]


READERS: dict[str, Callable[[Path, CacheManifest], Read]] = {
    "kd": by_kd,
    "tensorstore": by_tensorstore,
    "zarr-python": by_zarr,
    "zarrs": by_zarrs,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    manifest = load_manifest(args.cache)
    readers = dict(READERS)
    if importlib.util.find_spec("zarrs") is None:
        del readers["zarrs"]
    seconds: dict[str, list[float]] = {reader: [] for reader in readers}
    first = by_kd(args.cache, manifest)
    for turn in range(args.repeats + 1):
        for reader, read in readers.items():
            started = time.process_time()
            arrays = read(args.cache, manifest)
            if turn:  # the first brings the files into memory
                seconds[reader].append(time.process_time() - started)
            elif not all(np.array_equal(a, b) for n in first for a, b in zip(first[n], arrays[n], strict=True)):
                raise SystemExit(f"{reader} reads other values")
    print(f"{'':<14}{'rows/CPU-s, median':>20}{'best':>12}")
    for reader, spent in seconds.items():
        print(f"{reader:<14}{manifest.rows / statistics.median(spent):>20,.0f}{manifest.rows / min(spent):>12,.0f}")


if __name__ == "__main__":
    main()
