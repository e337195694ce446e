"""The files of a shard, written under a staging folder: its arrays in the Zarr group, and its examples. The one door to Zarr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import zarr
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, TransposeCodec

from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.encoding.arrays import Arrays, ArraySpec
from kd.cache_builder.store.encoding.parquet import check_table_size
from kd.cache_builder.store.example_table import table_of_examples
from kd.cache_builder.store.ragged import spread
from kd.cache_builder.store.records.commits import shard_files
from kd.cache_builder.store.records.manifest import TARGETS, CacheManifest, Layout
from kd.cache_builder.store.vocabulary import code_table, pack_rows


def create_group(
    path: Path, arrays: Sequence[ArraySpec], layout: Layout, shards: int, attributes: Mapping[str, Any]
) -> None:
    """Write the metadata of the Zarr group and its arrays, without data. Each is one line, as a scale has thousands of numbers."""
    with zarr.config.set({"json_indent": None}):
        group = zarr.create_group(path, zarr_format=3, attributes=dict(attributes), overwrite=True)
        for spec in arrays:
            wide = spec.columns if spec.ragged and spec.columns else 1
            columns = () if spec.columns is None or spec.ragged else (spec.columns,)
            order = [TransposeCodec(order=(1, 0))] if spec.by_column else []
            level = (
                5 if spec.ids else 8
            )  # 8 takes 1 % off ids for four times the time, 4 % off rank bands for 3 us a row
            group.create_array(
                spec.name,
                shape=(shards * layout.shard_rows * wide, *columns),
                dtype=spec.dtype,
                chunks=(layout.chunk_rows * wide, *columns),
                chunk_key_encoding={"name": "default", "separator": spec.separator},
                shards=(layout.shard_rows * wide, *columns),
                filters=order,
                serializer=BytesCodec(),
                compressors=[BloscCodec(cname="zstd", clevel=level, shuffle=spec.shuffle), Crc32cCodec()],
                fill_value=0,
                attributes=dict(spec.attributes),
                dimension_names=_dimensions(spec),
            )


def _dimensions(spec: ArraySpec) -> tuple[str, ...]:
    if spec.ragged:
        return ("entry",)
    return ("row",) if spec.columns is None else ("row", "column")


def stage_rows(
    root: Path,
    staging: Path,
    manifest: CacheManifest,
    index: int,
    stored: Arrays,
    examples: Sequence[Mapping[str, Any]],
) -> None:
    """Write the files of shard `index` of the cache in `root` under the folder `staging`, which has the group's metadata.

    stored     the arrays of its rows, as `codecs.encode` returns them
    examples   its rows of `example_schema`
    """
    specs, rows = manifest.arrays, manifest.shards[index][2]
    start = index * manifest.layout.shard_rows
    group = zarr.open_group(staging / TARGETS, mode="r+")
    with zarr.config.set({"array.write_empty_chunks": True}):  # otherwise a shard of zeros would have no file
        arrays: dict[str, Any] = {spec.name: group[spec.name] for spec in specs}
    counts = np.array([e["rows"] for e in examples])
    starts = np.cumsum(counts) - counts
    stored = pack_rows(stored, specs, starts, code_table(LocalFiles(root), manifest)[0])
    for spec in specs:
        values = stored[spec.name]
        first = start
        shape: tuple[int, ...] = (rows,) if spec.columns is None else (rows, spec.columns)
        if spec.ragged and spec.columns:
            kept, first = stored[spec.counts], start * spec.columns
            values, shape = spread(values, kept, manifest.layout.chunk_rows, spec.columns), (-1,)
        if shape not in ((-1,), values.shape):
            raise AssertionError(f"{spec.name}: {values.shape} for {rows} rows")
        arrays[spec.name][first : first + len(values)] = values.astype(spec.dtype)
    parquet = staging / shard_files(specs, index)["examples"]
    parquet.parent.mkdir(exist_ok=True)
    table = table_of_examples(examples, manifest.kind, manifest.format_version, start)
    check_table_size(table)
    pq.write_table(
        table,
        parquet,
        compression="zstd",
        compression_level=15,
        use_dictionary=["task", "split", "prompt"],
        write_statistics=False,
        store_schema=manifest.format_version < 3,
    )
