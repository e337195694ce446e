"""What `digests.json` lists is whole if and only if it agrees."""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from pathlib import Path

import pytest

from kd.common.disk.digests import (
    DIGESTS,
    checked_digest,
    damage_of,
    file_sha256,
    has_digests,
    refuse_damage,
    with_digest,
    write_digests,
)
from kd.common.errors import DamagedFilesError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files, one of them in a folder, and their digests."""
    place = tmp_path / "folder"
    (place / "inner").mkdir(parents=True)
    for name in ("a.bin", "inner/b.bin", "c.jsonl"):
        (place / name).write_bytes(name.encode() * 20)
    write_digests(place)
    return place


def test_a_folder_that_was_not_changed_is_whole(folder: Path) -> None:
    assert damage_of(folder) is None
    refuse_damage(folder)
    listed = json.loads((folder / DIGESTS).read_text())["files"]
    assert sorted(listed) == ["a.bin", "c.jsonl", "inner/b.bin"]
    assert listed["a.bin"]["sha256"] == hashlib.sha256(b"a.bin" * 20).hexdigest()


def test_a_folder_without_digests_says_nothing(tmp_path: Path) -> None:
    assert not has_digests(tmp_path)
    refuse_damage(tmp_path)
    with pytest.raises(FileNotFoundError):
        damage_of(tmp_path)


def test_every_flipped_bit_and_every_cut_is_seen(folder: Path) -> None:
    dice = random.Random(0)
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        before = path.read_bytes()
        for _ in range(40):
            changed = bytearray(before)
            changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
            path.write_bytes(changed)
            assert damage_of(folder) is not None or (path.name == DIGESTS and harmless(before, bytes(changed)))
            path.write_bytes(before[: dice.randrange(len(before))])
            assert damage_of(folder) is not None or path.read_bytes() == before.rstrip()
        path.write_bytes(before)
    assert damage_of(folder) is None


def harmless(before: bytes, changed: bytes) -> bool:
    """Whether a changed list of digests says the same: white space, or the name of its own digest."""
    try:
        said, says = json.loads(before), json.loads(changed)
    except ValueError:
        return False
    return says.get("files") == said["files"]


@pytest.mark.parametrize("make", ["nothing", "folder", "fifo", "endless"])
def test_what_is_no_plain_file_is_missing(folder: Path, make: str) -> None:
    path = folder / "a.bin"
    path.unlink()
    if make == "folder":
        path.mkdir()
    elif make == "fifo":
        os.mkfifo(path)
    elif make == "endless":
        path.symlink_to("/dev/zero")
    assert damage_of(folder) == "a.bin is missing"


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "inner/../../outside"])
def test_names_outside_the_folder_are_damage(folder: Path, name: str) -> None:
    (folder.parent / "outside").write_bytes(b"x")
    document = json.loads((folder / DIGESTS).read_text())
    document["files"] = {name: {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    plain = {key: value for key, value in document.items() if key != "digest"}
    (folder / DIGESTS).write_text(json.dumps(with_digest(plain)))
    assert damage_of(folder) == f"{name} lies outside the folder"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"files": []}', '{"files": {"a.bin": 1}}', '{"files": {"a.bin": {}}}']
)
def test_digests_that_cannot_be_read_are_damage(folder: Path, text: str) -> None:
    (folder / DIGESTS).write_text(text)
    assert damage_of(folder) == f"{DIGESTS} cannot be read"


def test_only_the_wanted_names_are_compared(folder: Path) -> None:
    (folder / "c.jsonl").write_text("other")
    refuse_damage(folder, lambda name: not name.endswith(".jsonl"))
    with pytest.raises(DamagedFilesError, match="not what was written") as caught:
        refuse_damage(folder)
    assert caught.value.exit_code == 3
    assert "c.jsonl has 5 bytes and not 140" in str(caught.value)


def test_a_document_knows_whether_it_was_changed() -> None:
    document = with_digest({"a": 1})
    assert checked_digest(document) == {"a": 1}
    assert checked_digest({"a": 1}) == {"a": 1}
    with pytest.raises(ValueError, match="its own digest differs"):
        checked_digest(document | {"a": 2})


def test_a_changed_file_has_a_new_digest_in_the_same_process(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for text in (b"one", b"two", b"other"):  # two of one length, within a tick of the file system's clock
        path.write_bytes(text)
        assert file_sha256(path) == hashlib.sha256(text).hexdigest()
    os.utime(path, (1e9, 1e9))
    assert file_sha256(path) == file_sha256(path) == hashlib.sha256(b"other").hexdigest()


def test_a_file_changed_behind_its_own_back_has_a_new_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same size, and with its old time put back: a program can set the one, but not when it did so."""
    monkeypatch.setattr("kd.common.disk.digests.RACY_SECONDS", 0.0)
    path = tmp_path / "f"
    path.write_bytes(b"one")
    status, first = path.stat(), file_sha256(path)
    time.sleep(0.02)  # a tick of the kernel's clock
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest() != first
