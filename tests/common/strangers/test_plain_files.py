"""Only plain files are opened, only inside their folder, and only up to a bound; nothing waits."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile import NOT_PLAIN

from kd.common.errors import DataError
from kd.common.strangers.plain_files import NotPlainError, is_inside, open_plain, read_plain, refuse_special_files


@pytest.mark.parametrize("make", NOT_PLAIN, ids=lambda make: make.__name__)
def test_anything_but_a_plain_file_is_refused_at_once(make: Callable[[Path], None], tmp_path: Path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_text("mine")
    make(folder / "file")
    with pytest.raises(OSError) as caught:
        read_plain(folder / "file", 100, inside=folder)
    assert isinstance(caught.value, NotPlainError | FileNotFoundError) or "symbolic links" in str(caught.value)


def test_a_plain_file_is_read_with_or_without_its_folder(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"four")
    (tmp_path / "link").symlink_to("file")
    for name in ("file", "link"):
        assert read_plain(tmp_path / name, 4) == read_plain(tmp_path / name, 4, inside=tmp_path) == b"four"


def test_a_link_out_of_the_folder_is_followed_only_where_no_folder_is_named(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "outside").write_bytes(b"four")
    (tmp_path / "folder" / "link").symlink_to(tmp_path / "outside")
    assert read_plain(tmp_path / "folder" / "link", 4) == b"four"
    with pytest.raises(NotPlainError, match="leaves its folder"):
        open_plain(tmp_path / "folder" / "link", inside=tmp_path / "folder")


def test_more_bytes_than_the_bound_are_refused_before_they_are_read(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"five!")
    with pytest.raises(NotPlainError, match="too large: more than 4 bytes"):
        read_plain(tmp_path / "file", 4)
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(NotPlainError, match="too large"):
        read_plain(tmp_path / "sparse", 2**30)


def test_a_file_that_hides_its_size_is_bounded_too():
    assert os.stat("/proc/self/status").st_size == 0
    with pytest.raises(NotPlainError, match="too large"):
        read_plain("/proc/self/status", 10)


def test_a_folder_whose_name_only_begins_alike_is_outside(tmp_path: Path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache-2").mkdir()
    assert is_inside(tmp_path / "cache" / "a", tmp_path / "cache")
    assert not is_inside(tmp_path / "cache-2" / "a", tmp_path / "cache")
    assert is_inside("/etc", "/")


def test_a_pipe_beside_the_weights_is_refused_and_a_link_is_not(tmp_path: Path):
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "blob")
    (tmp_path / "model" / "gone").symlink_to(tmp_path / "nothing")
    refuse_special_files(tmp_path / "model")
    refuse_special_files("owner/name-on-the-hub")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "model" / "s"))
        with pytest.raises(DataError, match="not a plain file") as caught:
            refuse_special_files(tmp_path / "model")
    assert caught.value.details["found"] == "a socket"
