"""A spec names files in a fixed order; what a folder holds besides is counted, and nothing is read twice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.data.left_out import LeftOut
from kd.data.rows.file_list import FileList, list_files, no_such_path

TYPES = (".txt", ".jsonl", ".json")


def put(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)


def found(spec: str | Path, left_out: LeftOut | None = None) -> FileList:
    files = list_files(str(spec), TYPES, LeftOut() if left_out is None else left_out)
    assert files is not None
    return files


def names(spec: str | Path, left_out: LeftOut | None = None) -> list[str]:
    files = found(spec, left_out)
    return [files.name(file) for file in files.files]


def test_a_folder_is_its_files_of_known_types_and_the_rest_is_counted(tmp_path: Path) -> None:
    put(tmp_path, "b/z.txt", "a.txt.gz", "C.TXT", "c.JSONL.zst", "x.json", "notes.md", "b/._x.txt", ".hidden.txt")
    put(tmp_path, ".ipynb_checkpoints/a-checkpoint.txt", "b/.git/config.txt")
    os.symlink(tmp_path / "b", tmp_path / "again")
    os.mkfifo(tmp_path / "pipe.txt")
    left_out = LeftOut()
    assert names(tmp_path, left_out) == ["C.TXT", "a.txt.gz", "b/z.txt", "c.JSONL.zst", "x.json"]
    assert left_out.counts == {"other_files": 2, "hidden_files": 4, "linked_folders": 1}
    assert left_out.first["linked_folders"] == "again"


def test_a_folder_with_nothing_to_read_says_what_is_there(tmp_path: Path) -> None:
    put(tmp_path, "a.md", ".b.txt")
    with pytest.raises(DataError, match="no readable files") as caught:
        found(tmp_path)
    assert caught.value.details["found"] == "left out: other files 1 (first a.md), hidden files 1 (first .b.txt)"


def test_a_glob_is_what_it_matches_in_the_order_of_the_paths(tmp_path: Path) -> None:
    put(tmp_path, "a/2.txt", "a/1.txt", "b/3.txt", "b/c/4.txt", "a/n.md")
    assert names(tmp_path / "a" / "*.txt") == names(tmp_path / "a" / "[12].txt") == ["1.txt", "2.txt"]
    assert names(tmp_path / "*" / "*.txt") == ["a/1.txt", "a/2.txt", "b/3.txt"]
    assert names(tmp_path / "**" / "*.txt") == ["a/1.txt", "a/2.txt", "b/3.txt", "b/c/4.txt"]
    left_out = LeftOut()
    assert names(tmp_path / "a" / "*", left_out) == ["1.txt", "2.txt"]
    assert left_out.document() == {"other_files": {"count": 1, "first": "n.md"}}
    with pytest.raises(DataError, match="no such file or folder"):
        found(tmp_path / "a" / "*.jsonl")


def test_files_of_a_glob_have_the_names_that_they_have_in_the_folder(tmp_path: Path) -> None:
    put(tmp_path, "1.txt", "2.txt")
    assert names(tmp_path / "*.txt") == names(tmp_path)


def test_several_files_are_read_in_the_order_given(tmp_path: Path) -> None:
    put(tmp_path, "a/x.txt", "b/x.txt", "a,b.txt", "c/1.txt", "c/2.txt")
    assert names(f"{tmp_path}/b/x.txt,{tmp_path}/a/x.txt") == ["b/x.txt", "a/x.txt"]
    assert names(f"{tmp_path}/c,{tmp_path}/a/x.txt") == ["c/1.txt", "c/2.txt", "a/x.txt"]
    assert names(f"{tmp_path}/c/*.txt, {tmp_path}/a/x.txt") == ["c/1.txt", "c/2.txt", "a/x.txt"]
    assert names(f"{tmp_path}/a,b.txt,{tmp_path}/a/x.txt") == ["a,b.txt", "a/x.txt"], "a comma may be part of a name"
    with pytest.raises(DataError, match="no such file or folder") as caught:
        found(f"{tmp_path}/a/x.txt,{tmp_path}/a/y.txt")
    assert caught.value.details["where"] == f"{tmp_path}/a/y.txt"


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("texts.json", "texts.jsonl"), ("text.jsonl", "texts.jsonl"), ("pairs.jsonl", None), ("no/texts.jsonl", None)],
)
def test_a_path_at_which_nothing_is_names_its_neighbour(tmp_path: Path, typed: str, meant: str | None) -> None:
    put(tmp_path, "texts.jsonl", "other.csv")
    error = no_such_path(str(tmp_path / typed), "a path")
    assert error.details.get("did you mean") == (None if meant is None else str(tmp_path / meant))
    assert error.details["where"] == str(tmp_path / typed)


def test_an_address_in_a_store_with_one_slash_is_named_with_two() -> None:
    assert no_such_path("s3:/bucket/x.jsonl", "a path").details["did you mean"] == "s3://bucket/x.jsonl"


def test_a_name_with_the_characters_of_a_glob_is_a_name(tmp_path: Path) -> None:
    put(tmp_path, "a[1].txt", "a1.txt")
    assert names(tmp_path / "a[1].txt") == ["a[1].txt"]


def test_nothing_is_read_twice(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "a.txt.gz", "b/c.txt")
    for spec in (tmp_path, f"{tmp_path}/b,{tmp_path}/b/c.txt", f"{tmp_path}/b/*.txt,{tmp_path}/b"):
        with pytest.raises(DataError, match="a file is read twice"):
            found(spec)


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    put(tmp_path, "a.txt", "b.txt")
    assert names("~/a.txt") == ["a.txt"]
    assert names("~/*.txt") == names("~/a.txt,~/b.txt") == ["a.txt", "b.txt"]


@pytest.mark.parametrize("spec", ["demo", "owner/name", "nowhere.txt", "a,b", "gs://bucket/*.txt"])
def test_what_is_not_on_this_disk_is_none(spec: str) -> None:
    assert list_files(spec, TYPES, LeftOut()) is None
