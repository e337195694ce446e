"""Chunks of rows that differ in length: only the blocks that hold entries are decompressed, and these are what blosc gives."""

from __future__ import annotations

import google_crc32c
import numpy as np
import pytest
from numcodecs import blosc

from kd.cache_builder.store.chunks import decode_entries
from kd.cache_builder.store.encoding.arrays import ArraySpec
from kd.cache_builder.store.ragged import spread
from kd.cache_builder.store.records.manifest import Layout
from kd.common.errors import CacheError

LAYOUT = Layout(shard_rows=4096, chunk_rows=1024)


def file_of(values: np.ndarray, kept: np.ndarray, columns: int, codec: blosc.Blosc) -> bytes:
    """A shard's file of flat entries, as the specification has it."""
    filled = spread(values, kept, LAYOUT.chunk_rows, columns).reshape(-1, LAYOUT.chunk_rows * columns)
    parts, index = list[bytes](), np.full((LAYOUT.shard_rows // LAYOUT.chunk_rows, 2), 2**64 - 1, dtype="<u8")
    for number, chunk in enumerate(filled):
        data = bytes(codec.encode(chunk))
        index[number] = sum(map(len, parts)), len(data) + 4
        parts.append(data + google_crc32c.value(data).to_bytes(4, "little"))
    return b"".join([*parts, index.tobytes(), google_crc32c.value(index.tobytes()).to_bytes(4, "little")])


@pytest.mark.parametrize("shuffle", [blosc.NOSHUFFLE, blosc.SHUFFLE, blosc.BITSHUFFLE])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize(("longest", "block"), [(1, 4096), (5, 4096), (20, 8192), (64, 4096), (5, 0)])
def test_entries_come_back_from_as_few_blocks_as_hold_them(longest: int, block: int, dtype: str, shuffle: int) -> None:
    rng = np.random.default_rng(longest)
    kept = rng.integers(1, longest + 1, 2500).astype(np.uint8)  # two chunks and a part of a third
    for values in (rng.integers(0, 9, kept.sum()), rng.integers(0, np.iinfo(dtype).max, kept.sum())):
        codec = blosc.Blosc("zstd", 5, shuffle, block)
        spec = ArraySpec("token_ids", dtype, 64, {}, ragged=True)
        data = file_of(values.astype(dtype), kept, 64, codec)
        assert np.array_equal(decode_entries(data, spec, LAYOUT, kept), values)


def test_bytes_that_no_compressor_shortens_are_read_as_they_are() -> None:
    values = np.random.default_rng(0).integers(0, 2**32, 2048 * 64)
    kept = np.full(2048, 64, dtype=np.uint8)
    data = file_of(values.astype(np.uint32), kept, 64, blosc.Blosc("lz4", 1, blosc.NOSHUFFLE, 4096))
    assert data[2] & 2  # blosc says so
    assert np.array_equal(
        decode_entries(data, ArraySpec("token_ids", "uint32", 64, {}, ragged=True), LAYOUT, kept), values
    )


def test_a_table_of_blocks_that_points_elsewhere_is_an_error_and_no_value() -> None:
    kept = np.full(1024, 3, dtype=np.uint8)
    values = np.random.default_rng(0).integers(0, 9, kept.sum()).astype(np.uint16)
    data = bytearray(file_of(values, kept, 64, blosc.Blosc("zstd", 5, blosc.SHUFFLE, 8192)))
    data[16:20] = (2**31 - 1).to_bytes(4, "little")
    with pytest.raises((RuntimeError, CacheError)):
        decode_entries(bytes(data), ArraySpec("token_ids", "uint16", 64, {}, ragged=True), LAYOUT, kept)
