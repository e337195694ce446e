"""Read Parquet within bounds: a small file must not become a large table.

A dictionary page can hold a long text once, and a run of indices can repeat it a million times. So counts and sizes in the
file's metadata are checked first, texts are read as dictionaries, and their total size is added up before any is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd.common.errors import CacheError

MAX_TABLE_BYTES = 2**30
"""Most bytes that one Parquet file of a cache may hold, decompressed; a shard of 32,768 rows has about 1 MB of text."""
MAX_METADATA_BYTES = 2**24
"""Most bytes of a Parquet footer."""
FEW_ROWS = 64
"""Rows read at once where texts cannot be read as dictionaries."""


def read_parquet(
    data: bytes,
    schema: pa.Schema,
    *,
    rows: int | None = None,
    columns: Sequence[str] | None = None,
    group: int | None = None,
) -> pa.Table:
    """Columns of a Parquet file, in the types of `schema`.

    data      bytes of the file
    rows      number of rows that the table must have; None where that is not known
    columns   names of the columns to read; None means all of `schema`
    group     the only row group to read; None means all, and so does a file that has one

    Raises CacheError beyond the bounds, or what pyarrow raises for a damaged file.
    """
    selected = pa.schema([schema.field(name) for name in columns or schema.names])
    texts = [f.name for f in selected if pa.types.is_string(f.type) or pa.types.is_binary(f.type)]
    size, count = footer_sizes(data)
    if rows is not None and count != rows:
        raise CacheError("a table has another number of rows", found=count, expected=rows)
    if size > MAX_TABLE_BYTES:
        raise CacheError("a table is too large", found=f"{size} bytes", expected=f"at most {MAX_TABLE_BYTES}")
    file = pq.ParquetFile(
        pa.BufferReader(data),
        read_dictionary=texts,
        thrift_string_size_limit=MAX_METADATA_BYTES,
        thrift_container_size_limit=MAX_METADATA_BYTES,
    )
    groups = range(file.num_row_groups) if group is None or file.num_row_groups == 1 else [group]
    batches = []
    # few rows at a time: a batch may hold that many copies of the longest text before they are counted
    for batch in _batches(data, file, selected.names, groups):
        if any(column.null_count for column in batch.columns):
            raise CacheError("a table has missing values", found="null in a column")
        size += sum(_expanded(batch.column(name)) for name in texts)
        if size > MAX_TABLE_BYTES:
            raise CacheError("a table is too large", found=f"over {size} bytes", expected=f"at most {MAX_TABLE_BYTES}")
        batches.append(batch)
    return pa.Table.from_batches(batches).cast(selected) if batches else selected.empty_table()


def check_table_size(table: pa.Table) -> None:
    """Raise CacheError for a table that `read_parquet` would refuse, before it is written."""
    texts = [table[field.name] for field in table.schema if pa.types.is_string(field.type)]
    size = table.nbytes + 4 * len(table) * table.num_columns + sum(column.nbytes for column in texts)
    if size > MAX_TABLE_BYTES:
        raise CacheError(
            "the examples of a shard are too large",
            found=f"{size} bytes of texts and ids",
            expected=f"at most {MAX_TABLE_BYTES}",
            try_="a smaller --shard-rows",
        )


def _batches(
    data: bytes, file: pq.ParquetFile, names: Sequence[str], groups: Sequence[int]
) -> Iterator[pa.RecordBatch]:
    try:
        yield from file.iter_batches(row_groups=groups, columns=names, use_threads=False)
    except (NotImplementedError, OSError) as error:  # texts in this encoding cannot be read as dictionaries
        if "DeltaLengthByteArrayDecoder" not in str(error):
            raise
        again = pq.ParquetFile(pa.BufferReader(data))
        yield from again.iter_batches(FEW_ROWS, row_groups=groups, columns=names, use_threads=False)


def _expanded(column: pa.Array) -> int:
    """Size in bytes of a text column once every row has its own copy."""
    if not pa.types.is_dictionary(column.type):
        return int(column.nbytes)
    lengths = pc.fill_null(pc.binary_length(column.dictionary), 0).to_numpy(zero_copy_only=False)
    used = np.bincount(column.indices.drop_null().to_numpy(), minlength=len(lengths))
    return int((used * lengths.astype(np.float64)).sum())


def footer_sizes(data: bytes) -> tuple[int, int]:
    """`(bytes, rows)` of a file according to its Parquet footer: decompressed, and at least 4 bytes for every value.

    It is not read by Arrow, because pyarrow ends the process when the metadata of a column contradicts itself (found by
    fuzzing). Thrift's compact protocol: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md;
    the fields are those of parquet.thrift.
    """
    length = int.from_bytes(data[-8:-4], "little")
    if len(data) < 12 or data[-4:] != b"PAR1" or not 0 < length <= min(len(data) - 12, MAX_METADATA_BYTES):
        raise CacheError("a table's footer cannot be read", found=f"{len(data)} bytes")
    try:
        document = _Compact(data[-8 - length : -8]).struct(0)
        size = 0
        for group in document[4]:
            for column in group[1]:
                uncompressed, values = column[3][6], column[3][5]
                if uncompressed < 0 or values < 0:
                    raise CacheError("a table's metadata contradicts itself", found=f"{values} values")
                size += max(uncompressed, 4 * values)
        return size, int(document[3])
    except (LookupError, TypeError, ValueError) as error:
        raise CacheError("a table's footer cannot be read", found=f"{type(error).__name__}: {error}") from error


class _Compact:
    """Parser of Thrift's compact protocol: structures become `{field: value}`, and nothing larger than the bytes is allocated."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    def byte(self) -> int:
        self.position += 1
        return self.data[self.position - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80 or shift > 70:
                return value

    def zigzag(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # a field's truth is in its type
            return kind == 1
        if kind == 3:
            return self.byte()
        if kind in (4, 5, 6):
            return self.zigzag()
        if kind == 7:
            self.position += 8
            return None
        if kind == 8:
            length = self.varint()
            self.position += length
            return None
        if kind in (9, 10):
            head = self.byte()
            count = head >> 4 if head >> 4 < 15 else self.varint()
            if count > len(self.data) - self.position:
                raise ValueError("a list longer than its bytes")
            element = head & 15
            return [self.byte() == 1 if element in (1, 2) else self.value(element, depth + 1) for _ in range(count)]
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError(f"a field of type {kind}")

    def struct(self, depth: int) -> dict[int, Any]:
        if depth > 16:
            raise ValueError("too deep")
        fields: dict[int, Any] = {}
        number = 0
        while head := self.byte():
            number = number + (head >> 4) if head >> 4 else self.zigzag()
            fields[number] = self.value(head & 15, depth)
        return fields
