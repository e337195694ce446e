"""Tables beside a manifest are written again from the commits, to the byte or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.records.cache_tables import COMMITS, SHARDS
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.upkeep.rebuild_tables import rebuild_tables
from kd.cache_builder.upkeep.repair import mend_manifest
from kd.common.errors import CacheDamageError


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    return shutil.copytree(cache, tmp_path / "c")


def harm(path: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.parametrize("names", [[SHARDS], [COMMITS], [SHARDS, COMMITS]])
def test_what_was_lost_comes_back_to_the_byte(cache: Path, copy: Path, names: list[str], tree):
    assert rebuild_tables(copy) == []
    harm(copy / names[0])
    for name in names[1:]:
        (copy / name).unlink()
    with pytest.raises(CacheDamageError):
        load_manifest(copy)
    assert rebuild_tables(copy) == names
    assert tree(copy) == tree(cache)


def test_a_table_is_not_rebuilt_from_commits_that_are_lost_or_changed(copy: Path):
    harm(copy / COMMITS)
    path = copy / "commits" / "00001.json"
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"index": 1', b'"index": 2'))
    with pytest.raises(CacheDamageError, match="cannot be written again"):
        rebuild_tables(copy)
    path.unlink()
    with pytest.raises(CacheDamageError, match="cannot be written again"):
        rebuild_tables(copy)
    path.write_bytes(data)
    assert rebuild_tables(copy) == [COMMITS]


def test_a_copy_gives_its_tables(cache: Path, copy: Path, tree):
    harm(copy / SHARDS)
    (copy / COMMITS).unlink()
    assert mend_manifest(copy, LocalFiles(cache)) == [SHARDS, COMMITS]
    assert tree(copy) == tree(cache)


def test_an_unreadable_manifest_is_left_alone(copy: Path):
    harm(copy / "manifest.json")
    assert rebuild_tables(copy) == []
