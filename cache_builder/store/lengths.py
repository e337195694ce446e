"""The lengths of all examples, in files of a million examples each, so that batches are laid out without opening a shard.

    lengths/00000.parquet     tokens, rows      int32: what a model reads of each example, and its scored tokens

Page p holds the examples `[p * PAGE_EXAMPLES, (p + 1) * PAGE_EXAMPLES)`, or what is left of them. The manifest lists the pages
under `files`. A page is compared with its SHA-256 when it is read, and fetched then where the cache is elsewhere. Its row groups
of GROUP_EXAMPLES can be decoded by themselves: a training that looks up some examples reads 0.5 ms of a page and not 8 (and
hashes it in 1.4 ms). That costs 0.1 % of a page's size; pages of earlier releases have one row group. Format versions 1 and 2
have no pages; there the lengths are in each shard's table of examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kd.cache_builder.store.cache_files import CacheFiles
from kd.cache_builder.store.encoding.parquet import read_parquet
from kd.cache_builder.store.records.cache_tables import write_columns
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.cache_builder.store.records.manifest_checks import PAGE_EXAMPLES, length_page
from kd.common.errors import CacheDamageError

PAGES_KEPT = 8
"""Pages in memory that were read whole, of at most 8 MB each."""
GROUP_EXAMPLES = 2**16
"""Examples of a row group. It divides PAGE_EXAMPLES."""
GROUPS_KEPT = 16
"""Row groups in memory, of at most 0.5 MB each."""
LENGTH_SCHEMA = pa.schema([("tokens", pa.int32()), ("rows", pa.int32())])

Lengths = tuple[np.ndarray, np.ndarray]
"""`(tokens [E], rows [E])` of some examples."""


def write_length_pages(folder: Path, batches: Iterable[Lengths]) -> list[str]:
    """Write the pages below `folder`, as they lie in a cache; returns their names. A page and a batch at most are in memory."""
    names: list[str] = []
    for tokens, rows in _in_pages(batches):
        names.append(length_page(len(names)))
        write_columns(folder / names[-1], {"tokens": tokens, "rows": rows}, LENGTH_SCHEMA, group_rows=GROUP_EXAMPLES)
    return names


def _in_pages(batches: Iterable[Lengths]) -> Iterator[Lengths]:
    held, count = list[Lengths](), 0
    for tokens, rows in batches:
        position = 0
        while position < len(rows):
            taken = slice(position, position + PAGE_EXAMPLES - count)
            held.append((np.asarray(tokens[taken], dtype=np.int32), np.asarray(rows[taken], dtype=np.int32)))
            count += len(held[-1][1])
            position += len(held[-1][1])
            if count == PAGE_EXAMPLES:
                yield _joined(held)
                held, count = [], 0
    if held:
        yield _joined(held)


def _joined(held: list[Lengths]) -> Lengths:
    tokens, rows = zip(*held, strict=True)
    return np.concatenate(tokens), np.concatenate(rows)


class LengthPages:
    """The lengths of one cache of format version 3. The parts that were read last are kept; thread-safe."""

    def __init__(self, files: CacheFiles, manifest: CacheManifest) -> None:
        self.files, self.manifest = files, manifest
        self._page = lru_cache(maxsize=PAGES_KEPT)(self._read_page)
        self._group = lru_cache(maxsize=GROUPS_KEPT)(self._read_group)
        self._undivided = set[int]()
        """Pages of earlier releases, which have one row group."""

    def read(self, first: int, stop: int) -> Lengths:
        """Tokens and rows of the examples `[first, stop)`, int64. Raises CacheDamageError for a page that is damaged."""
        parts = []
        for number in range(first // PAGE_EXAMPLES, (stop - 1) // PAGE_EXAMPLES + 1):
            start = number * PAGE_EXAMPLES
            parts.append(self._of_page(number, max(first - start, 0), min(stop - start, PAGE_EXAMPLES)))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def _of_page(self, number: int, first: int, stop: int) -> Lengths:
        """The examples `[first, stop)` of a page: from one of its row groups where that is enough."""
        group = first // GROUP_EXAMPLES
        if group == (stop - 1) // GROUP_EXAMPLES:
            (tokens, rows), start = self._group(number, group), group * GROUP_EXAMPLES
        else:
            (tokens, rows), start = self._page(number), 0
        taken = slice(first - start, stop - start)
        return tokens[taken].astype(np.int64), rows[taken].astype(np.int64)

    def _count(self, number: int) -> int:
        """Examples of a page."""
        return min(PAGE_EXAMPLES, self.manifest.examples - number * PAGE_EXAMPLES)

    def _read_page(self, number: int) -> Lengths:
        name = length_page(number)
        return read_page(self.files, name, self.manifest.files[name], self._count(number))

    def _read_group(self, number: int, group: int) -> Lengths:
        count, name = self._count(number), length_page(number)
        size = min(GROUP_EXAMPLES, count - group * GROUP_EXAMPLES)
        if number not in self._undivided:
            part = read_page(self.files, name, self.manifest.files[name], count, group)
            if len(part[1]) == size:
                return part
            self._undivided.add(number)
        tokens, rows = self._page(number)
        taken = slice(group * GROUP_EXAMPLES, group * GROUP_EXAMPLES + size)
        return tokens[taken], rows[taken]


def read_page(files: CacheFiles, name: str, entry: Mapping[str, Any], count: int, group: int | None = None) -> Lengths:
    """Tokens and rows of the `count` examples of a page, int32, or of one of its row groups. Raises CacheDamageError.

    group   number of the row group; of a page that has one row group alone, all are read
    """
    data = files.verified_bytes(name, entry)
    try:
        table = read_parquet(data, LENGTH_SCHEMA, rows=count, group=group)
    except Exception as error:  # the bytes are as recorded, so the writer was hostile, or this library cannot read them
        raise CacheDamageError(
            "a table of the cache cannot be read", file=files.root / name, found=f"{type(error).__name__}: {error}"
        ) from error
    tokens, rows = table["tokens"].to_numpy(), table["rows"].to_numpy()
    if (rows < 1).any() or (tokens < rows).any():
        raise CacheDamageError("lengths of examples contradict each other", file=files.root / name)
    return tokens, rows
