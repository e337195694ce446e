"""A mirror's shards stay within their bound: the file used longest ago goes first, files that are read soon go last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd.cache_builder.share.bounded_folder import BoundedFolder
from kd.common.errors import CacheError


def arrive(space: BoundedFolder, name: str, size: int, used: int) -> None:
    """Fetch a file of `size` bytes that was used at time `used`."""
    space.reserve(size)
    path = space.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    os.utime(path, (used, used))
    space.release(size, arrived=True)


def bounded(root: Path, limit: int) -> BoundedFolder:
    return BoundedFolder(root, limit, root / ".locks")


def held(root: Path) -> set[str]:
    return {p.name for p in root.rglob("*") if p.is_file() and p.parent.name != ".locks"}


def shard_bytes(root: Path) -> int:
    return sum(p.stat().st_size for p in (root / "examples").iterdir())


def test_the_file_used_longest_ago_makes_room(tmp_path: Path):
    space = bounded(tmp_path, 30)
    for name, used in (("a", 2), ("b", 1), ("c", 3)):
        arrive(space, f"examples/{name}", 10, used)
    arrive(space, "examples/d", 10, 4)
    assert held(tmp_path) == {"a", "c", "d"}


def test_expected_files_are_removed_after_all_others_by_any_mirror_until_they_are_read(tmp_path: Path):
    space, other = bounded(tmp_path, 30), bounded(tmp_path, 30)
    assert space.mirrors() == 2
    for name, used in (("a", 2), ("b", 1), ("c", 3)):
        arrive(space, f"examples/{name}", 10, used)
    space.expected(tmp_path / "examples/b")
    space.used(tmp_path / "examples/c")
    arrive(other, "examples/d", 20, int(time.time()))
    assert held(tmp_path) == {"b", "d"}
    space.used(tmp_path / "examples/b")
    other.expected(tmp_path / "examples/d")
    arrive(space, "examples/e", 10, int(time.time()) + 1)
    assert held(tmp_path) == {"d", "e"}
    space.expected(tmp_path / "examples/none")  # which was removed meanwhile


def test_metadata_is_neither_counted_nor_removed(tmp_path: Path):
    (tmp_path / "targets.zarr/log_z/c").mkdir(parents=True)
    (tmp_path / "targets.zarr/log_z/zarr.json").write_bytes(bytes(100))
    (tmp_path / "manifest.json").write_bytes(bytes(100))
    space = bounded(tmp_path, 10)
    arrive(space, "targets.zarr/log_z/c/0", 10, 1)
    arrive(space, "targets.zarr/log_z/c/1", 10, 2)
    assert held(tmp_path) == {"zarr.json", "manifest.json", "1"}


def test_a_file_that_does_not_arrive_gives_its_room_back(tmp_path: Path):
    space = bounded(tmp_path, 20)
    arrive(space, "examples/a", 10, 1)
    for _ in range(5):
        space.reserve(10)
        space.release(10, arrived=False)
    assert held(tmp_path) == {"a"}
    with pytest.raises(CacheError, match="smaller than one file"):
        space.reserve(21)


def test_two_mirrors_of_one_folder_share_one_bound(tmp_path: Path):
    limit, most = 160, 0
    spaces = [bounded(tmp_path, limit) for _ in range(2)]
    for number in range(60):
        arrive(spaces[number % 2], f"examples/{number}", 10, number)
        most = max(most, shard_bytes(tmp_path))
    assert most == limit


FETCHER = """
import os, random, sys
from pathlib import Path
from kd.cache_builder.share.bounded_folder import BoundedFolder

root, number = Path(sys.argv[1]), sys.argv[2]
space = BoundedFolder(root, 100, root / ".locks")
for n in range(25):
    size = random.Random(f"{number}-{n}").randint(1, 60)
    space.reserve(size)
    path = root / f"examples/{number}-{n}"
    path.write_bytes(bytes(size))
    stored = 0
    for file in (root / "examples").iterdir():
        try:
            stored += file.stat().st_size
        except FileNotFoundError:  # the other has just removed it
            pass
    if stored > 100:
        sys.exit("over the bound")
    space.release(size, arrived=True)
"""


def test_two_processes_never_hold_more_than_the_bound(tmp_path: Path):
    (tmp_path / "examples").mkdir()
    command = [sys.executable, "-c", FETCHER, str(tmp_path)]
    fetchers = [subprocess.Popen([*command, str(n)], stderr=subprocess.PIPE, text=True) for n in range(2)]
    assert [(f.communicate(timeout=120)[1], f.returncode) for f in fetchers] == [("", 0)] * 2
    assert 40 < shard_bytes(tmp_path) <= 100


def test_what_a_killed_process_had_reserved_is_given_back(tmp_path: Path):
    script = FETCHER.partition("for n in")[0] + "space.reserve(90); os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path), "0"]).returncode == -9
    space = bounded(tmp_path, 100)
    space.reserve(90)  # or it would wait for ever
    space.release(90, arrived=False)
    (ledger,) = (tmp_path / ".locks").glob("bound.json")
    assert [size for size in json.loads(ledger.read_text())["reserved"].values() if size] == []
    assert len(list((tmp_path / ".locks").glob("mirror-*"))) == 1


def test_a_ledger_that_was_cut_short_is_counted_anew(tmp_path: Path):
    space = bounded(tmp_path, 30)
    arrive(space, "examples/a", 20, 1)
    (tmp_path / ".locks" / "bound.json").write_text('{"sto')
    arrive(space, "examples/b", 20, 2)
    assert held(tmp_path) == {"b"}
