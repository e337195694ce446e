"""Write the tables beside a manifest again, from the commits: what they hold is a summary of these.

A table counts as rebuilt only if its bytes are those that the manifest has recorded. Lengths of examples need no such thing: the
build writes them again, as it does the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.store.records.cache_tables import (
    SHARDS,
    TABLES,
    sized_files,
    write_commit_table,
    write_shard_table,
)
from kd.cache_builder.store.records.commit_table import CommitTable
from kd.cache_builder.store.records.commits import commit_path, file_entry
from kd.cache_builder.store.records.manifest import BUILDING, MANIFEST, TARGETS, listed_tables
from kd.cache_builder.store.records.shard_record import ShardRecord, parse_shard_record
from kd.cache_builder.store.records.shard_table import ShardTable
from kd.cache_builder.upkeep.repair import is_sound
from kd.common.errors import CacheDamageError, KdError
from kd.common.files import digest_of, process_tag, publish, read_json, sha256_of, write_error


def rebuild_tables(root: Path) -> list[str]:
    """Replace the damaged and missing tables of a cache; returns their names.

    Raises CacheDamageError where a commit is missing, or the bytes do not come out as they were. An unreadable manifest is left to
    whoever reads it next.
    """
    document: Mapping[str, Any] = {}
    with suppress(KdError):
        document = read_json(root / (MANIFEST if (root / MANIFEST).exists() else BUILDING), inside=root)
    content = {name: value for name, value in document.items() if name != "checksum"}
    if document.get("checksum") != digest_of(content):
        return []
    listed = listed_tables(document)
    broken = [name for name in TABLES if name in listed and not is_sound(root, name, listed[name])]
    if not broken:
        return []
    names = [str(array["name"]) for array in document["arrays"]]
    paths = [commit_path(root, index) for index in range(int(document["shards"]))]
    try:
        records = [parse_shard_record(read_json(path, inside=root), path) for path in paths]
    except KdError as error:
        raise _not_rebuilt(root / broken[0], error.headline) from error
    for name in broken:
        _rebuild(root, name, listed[name], records, names)
    return broken


def _rebuild(
    root: Path, name: str, entry: Mapping[str, Any], records: Sequence[ShardRecord], arrays: Sequence[str]
) -> None:
    staged = root / f".{name}.{process_tag()}.tmp"
    try:
        if name == SHARDS:
            write_shard_table(staged, ShardTable.from_triples((*r.examples, r.rows) for r in records))
        else:
            write_commit_table(staged, _commit_table(root, records, arrays))
        if file_entry(staged) != entry:
            raise _not_rebuilt(root / name, "other bytes: another release wrote it, or a commit was changed too")
        publish(staged, root / name)
    except OSError as error:
        raise write_error(root / name, error) from error
    finally:
        staged.unlink(missing_ok=True)


def _commit_table(root: Path, records: Sequence[ShardRecord], arrays: Sequence[str]) -> CommitTable:
    stored = {name: np.zeros(len(records), dtype=np.int64) for name in sized_files(arrays)}
    for record in records:
        for path, entry in record.files.items():
            array = path.split("/")[1] if path.startswith(f"{TARGETS}/") else "examples"
            stored[array][record.index] = entry["bytes"]
        stored["commit"][record.index] = commit_path(root, record.index).stat().st_size
    return CommitTable.from_hex([sha256_of(commit_path(root, r.index)) for r in records], stored)


def _not_rebuilt(path: Path, problem: str) -> CacheDamageError:
    return CacheDamageError(
        "a table of the cache cannot be written again", file=path, found=problem, try_="kd cache repair --from COPY"
    )
