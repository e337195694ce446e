"""Parquet, read within bounds: a small file of a stranger must not become a large table.

A dictionary page says a long text once and a run of indices repeats it a million times; a run of one number is as short. So
counts and sizes in the file's metadata are checked first, texts are read as dictionaries, and what they would come to is added
up before a single one is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd.data.errors import CacheError

MAX_TABLE_BYTES = 2**30
"""What one Parquet file of a cache may hold, decompressed; a shard of 32,768 rows is about 1 MB of text."""
MAX_METADATA_BYTES = 2**24
FEW_ROWS = 64


def read_table(
    data: bytes, schema: pa.Schema, *, rows: int | None = None, columns: Sequence[str] | None = None
) -> pa.Table:
    """Columns of a Parquet file's bytes, all of `schema` by default, in its types. Raises CacheError, or what pyarrow raises.

    `rows` it must have, where that is known.
    """
    wanted = pa.schema([schema.field(name) for name in columns or schema.names])
    texts = [f.name for f in wanted if pa.types.is_string(f.type) or pa.types.is_binary(f.type)]
    file = pq.ParquetFile(pa.BufferReader(data), read_dictionary=texts, thrift_string_size_limit=MAX_METADATA_BYTES,
                          thrift_container_size_limit=MAX_METADATA_BYTES)  # fmt: skip
    meta = file.metadata
    if rows is not None and meta.num_rows != rows:
        raise CacheError("a table has another number of rows", found=meta.num_rows, expected=rows)
    size = 0
    for group in range(meta.num_row_groups):
        for column in range(meta.num_columns):
            chunk = meta.row_group(group).column(column)
            if chunk.total_uncompressed_size < 0 or chunk.num_values < 0:
                raise CacheError("a table's metadata contradicts itself", found=f"{chunk.num_values} values")
            size += max(chunk.total_uncompressed_size, 4 * chunk.num_values)
    if size > MAX_TABLE_BYTES:
        raise CacheError("a table is too large", found=f"{size} bytes", expected=f"at most {MAX_TABLE_BYTES}")
    batches = []
    # by few rows at a time: a batch may hold as many copies of the longest text, before it can be added up
    for batch in _batches(data, file, wanted.names):
        if any(column.null_count for column in batch.columns):
            raise CacheError("a table has holes", found="null in a column")
        size += sum(_expanded(batch.column(name)) for name in texts)
        if size > MAX_TABLE_BYTES:
            raise CacheError("a table is too large", found=f"over {size} bytes", expected=f"at most {MAX_TABLE_BYTES}")
        batches.append(batch)
    return pa.Table.from_batches(batches).cast(wanted) if batches else wanted.empty_table()


def _batches(data: bytes, file: pq.ParquetFile, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(columns=names, use_threads=False)
    except (NotImplementedError, OSError) as error:  # texts that lie one after another cannot be read as dictionaries
        if "DeltaLengthByteArrayDecoder" not in str(error):
            raise
        yield from pq.ParquetFile(pa.BufferReader(data)).iter_batches(FEW_ROWS, columns=names, use_threads=False)


def _expanded(column: pa.Array) -> int:
    """Bytes of a text column once every row has its own."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = pc.fill_null(pc.binary_length(column.dictionary), 0).to_numpy(zero_copy_only=False)
    used = np.bincount(column.indices.drop_null().to_numpy(), minlength=len(lengths))
    return int((used * lengths.astype(np.float64)).sum())
