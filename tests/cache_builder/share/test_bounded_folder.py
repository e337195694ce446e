"""A mirror's shards stay within their bound: the file used longest ago goes first, announced files go last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kd.cache_builder.share.bounded_folder import COUNTS_PER_BOUND, BoundedFolder
from kd.common.errors import CacheError


def arrive(space: BoundedFolder, name: str, size: int, used: int, last: tuple[str, ...] = ()) -> None:
    """Fetch a file of `size` bytes that was used at time `used`."""
    space.reserve(size, last)
    path = space.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (used, used))
    space.release(size, arrived=True)


def held(root: Path) -> set[str]:
    return {p.name for p in root.rglob("*") if p.is_file()}


def test_the_file_used_longest_ago_makes_room(tmp_path: Path):
    space = BoundedFolder(tmp_path, 30)
    for name, used in (("a", 2), ("b", 1), ("c", 3)):
        arrive(space, f"examples/{name}", 10, used)
    arrive(space, "examples/d", 10, 4)
    assert held(tmp_path) == {"a", "c", "d"}


def test_announced_files_are_removed_after_all_others(tmp_path: Path):
    space = BoundedFolder(tmp_path, 30)
    for name, used in (("a", 2), ("b", 1), ("c", 3)):
        arrive(space, f"examples/{name}", 10, used)
    arrive(space, "examples/d", 20, 4, last=("examples/b",))
    assert held(tmp_path) == {"b", "d"}


def test_metadata_is_neither_counted_nor_removed(tmp_path: Path):
    (tmp_path / "targets.zarr/log_z/c").mkdir(parents=True)
    (tmp_path / "targets.zarr/log_z/zarr.json").write_bytes(bytes(100))
    (tmp_path / "manifest.json").write_bytes(bytes(100))
    space = BoundedFolder(tmp_path, 10)
    arrive(space, "targets.zarr/log_z/c/0", 10, 1)
    arrive(space, "targets.zarr/log_z/c/1", 10, 2)
    assert held(tmp_path) == {"zarr.json", "manifest.json", "1"}


def test_a_file_that_does_not_arrive_gives_its_room_back(tmp_path: Path):
    space = BoundedFolder(tmp_path, 20)
    arrive(space, "examples/a", 10, 1)
    for _ in range(5):
        space.reserve(10)
        space.release(10, arrived=False)
    assert held(tmp_path) == {"a"}
    with pytest.raises(CacheError, match="smaller than one file"):
        space.reserve(21)


def test_two_mirrors_of_one_folder_exceed_the_bound_by_a_part_of_it_at_most(tmp_path: Path):
    limit, size, most = 1600, 10, 0
    spaces = [BoundedFolder(tmp_path, limit) for _ in range(2)]
    for number in range(400):
        arrive(spaces[number % 2], f"examples/{number}", size, number)
        most = max(most, sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()))
    # each counts again after an eighth of the bound: that much, and a file, may come from the other meanwhile
    assert limit / 2 < most <= limit + limit / COUNTS_PER_BOUND + 2 * size
