"""The teacher's vocabulary, and the arrays that are stored in another form than they are held in memory.

Ids are stored as codes (the most frequent token of the corpus is 0, so that the high bits of most are zero), `byte_end` as
lengths, places on a scale as steps, and columns one after another. `pack_rows` and `unpack_rows` translate; nothing is lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd.cache_builder.store.cache_files import CacheFiles
from kd.cache_builder.store.encoding.arrays import Arrays, ArraySpec, id_dtype
from kd.cache_builder.store.encoding.parquet import read_parquet
from kd.cache_builder.store.followers import (
    FOLLOWERS,
    follower_pairs,
    from_places,
    keys_of,
    per_entry,
    to_places,
)
from kd.cache_builder.store.ragged import KEPT, as_table, row_steps, row_totals, sorted_entries
from kd.cache_builder.store.records.manifest import VOCABULARY, CacheManifest
from kd.common.errors import CacheDamageError
from kd.models.batching.gaps import NO_GAPS, Gaps

VOCABULARY_SCHEMA = pa.schema([("id", pa.int32()), ("piece", pa.binary()), ("code", pa.int32())])
"""The column `code` is missing in format version 1."""


def tokens_digest(context_ids: np.ndarray, target_ids: np.ndarray, gaps: Gaps = NO_GAPS) -> bytes:
    """A digest of 16 bytes over context and target ids, which shows that rows belong to their tokens.

    Where there are gaps, their fields follow, each after its length.
    """
    digest = hashlib.blake2b(len(context_ids).to_bytes(8, "little"), digest_size=16)
    digest.update(np.ascontiguousarray(context_ids, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(target_ids, dtype="<i4").tobytes())
    for values in (gaps.rows, gaps.lengths, gaps.ids) if len(gaps) else ():
        digest.update(len(values).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(values, dtype="<i4").tobytes())
    return digest.digest()


def read_vocabulary(files: CacheFiles, manifest: CacheManifest) -> list[bytes]:
    """The bytes every teacher id stands for."""
    data = files.verified_bytes(VOCABULARY, manifest.files[VOCABULARY])
    return _vocabulary(files.root, data)["piece"].to_pylist()  # type: ignore[no-any-return]


def _vocabulary(root: Path, data: bytes) -> pa.Table:
    try:
        columns = [name for name in pq.read_schema(pa.BufferReader(data)).names if name in VOCABULARY_SCHEMA.names]
        return read_parquet(data, VOCABULARY_SCHEMA, columns=columns)
    except Exception as error:  # the bytes are as committed, so this library version cannot read them
        raise CacheDamageError(
            "the vocabulary cannot be read", where=root / VOCABULARY, found=f"{type(error).__name__}: {error}"
        ) from error


def codes_by_count(vocabulary_size: int, sequences: Iterable[np.ndarray]) -> np.ndarray:
    """`[V]` int32 code of every id: its position when ids are ordered by how often they occur, the most frequent first.

    Ties, and ids that never occur, are in the order of their ids, so every builder of one corpus makes the same table. The
    tokens that a teacher finds probable are much like those that occur, so most codes are small numbers.
    """
    counts = np.zeros(vocabulary_size, dtype=np.int64)
    for ids in sequences:
        np.add.at(counts, ids[ids < vocabulary_size], 1)
    return codes_of_counts(vocabulary_size, counts)


def codes_of_counts(vocabulary_size: int, counts: np.ndarray) -> np.ndarray:
    """The table of `codes_by_count` for ids that occur `counts` times; ids that have no count do not occur."""
    counts = np.pad(counts[:vocabulary_size], (0, max(0, vocabulary_size - len(counts))))
    codes = np.empty(vocabulary_size, dtype=np.int32)
    codes[np.argsort(-counts, kind="stable")] = np.arange(vocabulary_size, dtype=np.int32)
    return codes


def code_table(files: CacheFiles, manifest: CacheManifest) -> tuple[np.ndarray, np.ndarray]:
    """`(code of every id, id of every code)`, each `[V]` in the ids' dtype. Raises CacheDamageError.

    An id beyond `vocabulary.parquet` (a logit that no token stands for) is its own code.
    """
    entry = manifest.files[VOCABULARY]
    return _code_table(files, int(entry["bytes"]), str(entry["sha256"]), manifest.vocabulary_size)


@lru_cache(maxsize=4)
def _code_table(files: CacheFiles, size: int, sha256: str, vocabulary_size: int) -> tuple[np.ndarray, np.ndarray]:
    root = files.root
    data = files.verified_bytes(VOCABULARY, {"bytes": size, "sha256": sha256})
    stored = _vocabulary(root, data)["code"].to_numpy()
    if len(stored) > vocabulary_size + 2**20:  # special tokens beyond the logits are few
        raise CacheDamageError("the vocabulary is too large", where=root / VOCABULARY, found=f"{len(stored)} entries")
    codes = np.concatenate([stored, np.arange(len(stored), vocabulary_size)])
    if not np.array_equal(np.sort(codes), np.arange(len(codes))):
        raise CacheDamageError("the codes of the vocabulary are not a permutation", where=root / VOCABULARY)
    codes = codes.astype(id_dtype(len(codes)))
    return codes, np.argsort(codes).astype(codes.dtype)


def pack_rows(stored: Arrays, arrays: Sequence[ArraySpec], starts: np.ndarray, codes: np.ndarray) -> Arrays:
    """Rows of whole examples, which begin at `starts [E]`, in the form in which they are stored."""
    packed = {a.name: codes[stored[a.name]] if a.ids else stored[a.name] for a in arrays if a.name in stored}
    if any(a.name == FOLLOWERS for a in arrays):
        ids, rows = packed["token_ids"].astype(np.int64), len(packed["gold_ids"])
        keys = per_entry(keys_of(packed["gold_ids"]), ids, stored.get(KEPT) if ids.ndim == 1 else None)
        packed[FOLLOWERS] = follower_pairs(keys, ids, rows)
        packed["token_ids"] = to_places(keys, ids, packed[FOLLOWERS])
    for spec in arrays:
        if spec.ragged and spec.counts != KEPT and spec.name in packed:  # a table in memory
            packed[spec.name] = sorted_entries(packed[spec.name], stored[spec.counts])
        if spec.ragged and spec.steps and spec.name in packed:
            packed[spec.name] = row_steps(packed[spec.name], stored[spec.counts])
        elif spec.steps and spec.name in packed:
            indices = packed[spec.name]
            packed[spec.name] = indices.copy(order="K")
            packed[spec.name][:, 1:] -= indices[:, :-1]
    if any(a.name == "byte_length" for a in arrays):
        lengths = np.diff(stored["byte_end"], prepend=0)
        lengths[starts] = stored["byte_end"][starts]
        packed["byte_length"] = lengths
    return packed


def unpack_rows(stored: Arrays, arrays: Sequence[ArraySpec], starts: np.ndarray, ids: np.ndarray | None) -> Arrays:
    """The inverse of `pack_rows`; `ids [V]` is the id of every code. Raises IndexError for a code beyond the table."""
    apart = {"token_ids", FOLLOWERS} if FOLLOWERS in stored else set()
    unpacked = {a.name: stored[a.name] for a in arrays if a.name not in apart}
    for spec in (a for a in arrays if a.name not in apart):
        if spec.ragged and spec.steps:
            unpacked[spec.name] = row_totals(unpacked[spec.name], stored[spec.counts])
        elif spec.steps:
            columns = np.array(unpacked[spec.name].T, order="C")
            for above, below in pairwise(columns):  # whole columns at once
                np.add(below, above, out=below)
            unpacked[spec.name] = np.ascontiguousarray(columns.T)
        if spec.ids and ids is not None:
            unpacked[spec.name] = _take(ids, unpacked[spec.name])
        if spec.ragged and spec.counts != KEPT:
            unpacked[spec.name] = as_table(unpacked[spec.name], stored[spec.counts], spec.columns or 1)
    if apart and ids is not None:
        places, keys = stored["token_ids"], keys_of(stored["gold_ids"])
        kept = stored[KEPT] if places.ndim == 1 else None
        unpacked["token_ids"] = from_places(places, keys, stored[FOLLOWERS], ids, kept)
    if "byte_length" in unpacked:
        ends = np.cumsum(unpacked.pop("byte_length"), dtype=np.uint32)
        before = ends[starts - 1]
        before[starts == 0] = 0
        unpacked["byte_end"] = ends - np.repeat(before, np.diff(starts, append=len(ends)))
    return unpacked


def _take(table: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """`table[indices]` by Arrow, which uses the indices as they are; numpy converts them to int64 first. Raises IndexError."""
    if indices.size and indices.max() >= len(table):  # Arrow's own check takes as long as everything else
        raise IndexError(f"code {indices.max()} of {len(table)}")
    return pc.take(pa.array(table), pa.array(indices.reshape(-1)), boundscheck=False).to_numpy().reshape(indices.shape)  # type: ignore[no-any-return]
