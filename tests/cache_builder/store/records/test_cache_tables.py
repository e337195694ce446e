"""Tables beside a manifest: they round-trip to the byte, and one that is damaged, swapped or hostile is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hostile import change_table, sign_manifest

from kd.cache_builder.store.records.cache_tables import (
    COMMITS,
    SHARDS,
    load_commit_table,
    load_shard_table,
    write_commit_table,
    write_shard_table,
)
from kd.cache_builder.store.records.commit_table import CommitTable
from kd.cache_builder.store.records.commits import file_entry
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.store.records.shard_table import ShardTable
from kd.common.errors import CacheDamageError, CacheError

ARRAYS = ["gold_ids", "gold_rank"]


@pytest.mark.parametrize("shards", [1, 2, 70_000])  # more than a batch of Arrow's
def test_tables_round_trip(tmp_path: Path, shards: int):
    rng = np.random.default_rng(shards)
    table = ShardTable(rng.integers(1, 99, shards), rng.integers(1, 9999, shards))
    write_shard_table(tmp_path / SHARDS, table)
    assert load_shard_table(tmp_path, file_entry(tmp_path / SHARDS), shards) == table
    sizes = {name: rng.integers(0, 2**40, shards) for name in (*ARRAYS, "examples", "commit")}
    commits = CommitTable(rng.integers(0, 256, (shards, 32)).astype(np.uint8), sizes)
    write_commit_table(tmp_path / COMMITS, commits)
    found = load_commit_table(tmp_path, file_entry(tmp_path / COMMITS), shards, ARRAYS)
    assert found == commits
    assert found[shards - 1] == bytes(commits.digests[-1]).hex()
    assert CommitTable.from_hex(found, found.stored) == found
    write_commit_table(tmp_path / "again", found)
    assert (tmp_path / "again").read_bytes() == (tmp_path / COMMITS).read_bytes()


def test_digests_that_are_none_are_refused():
    for digest in ("00", "zz" * 32, 7, None):
        with pytest.raises(CacheError, match="no SHA-256"):
            CommitTable.from_hex([digest])


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    (tmp_path / "c").mkdir()
    for name in ("manifest.json", SHARDS, COMMITS):
        shutil.copy(cache / name, tmp_path / "c" / name)
    return tmp_path / "c"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def linked(path: Path) -> None:
    path.rename(path.parent.parent / path.name)
    path.symlink_to(path.parent.parent / path.name)


@pytest.mark.parametrize("harm", [cut, flipped, linked, Path.unlink], ids=lambda harm: harm.__name__)
@pytest.mark.parametrize("name", [SHARDS, COMMITS])
def test_a_damaged_table_is_named(copy: Path, name: str, harm: Callable[[Path], None]):
    load_manifest(copy)
    harm(copy / name)
    with pytest.raises(CacheDamageError) as error:
        load_manifest(copy)
    assert str(copy / name) in str(error.value)


def test_tables_that_were_swapped_are_named(copy: Path):
    one, other = ((copy / name).read_bytes() for name in (SHARDS, COMMITS))
    (copy / SHARDS).write_bytes(other)
    (copy / COMMITS).write_bytes(one)
    with pytest.raises(CacheDamageError, match="parquet"):
        load_manifest(copy)


def columns(path: Path, **changes: Callable[[np.ndarray], np.ndarray]) -> None:
    """Write a table with other numbers in some columns."""
    table = pq.read_table(path)
    arrays = {n: pa.array(changes[n](table[n].to_numpy())) if n in changes else table[n] for n in table.column_names}
    pq.write_table(pa.table(arrays), path)


HOSTILE = {
    "negative counts": lambda path: columns(path, examples=lambda n: -n),
    "no examples": lambda path: columns(path, examples=lambda n: n * 0),
    "more rows than slots": lambda path: columns(path, rows=lambda n: n + 128),
    "another sum of rows": lambda path: columns(path, rows=lambda n: np.where(np.arange(len(n)), n, n - 1)),
    "another sum of examples": lambda path: columns(path, examples=lambda n: n + 1),
    "counts that wrap around": lambda path: columns(path, examples=lambda n: n.astype(np.int64) + 2**40),
    "one shard more": lambda path: pq.write_table(pa.concat_tables([pq.read_table(path)] * 2), path),
    "a column less": lambda path: pq.write_table(pq.read_table(path).drop_columns(["rows"]), path),
    "texts for numbers": lambda path: pq.write_table(
        pa.table({"examples": ["1"] * len(pq.read_table(path)), "rows": ["x"] * len(pq.read_table(path))}), path
    ),
    "nulls": lambda path: pq.write_table(
        pa.table({n: pa.array([None] * len(pq.read_table(path)), pa.int32()) for n in ("examples", "rows")}), path
    ),
    "no table": lambda path: path.write_bytes(b"PAR1" * 9),
    "nothing": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_shard_table_is_refused_although_it_is_signed(copy: Path, name: str):
    change_table(copy, SHARDS, HOSTILE[name])
    with pytest.raises(CacheDamageError):
        load_manifest(copy)


@pytest.mark.parametrize("name", ["one shard more", "no table", "nothing"])
def test_a_hostile_commit_table_is_refused_although_it_is_signed(copy: Path, name: str):
    change_table(copy, COMMITS, HOSTILE[name])
    with pytest.raises(CacheDamageError):
        load_manifest(copy)


def test_sizes_that_do_not_add_up_are_refused(copy: Path):
    import json

    document = json.loads((copy / "manifest.json").read_text())
    document["bytes"]["examples"] += 1
    sign_manifest(copy, document)
    with pytest.raises(CacheDamageError, match="contradicts itself"):
        load_manifest(copy)
