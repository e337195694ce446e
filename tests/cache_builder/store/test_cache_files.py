"""Which files of a folder count while others write there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kd.cache_builder.store.cache_files import bytes_below, files_below


def write(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"1234")


def test_what_is_under_way_is_no_file_of_a_cache(tmp_path: Path) -> None:
    published = ["examples/00000.parquet", "manifest.json", "targets.zarr/a/c/0/0"]
    write(tmp_path, *published, ".staging-a-1-2-3.0/targets.zarr/a/c/1/0", ".ready-00003/x/commit.json")
    write(tmp_path, "commits/.00001.claim", "commits/.00001.json.a-1-2-3.tmp")
    assert sorted(p.relative_to(tmp_path).as_posix() for p in files_below(tmp_path)) == published
    assert bytes_below(tmp_path) == 12


def test_folders_may_vanish_while_one_looks(tmp_path: Path) -> None:
    write(tmp_path, "a/1", "b/c/2")
    found = files_below(tmp_path)
    assert next(found) == tmp_path / "a" / "1"
    shutil.rmtree(tmp_path / "b")
    assert list(found) == []
    write(tmp_path, "b/c/2")
    assert bytes_below(tmp_path) == 8


def test_links_to_folders_are_listed_and_not_followed(tmp_path: Path) -> None:
    write(tmp_path, "cache/1", "elsewhere/2")
    (tmp_path / "cache" / "link").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(tmp_path / "cache" / "pipe")
    assert sorted(p.name for p in files_below(tmp_path / "cache")) == ["1", "link", "pipe"]
    assert bytes_below(tmp_path / "cache") == 4
