"""The Parquet files that lie beside a manifest of format version 3: what grows with the number of shards, as columns.

    shards.parquet     examples, rows                       int32: what each shard holds; written before the first shard
    commits.parquet    sha256, and `bytes` of each file     written when the last shard is committed, just before the manifest

The manifest lists both under `files` with size and SHA-256, so each is compared with it before it is decoded. Whoever fetches a
manifest fetches these two with it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd.cache_builder.store.encoding.parquet import read_parquet
from kd.cache_builder.store.records.commit_table import DIGEST_BYTES, CommitTable
from kd.cache_builder.store.records.shard_table import ShardTable
from kd.common.errors import CacheDamageError
from kd.common.strangers.plain_files import read_plain

SHARDS, COMMITS = "shards.parquet", "commits.parquet"
TABLES = (SHARDS, COMMITS)
"""Files that are read with the manifest."""
MAX_TABLE_FILE = 2**28
"""Most bytes of one of them; at the largest number of shards the larger one has about 40 MB."""
FEW_SHARDS = 2**14
"""Beyond, the columns of sizes are decoded one by one: all of them, decoded and copied, take three times the room."""
SHARD_SCHEMA = pa.schema([("examples", pa.int32()), ("rows", pa.int32())])


def commit_schema(arrays: Sequence[str]) -> pa.Schema:
    """Columns of `commits.parquet` in a cache that stores these arrays."""
    sizes = [(f"bytes.{name}", pa.int64()) for name in sized_files(arrays)]
    return pa.schema([("sha256", pa.binary(DIGEST_BYTES)), *sizes])


def sized_files(arrays: Sequence[str]) -> list[str]:
    """The files of a shard whose sizes are recorded: one for each array, the table of examples, and the commit itself."""
    return [*arrays, "examples", "commit"]


def write_columns(path: Path, columns: Mapping[str, Any], schema: pa.Schema, *, group_rows: int | None = None) -> None:
    """Write numbers and digests as Parquet. The same values give the same bytes, with one version of pyarrow.

    group_rows   rows of a row group, which can be decoded by itself; None = as many as pyarrow puts into one, a million
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = {field.name: "DELTA_BINARY_PACKED" for field in schema if pa.types.is_integer(field.type)}
    pq.write_table(
        pa.table(dict(columns), schema),
        path,
        row_group_size=group_rows,
        compression="zstd",
        compression_level=9,
        use_dictionary=False,
        column_encoding=numbers,
        write_statistics=False,
        store_schema=False,
    )


def write_shard_table(path: Path, shards: ShardTable) -> None:
    """Write `shards.parquet`."""
    write_columns(path, {"examples": shards.examples, "rows": shards.rows}, SHARD_SCHEMA)


def write_commit_table(path: Path, commits: CommitTable) -> None:
    """Write `commits.parquet`."""
    names = list(commits.stored)[:-2]
    digests = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(DIGEST_BYTES), len(commits), [None, pa.py_buffer(np.ascontiguousarray(commits.digests))]
    )
    columns = {"sha256": digests} | {f"bytes.{name}": sizes for name, sizes in commits.stored.items()}
    write_columns(path, columns, commit_schema(names))


def load_shard_table(root: Path, entry: Mapping[str, Any], shards: int) -> ShardTable:
    """The shard table of a cache, which has `shards` entries. Raises CacheDamageError naming the file."""
    data = _verified(root / SHARDS, entry, root)
    table = _decoded(root / SHARDS, data, SHARD_SCHEMA, shards)
    return ShardTable(table["examples"].to_numpy(), table["rows"].to_numpy())


def load_commit_table(root: Path, entry: Mapping[str, Any], shards: int, arrays: Sequence[str]) -> CommitTable:
    """The digests of a finished cache of `shards` shards, which stores `arrays`. Raises CacheDamageError naming the file."""
    path, schema = root / COMMITS, commit_schema(arrays)
    data = _verified(path, entry, root)
    at_once = _decoded(path, data, schema, shards) if shards <= FEW_SHARDS else None

    def column(name: str) -> pa.ChunkedArray:
        table = _decoded(path, data, schema, shards, name) if at_once is None else at_once
        return table[name]

    chunk = column("sha256").combine_chunks()
    chunk = chunk.chunk(0) if isinstance(chunk, pa.ChunkedArray) else chunk
    digests = np.frombuffer(chunk.buffers()[1], dtype=np.uint8)[chunk.offset * DIGEST_BYTES :]
    sizes = {name: column(f"bytes.{name}").to_numpy() for name in sized_files(arrays)}
    return CommitTable(digests[: shards * DIGEST_BYTES].reshape(shards, DIGEST_BYTES), sizes)


def _verified(path: Path, entry: Mapping[str, Any], root: Path) -> bytes:
    """The bytes of a table, as recorded. Raises CacheDamageError naming the file."""
    try:
        data = read_plain(path, min(int(entry["bytes"]), MAX_TABLE_FILE), inside=root)
    except OSError as error:
        missing = not os.path.lexists(path)
        raise CacheDamageError(
            "a file of the cache is missing" if missing else "a file of the cache has another size",
            file=path,
            found=error.strerror,
            expected=f"{entry['bytes']} bytes",
            try_="kd cache repair",
        ) from error
    if len(data) != entry["bytes"] or hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise CacheDamageError(
            "a file of the cache was changed", file=path, found="another SHA-256 than recorded", try_="kd cache repair"
        )
    return data


def _decoded(path: Path, data: bytes, schema: pa.Schema, rows: int, column: str | None = None) -> pa.Table:
    """A table of so many rows, or one of its columns. Raises CacheDamageError naming the file."""
    try:
        return read_parquet(data, schema, rows=rows, columns=None if column is None else [column])
    except Exception as error:  # the bytes are as recorded, so the writer was hostile, or this library cannot read them
        raise CacheDamageError(
            "a table of the cache cannot be read", file=path, found=f"{type(error).__name__}: {error}"
        ) from error
