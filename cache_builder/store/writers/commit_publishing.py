"""The table of commits, which is written when all shards of a cache are there, just before its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.store.encoding.arrays import ArraySpec
from kd.cache_builder.store.records.cache_tables import COMMITS, load_commit_table, sized_files, write_commit_table
from kd.cache_builder.store.records.commit_table import CommitTable
from kd.cache_builder.store.records.commits import commit_path, file_entry, shard_files
from kd.cache_builder.store.records.shard_record import ShardRecord
from kd.common.errors import CacheDamageError
from kd.common.files import process_tag, publish, publish_first


def stored_bytes(root: Path, arrays: Sequence[ArraySpec], records: Sequence[ShardRecord]) -> dict[str, np.ndarray]:
    """The columns of sizes of the table of commits."""
    names = sized_files([a.name for a in arrays])
    stored = {name: np.zeros(len(records), dtype=np.int64) for name in names}
    for record in records:
        for name, path in shard_files(arrays, record.index).items():
            stored[name][record.index] = record.files[path]["bytes"]
        stored["commit"][record.index] = commit_path(root, record.index).stat().st_size
    return stored


def publish_commits(root: Path, arrays: Sequence[ArraySpec], table: CommitTable) -> dict[str, Any]:
    """Have the table of commits at its name; returns its size and digest. Another builder may have published it already."""
    staged = root / f".{COMMITS}.{process_tag()}.tmp"
    try:
        write_commit_table(staged, table)
        published = publish_first(staged, root / COMMITS)
        if not published and not _holds(root, arrays, table):  # left by a build that was reopened
            write_commit_table(staged, table)
            publish(staged, root / COMMITS)
    finally:
        staged.unlink(missing_ok=True)
    return file_entry(root / COMMITS)


def _holds(root: Path, arrays: Sequence[ArraySpec], table: CommitTable) -> bool:
    """Whether the table of commits that is there says the same."""
    try:
        entry = file_entry(root / COMMITS)
        return load_commit_table(root, entry, len(table), [a.name for a in arrays]) == table
    except (CacheDamageError, OSError):
        return False
