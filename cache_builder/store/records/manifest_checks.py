"""Checks of manifests and commits: no document may make a reader allocate without bounds, or leave the cache's folder."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from kd.cache_builder.store.encoding.arrays import ArraySpec
from kd.cache_builder.store.records.shard_table import ShardTable
from kd.common.errors import CacheError

MAX_ROWS = 2**40
"""Bound on any row count a manifest may claim."""
MAX_SHARD_ROWS, MAX_ARRAY_BYTES = 2**24, 2**34
"""Bounds on what reading one shard may allocate per array (the default shard holds 2 MB of ids at k=64)."""
MAX_FILE_BYTES = MAX_ARRAY_BYTES + 2**30
"""Bound on a file of a cache: an array that does not compress, with the index and the checksums of its chunks."""


MAX_SHARDS = 2**20
"""Bound on the shards of a cache from format version 3 on; a plan that would exceed it is refused."""
PAGE_EXAMPLES = 2**20
"""Examples in one file of lengths."""


def length_page(number: int) -> str:
    """Path in the cache of a file of lengths, see `kd.cache_builder.store.lengths`."""
    return f"lengths/{number:05d}.parquet"


def length_pages(examples: int) -> list[str]:
    """The files of lengths of a cache with this many examples."""
    return [length_page(number) for number in range(-(-examples // PAGE_EXAMPLES))]


def bounded_count(value: Any) -> int:
    """A count as it is. Raises CacheError unless it is an integer from 0 to `MAX_ROWS`."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_ROWS:
        raise CacheError("a count is out of bounds", found=repr(value)[:80])
    return value


def file_table(document: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """`files` of a document: path in the cache -> `bytes` and `sha256`, in these types. Raises CacheError."""
    return {
        str(name): {"bytes": _file_size(entry["bytes"]), "sha256": str(entry["sha256"])}
        for name, entry in document.items()
    }


def _file_size(value: Any) -> int:
    size = bounded_count(value)
    if size > MAX_FILE_BYTES:
        raise CacheError("a file is too large", found=f"{size} bytes", expected=f"at most {MAX_FILE_BYTES}")
    return size


def check_bounds(arrays: Sequence[ArraySpec], shard_rows: int) -> None:
    """Raise CacheError for shards whose arrays no reader should be made to allocate."""
    if shard_rows > MAX_SHARD_ROWS:
        raise CacheError(
            "too many rows per shard",
            found=shard_rows,
            expected=f"at most {MAX_SHARD_ROWS}",
            try_="a smaller --shard-rows",
        )
    largest = max(arrays, key=lambda a: a.row_bytes)
    size = largest.row_bytes * shard_rows
    if size > MAX_ARRAY_BYTES:
        raise CacheError(
            "a shard's array is too large",
            found=f"{largest.name}: {size} bytes",
            expected=f"at most {MAX_ARRAY_BYTES}",
            try_="a smaller --shard-rows",
        )


def check_limits(shards: ShardTable) -> None:
    """Raise CacheError for a cache that could be written and would be refused when it is read."""
    if len(shards) > MAX_SHARDS or shards.row_count > MAX_ROWS:
        raise CacheError(
            "the cache would have too many shards",
            found=f"{len(shards)} shards, {shards.row_count} rows",
            expected=f"at most {MAX_SHARDS} shards, {MAX_ROWS} rows",
            try_="a larger --shard-rows",
        )


def check_shard_table(shards: ShardTable, shard_rows: int, examples: int, rows: int) -> None:
    """Raise CacheError unless every shard holds examples and fits, and the shards add up to `examples` and `rows`."""
    wrong = np.flatnonzero((shards.examples < 1) | (shards.rows < 1) | (shards.rows > shard_rows))
    if len(wrong):
        first, stop, count = shards[int(wrong[0])]
        raise CacheError("shard table is not contiguous", found=f"examples {first}:{stop}, {count} rows")
    if (shards.example_count, shards.row_count) != (examples, rows):
        raise CacheError(
            "shard table does not add up",
            found=f"{shards.example_count} examples, {shards.row_count} rows",
            expected=f"{examples} examples, {rows} rows",
        )


def check_file_names(names: Collection[str], required: Collection[str]) -> None:
    """Raise CacheError for a file name that could leave the cache's folder, or where a required one is missing."""
    for name in names:
        check_inside(name)
    missing = set(required) - set(names)
    if missing:
        raise CacheError("files of the cache are not listed", found=", ".join(sorted(missing)))


def check_inside(name: str) -> None:
    """Raise CacheError for a file name that could leave the cache's folder."""
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or "\0" in name or any(p in ("", ".", "..") for p in parts):
        raise CacheError("a file name leaves the cache's directory", found=repr(name)[:120])
