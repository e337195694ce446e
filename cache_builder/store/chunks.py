"""Decode a shard's file of one array straight from its verified bytes: Zarr's `sharding_indexed`, read whole.

    inner chunks (bytes | transpose, bytes -> blosc -> crc32c), then the index: offset and length of each as uint64
    little-endian, all ones where a chunk was never written, and the crc32c of the index

zarr-python opens an array and schedules every chunk as a coroutine: about 2 ms per chunk and array, which is more than the
decoding takes. A reader has read the file's bytes anyway, to compare their SHA-256 with the commit. The same bytes are decoded
here, so nothing can change in between, and the crc32c (for readers without a SHA-256) need not be computed again. The tests
compare every array with what zarr-python reads.
"""

from __future__ import annotations

from itertools import pairwise

import google_crc32c
import numpy as np
from numcodecs import blosc

from kd.cache_builder.store.encoding.arrays import ArraySpec
from kd.cache_builder.store.ragged import KEPT, offsets_of
from kd.cache_builder.store.records.manifest import Layout
from kd.common.errors import CacheError

MISSING = 2**64 - 1
"""Offset and length of a chunk that was never written."""
CHECKSUM = 4
"""Size of a crc32c in bytes."""
HEADER = 16
"""Size of a blosc header in bytes; it holds the size of the decompressed data."""
AS_IT_IS, BITS, ONE_STREAM = 2, 4, 16
"""Flags in a blosc header: the data is not compressed and has no table of blocks; its single bits are in another order; a block is
one stream, and not one for each byte of a value."""


def read_index(data: bytes, layout: Layout) -> np.ndarray:
    """`[chunks, 2]` offset and length of each inner chunk. Raises CacheError where the file is too short for it."""
    count = layout.shard_rows // layout.chunk_rows
    if len(data) < 16 * count + CHECKSUM:
        raise CacheError("a shard's index is cut off", found=f"{len(data)} bytes")
    return np.frombuffer(data, dtype="<u8", count=2 * count, offset=len(data) - CHECKSUM - 16 * count).reshape(-1, 2)


