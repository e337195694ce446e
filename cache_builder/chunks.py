"""A shard's file of one array, decoded straight from its verified bytes: Zarr's `sharding_indexed`, read whole.

    inner chunks (bytes | transpose, bytes -> blosc -> crc32c), then the index: offset and length of each as uint64
    little-endian, all ones where a chunk was never written, and the crc32c of the index

zarr-python opens an array and schedules every chunk as a coroutine: about 2 ms per chunk and array, which is
more than the decoding. A reader has the file's bytes in hand anyway, to compare their SHA-256 with the commit; it is
these bytes that are decoded here, so nothing can change in between, and the crc32c, which protects those who have no
SHA-256, need not be computed again. The tests compare every array with what zarr-python reads.
"""

from __future__ import annotations

import numpy as np
from numcodecs import blosc

from kd.cache_builder.codecs import ArraySpec
from kd.cache_builder.manifest import Layout
from kd.data.errors import CacheError

MISSING = 2**64 - 1
CHECKSUM = 4
"""Bytes of a crc32c."""
HEADER = 16
"""Bytes of a blosc header; it holds the size of what is compressed."""


def decode_shard(data: bytes, spec: ArraySpec, layout: Layout, rows: int) -> np.ndarray:
    """The first `rows` rows of a shard's file: `[rows]` or `[rows, columns]`, in the memory order it was stored in.

    Raises CacheError where the bytes are not such a shard; nothing larger than the layout says is allocated.
    """
    count, dtype = layout.shard_rows // layout.chunk_rows, np.dtype(spec.dtype).newbyteorder("<")
    index = np.frombuffer(data[len(data) - CHECKSUM - 16 * count : len(data) - CHECKSUM], dtype="<u8")
    if len(index) != 2 * count:
        raise CacheError("a shard's index is cut off", found=f"{len(data)} bytes")
    width = 1 if spec.columns is None else spec.columns
    out = np.empty((width, rows) if spec.by_column else (rows, width), dtype=dtype)
    whole = np.empty((width, layout.chunk_rows) if spec.by_column else (layout.chunk_rows, width), dtype=dtype)
    for first, (offset, length) in zip(range(0, rows, layout.chunk_rows), index.reshape(-1, 2).tolist(), strict=False):
        n = min(layout.chunk_rows, rows - first)
        if offset == length == MISSING:
            whole[...] = 0
        elif length < CHECKSUM + HEADER or offset + length > len(data) - CHECKSUM - 16 * count:
            raise CacheError("a shard's index points elsewhere", found=f"{length} bytes from {offset}")
        else:
            _decompress(data[offset : offset + length - CHECKSUM], whole)
        if spec.by_column:
            out[:, first : first + n] = whole[:, :n]
        else:
            out[first : first + n] = whole[:n]
    if spec.columns is None:
        return out.reshape(rows)
    return out.T if spec.by_column else out


def _decompress(chunk: bytes, into: np.ndarray) -> None:
    if len(chunk) < HEADER or int.from_bytes(chunk[4:8], "little") != into.nbytes:
        raise CacheError("a chunk has another size than the layout says", found=f"{len(chunk)} bytes compressed",
                         expected=f"{into.nbytes} bytes")  # fmt: skip
    blosc.decompress(chunk, into)
