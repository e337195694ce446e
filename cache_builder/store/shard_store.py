"""Read shards of a cache: every file is compared with its commit, then decoded.

Zarr is not needed for that (see `chunks`), and writing is in `shard_writer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from kd.cache_builder.store.cache_files import CacheFiles
from kd.cache_builder.store.chunks import decode_entries, decode_shard
from kd.cache_builder.store.encoding.arrays import Arrays
from kd.cache_builder.store.encoding.parquet import read_parquet
from kd.cache_builder.store.example_table import example_columns, example_schema
from kd.cache_builder.store.followers import FOLLOWERS
from kd.cache_builder.store.ragged import KEPT, is_flat, offsets_of
from kd.cache_builder.store.records.commits import shard_files
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.cache_builder.store.records.part import load_part
from kd.cache_builder.store.records.shard_record import ShardRecord
from kd.cache_builder.store.vocabulary import code_table, unpack_rows
from kd.common.errors import CacheDamageError


@dataclass(frozen=True)
class Shard:
    """One shard in memory: stored arrays (still quantised) and the table of its examples."""

    index: int
    first_example: int
    arrays: Arrays
    examples: dict[str, list[Any]]
    """Columns of `example_table`, with `row_start` and `row_end` counted from the shard's first row."""

    def part(self, name: str, rows: slice) -> np.ndarray:
        """A range of rows of an array: a view."""
        if is_flat(self.arrays, name):
            rows = slice(self._offsets[rows.start], self._offsets[rows.stop])
        return self.arrays[name][rows]

    @cached_property
    def _offsets(self) -> np.ndarray:
        return offsets_of(self.arrays[KEPT])


def read_shard(files: CacheFiles, manifest: CacheManifest, index: int, names: Sequence[str] | None = None) -> Shard:
    """Read a shard after checking every file it needs against its commit. Raises CacheDamageError.

    `names` are stored arrays (`manifest.arrays`); None means all that this copy holds. The arrays returned are unpacked.
    """
    record = files.read_commit(manifest, index)
    part = load_part(files.root, manifest)
    if names is None:
        names = [a.name for a in manifest.arrays] if part is None else part.arrays
    elif part is not None:
        part.require(names, files.root)
    if "token_ids" in names and any(a.name == FOLLOWERS for a in manifest.arrays):
        names = [*names, FOLLOWERS]
    paths = shard_files([a for a in manifest.arrays if a.name in names], index)
    data = {
        name: files.verified_bytes(path, record.files[path], shard=index, array=name) for name, path in paths.items()
    }
    return decode_files(files, manifest, record, data)


def decode_files(files: CacheFiles, manifest: CacheManifest, record: ShardRecord, data: Mapping[str, bytes]) -> Shard:
    """A shard from the verified bytes of its examples and of some of its arrays. Raises CacheDamageError."""
    specs = [a for a in manifest.arrays if a.name in data]
    ids = code_table(files, manifest)[1] if any(spec.ids for spec in specs) else None
    try:
        schema = example_schema(manifest.kind, manifest.format_version)
        table = read_parquet(data["examples"], schema, rows=_examples(record))
        examples = example_columns(table, record.row_start, record.rows)
        starts = np.array(examples["row_start"], dtype=np.int64)
        even, uneven = ([a for a in specs if a.ragged == ragged] for ragged in (False, True))
        stored = {a.name: decode_shard(data[a.name], a, manifest.layout, record.rows) for a in even}
        stored |= {a.name: decode_entries(data[a.name], a, manifest.layout, stored[a.counts]) for a in uneven}
        arrays = unpack_rows(stored, specs, starts, ids)
    except Exception as error:  # the bytes are as committed, so this library version cannot read them
        raise CacheDamageError(
            "a shard cannot be decoded", where=files.root, shard=record.index, found=f"{type(error).__name__}: {error}"
        ) from error
    return Shard(record.index, record.examples[0], arrays, examples)


def read_example_table(
    files: CacheFiles, manifest: CacheManifest, index: int, columns: Sequence[str]
) -> dict[str, list[Any]]:
    """Some columns of a shard's examples, whose Parquet file is checked against the commit. Raises CacheDamageError."""
    record = files.read_commit(manifest, index)
    name = shard_files(manifest.arrays, index)["examples"]
    data = files.verified_bytes(name, record.files[name], shard=index, array="examples")
    try:
        schema = example_schema(manifest.kind, manifest.format_version)
        table = read_parquet(data, schema, rows=_examples(record), columns=columns)
    except Exception as error:  # as in read_shard
        raise CacheDamageError(
            "a shard cannot be decoded", where=files.root, shard=index, found=f"{type(error).__name__}: {error}"
        ) from error
    return table.to_pydict()  # type: ignore[no-any-return]


def _examples(record: ShardRecord) -> int:
    return record.examples[1] - record.examples[0]
