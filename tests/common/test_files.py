"""Files are whole or absent; JSON has one spelling; what a killed process left is swept and nothing else."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.common import files
from kd.common.errors import CacheDamageError, DataError
from kd.common.files import (
    canonical_json,
    digest_of,
    process_tag,
    publish,
    publish_first,
    read_json,
    read_object,
    sha256_of,
    sweep,
    write_atomic,
    write_error,
)
from kd.common.processes import lock_of

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(value=json_values)
def test_json_round_trips(value):
    assert json.loads(canonical_json(value)) == value
    assert canonical_json(json.loads(canonical_json(value))) == canonical_json(value)


def test_json_does_not_depend_on_the_order_of_keys():
    a, b = {"x": 1, "y": {"p": 2, "q": 3}}, {"y": {"q": 3, "p": 2}, "x": 1}
    assert list(a) != list(b)
    assert canonical_json(a) == canonical_json(b)
    assert digest_of(a) == digest_of(b) != digest_of({**a, "x": 2})


def test_nan_is_not_json():
    with pytest.raises(ValueError):
        canonical_json({"x": float("nan")})


def test_sha256_is_that_of_the_bytes(tmp_path: Path):
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_of(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path):
    write_atomic(tmp_path / "deep" / "f.json", "one")
    write_atomic(tmp_path / "deep" / "f.json", "two")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["f.json"]
    assert (tmp_path / "deep" / "f.json").read_text() == "two"


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_atomic(tmp_path / "f.json", "old")

    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "sync_file", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(tmp_path / "f.json", "new")
    assert (tmp_path / "f.json").read_text() == "old"


def test_publish_makes_the_folder_and_moves_the_file(tmp_path: Path):
    (tmp_path / "t").write_text("x")
    publish(tmp_path / "t", tmp_path / "a" / "b" / "f")
    assert (tmp_path / "a" / "b" / "f").read_text() == "x"
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"text"', b"\xff\xfe", b"[" * 200_000])
def test_a_damaged_json_file_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "f.json").write_bytes(content)
    with pytest.raises(CacheDamageError) as caught:
        read_json(tmp_path / "f.json")
    assert str(tmp_path / "f.json") in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_missing_json_file_is_damage(tmp_path: Path):
    with pytest.raises(CacheDamageError, match="missing"):
        read_json(tmp_path / "f.json")


def test_a_huge_json_file_is_refused_before_it_is_read(tmp_path: Path):
    with (tmp_path / "f.json").open("wb") as file:
        file.truncate(2**40)  # sparse: takes no space, and does not fit into memory
    with pytest.raises(CacheDamageError) as caught:
        read_json(tmp_path / "f.json")
    assert caught.value.details["found"] == f"too large: more than {files.MAX_JSON_BYTES} bytes"
    with pytest.raises(DataError, match="cannot be read"):
        read_object(tmp_path / "f.json")


def test_a_document_too_deep_to_write_is_not_canonical(tmp_path: Path):
    (tmp_path / "f.json").write_text('{"a": ' * 900 + "1" + "}" * 900)
    with pytest.raises(CacheDamageError):
        read_json(tmp_path / "f.json")


def test_only_the_reader_of_a_cache_asks_for_the_canonical_spelling(tmp_path: Path):
    (tmp_path / "f.json").write_text('{"b": 1, "a": 2}')
    assert read_object(tmp_path / "f.json") == {"a": 2, "b": 1}
    with pytest.raises(CacheDamageError, match="was changed"):
        read_json(tmp_path / "f.json")


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_sweep_removes_what_dead_processes_left_and_nothing_of_live_ones(tmp_path: Path):
    here, pid, _ = process_tag().rsplit("-", 2)
    dead, alive = dead_pid(), os.getppid()
    gone = [
        f".staging-{here}-{dead}-ab.0",
        f".manifest.json.{here}-{dead}-ab.tmp",
        f".staging-{here}-{pid}-ab.3",
    ]  # an earlier process of this number
    old = [".staging-elsewhere-1-7-ab.0", ".00001.json.elsewhere-1-7-ab.tmp"]
    kept = [
        f".staging-{here}-{alive}-ab.0",
        f".staging-{process_tag()}.0",
        f".00001.json.{here}-{alive}-ab.tmp",
        f".00002.json.elsewhere-1-{dead}-ab.tmp",
        f".staging-elsewhere-1-{dead}-cd.0",
        "manifest.json",
    ]
    gone += old
    for name in gone + kept:
        if "staging" in name:
            (tmp_path / name / "deep").mkdir(parents=True)
        else:
            (tmp_path / name).write_text("")
    for name in old:
        for path in [*(tmp_path / name).rglob("*"), tmp_path / name]:
            os.utime(path, (0, time.time() - files.ABANDONED_SECONDS - 60))
    os.utime(tmp_path / kept[-2], (0, 0))  # an old folder, in which something was written just now
    sweep(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_a_sweep_removes_what_another_container_of_this_machine_left_when_its_lock_is_free(tmp_path: Path):
    mark = process_tag().rpartition("-")[2]
    places = {name: tmp_path / f".staging-elsewhere-1-7-{name}.0" for name in (mark, "0" * len(mark), mark[:-1] + "x")}
    for place in places.values():
        place.mkdir()
        (place / files.STAGING_LOCK).touch()
    handle = lock_of(places[mark] / files.STAGING_LOCK)
    assert handle is not None
    sweep(tmp_path)
    assert all(place.exists() for place in places.values()), "held, of another machine, of no known form"
    os.close(handle)
    sweep(tmp_path)
    assert [name for name, place in places.items() if not place.exists()] == [mark]


@pytest.mark.parametrize("links", [True, False])
def test_only_the_first_to_publish_a_name_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool):
    def no_links(a, b):
        raise OSError(errno.EPERM, "no hard links here")

    if not links:
        monkeypatch.setattr(os, "link", no_links)
    got = []
    for text in ("one", "two"):
        (tmp_path / "t").write_text(text)
        got.append(publish_first(tmp_path / "t", tmp_path / "f"))
    assert got == [True, False]
    assert (tmp_path / "f").read_text() == "one"
    assert not (tmp_path / "t").exists()


def test_sweeping_a_folder_that_is_not_there_is_fine(tmp_path: Path):
    sweep(tmp_path / "none")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_called_a_full_disk(tmp_path: Path, number: int):
    message = str(write_error(tmp_path, OSError(number, os.strerror(number))))
    assert "disk is full" in message
    assert "run the same command again" in message


def test_other_write_errors_name_the_file_and_the_reason(tmp_path: Path):
    error = write_error(tmp_path, PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "f")))
    assert "cannot write" in str(error)
    assert error.details["where"] == str(tmp_path / "f")
    assert error.details["found"] == "Permission denied"


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "README.md", "report.html", "reference.csv"])
def test_what_a_killed_process_had_begun_to_write_is_swept_whatever_its_kind(tmp_path: Path, name: str) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    dead = process_tag().replace(f"-{os.getpid()}-", f"-{pid}-")
    for tag in (dead, process_tag()):
        (tmp_path / f".{name}.{tag}.tmp").write_text("half")
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f".{name}.{process_tag()}.tmp"]