def broken_chunks(data: bytes, layout: Layout) -> list[int]:
    """Numbers of the inner chunks whose crc32c does not match their bytes, in a shard's file that was changed.

    Nothing is decompressed, because such bytes cannot be trusted. Raises CacheError where there is no index.
    """
    end, broken = len(data) - CHECKSUM - 16 * (layout.shard_rows // layout.chunk_rows), []
    for number, (offset, length) in enumerate(read_index(data, layout).tolist()):
        if offset == length == MISSING:
            continue
        chunk = data[offset : offset + length]
        whole = length >= CHECKSUM and offset + length <= end
        if not whole or google_crc32c.value(chunk[:-CHECKSUM]) != int.from_bytes(chunk[-CHECKSUM:], "little"):
            broken.append(number)
    return broken


def decode_shard(data: bytes, spec: ArraySpec, layout: Layout, rows: int) -> np.ndarray:
    """The first `rows` rows of a shard's file: `[rows]` or `[rows, columns]`, in the memory order it was stored in.

    Raises CacheError where the bytes are not such a shard. No more is allocated than the layout says.
    """
    index, dtype, view = read_index(data, layout), np.dtype(spec.dtype).newbyteorder("<"), memoryview(data)
    width = 1 if spec.columns is None else spec.columns
    out = np.empty((width, rows) if spec.by_column else (rows, width), dtype=dtype)
    whole = np.empty((width, layout.chunk_rows) if spec.by_column else (layout.chunk_rows, width), dtype=dtype)
    for first, (offset, length) in zip(range(0, rows, layout.chunk_rows), index.tolist(), strict=False):
        n = min(layout.chunk_rows, rows - first)
        # a whole chunk of rows lies in `out` as it lies in the file
        into = out[first : first + n] if n == layout.chunk_rows and not spec.by_column else whole
        _read_chunk(view, len(index), offset, length, into)
        if spec.by_column:
            out[:, first : first + n] = whole[:, :n]
        elif into is whole:
            out[first : first + n] = whole[:n]
    if spec.columns is None:
        return out.reshape(rows)
    return out.T if spec.by_column else out


def decode_entries(data: bytes, spec: ArraySpec, layout: Layout, kept: np.ndarray) -> np.ndarray:
    """The entries of a shard's rows, of which row i has `kept[i]`: `[E]`, from the file of an array whose rows differ in length.

    Raises CacheError where the bytes are not such a shard, or a row is longer than the array allows.
    """
    columns, dtype = spec.columns or 1, np.dtype(spec.dtype).newbyteorder("<")
    least = int(spec.counts == KEPT)  # a row without a tail has no draws from it
    if len(kept) and not least <= kept.min() <= kept.max() <= columns:
        lengths = f"{int(kept.min())}..{int(kept.max())} entries"
        raise CacheError("a row's length is out of bounds", found=lengths, expected=f"{least}..{columns}")
    index, view = read_index(data, layout), memoryview(data)
    offsets = offsets_of(kept)[[*range(0, len(kept), layout.chunk_rows), len(kept)]].tolist()
    entries = np.empty(offsets[-1], dtype=dtype)
    whole = np.empty(layout.chunk_rows * columns, dtype=dtype)  # for one chunk after another: most of it is zeros
    for (first, stop), (offset, length) in zip(pairwise(offsets), index.tolist(), strict=False):
        _read_chunk(view, len(index), offset, length, whole, stop - first)
        entries[first:stop] = whole[: stop - first]
    return entries


def _read_chunk(
    data: memoryview, chunks: int, offset: int, length: int, into: np.ndarray, wanted: int | None = None
) -> None:
    """Decompress a chunk of a shard's file, or fill in zeros where it was never written. Raises CacheError.

    wanted   values at the beginning of the chunk that must be right; None = all of them
    """
    if offset == length == MISSING:
        into[...] = 0
    elif length < CHECKSUM + HEADER or offset + length > len(data) - CHECKSUM - 16 * chunks:
        raise CacheError("a shard's index points outside the file", found=f"{length} bytes from {offset}")
    else:
        _decompress(
            data[offset : offset + length - CHECKSUM], into, into.nbytes if wanted is None else wanted * into.itemsize
        )


def _decompress(chunk: memoryview, into: np.ndarray, wanted: int) -> None:
    """Decompress one chunk, its first `wanted` bytes at least.

    Raises CacheError unless its header matches its bytes: c-blosc trusts the header.
    """
    size, block, compressed = (int.from_bytes(chunk[i : i + 4], "little") for i in (4, 8, 12))
    if len(chunk) < HEADER or size != into.nbytes:
        raise CacheError(
            "a chunk's size does not match the layout",
            found=f"{len(chunk)} bytes compressed",
            expected=f"{into.nbytes} bytes",
        )
    if compressed != len(chunk) or not 0 < block <= max(size, 1) or not chunk[3]:
        raise CacheError(
            "a chunk's header contradicts its bytes",
            found=f"{compressed} bytes in blocks of {block}",
            expected=f"{len(chunk)} bytes",
        )
    blocks, needed = -(-size // block), max(-(-wanted // block), 1)
    if chunk[2] & AS_IT_IS or (needed == blocks and (blocks > 1 or 2 * wanted > block)):
        blosc.decompress(chunk, into)
        return
    first, values = _first_blocks(chunk, blocks, needed), into.reshape(-1).view(np.uint8)
    if needed == 1 and chunk[2] & BITS and 2 * wanted <= block and block % (8 * chunk[3]) == 0:
        _first_bits(first, values, wanted)
    else:
        blosc.decompress(first, values[: needed * block])


def _first_blocks(chunk: memoryview, blocks: int, needed: int) -> bytes:
    """The first of a chunk's blocks as a chunk of their own: blosc compresses each by itself, and a table says where it begins.

    Where rows differ in length most of a chunk is zeros, and putting their bytes into order takes longer than reading the rest.
    """
    block = int.from_bytes(chunk[8:12], "little")
    starts = np.frombuffer(chunk, dtype="<i4", count=needed, offset=HEADER) - 4 * (blocks - needed)
    rest = chunk[HEADER + 4 * blocks :]
    sizes = np.array([needed * block, block, HEADER + 4 * needed + len(rest)], dtype="<u4")
    return b"".join([chunk[:4], sizes.tobytes(), starts.astype("<i4").tobytes(), rest])


def _first_bits(chunk: bytes, into: np.ndarray, wanted: int) -> None:
    """Decompress the first `wanted` bytes of a chunk of one block whose bits are in another order.

    The block holds the first bit of each value, then the second of each, and so on. Where most values are zeros, that order
    takes longer to undo than everything else. So blosc decompresses the bits as they lie, and is then given the first of
    each kind as a block that is not compressed.
    """
    width, block = chunk[3], int.from_bytes(chunk[8:12], "little")
    bits = np.empty(block, dtype=np.uint8)
    blosc.decompress(b"".join([chunk[:2], bytes([chunk[2] & ~BITS]), chunk[3:]]), bits)
    kinds = bits.reshape(8 * width, -1)
    part = kinds[:, : -(-wanted // kinds.shape[0])]
    sizes = np.array([part.size, part.size, HEADER + 8 + part.size, HEADER + 4, part.size], dtype="<u4")
    head = chunk[:2] + bytes([chunk[2] | ONE_STREAM, width])
    blosc.decompress(b"".join([head, sizes.tobytes(), part.tobytes()]), into[: part.size])
