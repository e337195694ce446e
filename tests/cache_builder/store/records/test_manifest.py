"""The manifest describes itself, names every difference, and refuses anything hostile."""

from __future__ import annotations

import copy
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kd.cache_builder.store.records.cache_tables import TABLES
from kd.cache_builder.store.records.manifest import (
    Layout,
    fingerprint_of,
    load_manifest,
)
from kd.common.errors import CacheDamageError, CacheError, CacheMismatchError
from kd.common.files import canonical_json, digest_of

GOLDEN = Path(__file__).parents[3] / "golden"


def test_a_manifest_round_trips_to_the_same_bytes(cache: Path):
    manifest = load_manifest(cache)
    assert manifest.to_json() == (cache / "manifest.json").read_text()
    assert manifest.complete
    assert manifest.rows == sum(rows for _, _, rows in manifest.shards)


def test_the_fingerprint_covers_the_identity_and_nothing_else(cache: Path):
    manifest = load_manifest(cache)
    assert set(manifest.identity) == {"teacher", "tokenizer", "corpus", "blocks", "targets"}
    changed = copy.deepcopy(manifest.identity)
    changed["blocks"]["seq_len"] += 1
    assert fingerprint_of(changed) != manifest.fingerprint
    text = canonical_json(manifest.identity)
    assert str(cache) not in text
    assert "/tmp" not in text


def edited(cache: Path, folder: Path, edit, *, sign: bool = True) -> Path:
    """A copy of the manifest and its tables after `edit(document)`; fingerprint and checksum made to fit, as an attacker would."""
    document = json.loads((cache / "manifest.json").read_text())
    edit(document)
    if sign:
        with suppress(Exception):  # of an identity that is none
            document["fingerprint"] = fingerprint_of(document["identity"], document["format_version"])
        document["checksum"] = digest_of({k: v for k, v in document.items() if k != "checksum"})
    folder.mkdir(exist_ok=True)
    for name in TABLES:
        if (cache / name).exists():
            shutil.copy(cache / name, folder / name)
    (folder / "manifest.json").write_text(canonical_json(document))
    return folder


def setter(path: str, value):
    def edit(document: Any) -> None:
        *parents, last = path.split(".")
        for key in parents:
            document = document[int(key)] if isinstance(document, list) else document[key]
        if isinstance(document, list):
            document[int(last)] = value
        else:
            document[last] = value

    edit.__name__ = f"{path}={str(value)[:20]}"
    return edit


def rename_file(name: str):
    def edit(document: dict) -> None:
        document["files"][name] = document["files"].pop("vocabulary.parquet")

    edit.__name__ = f"file {name!r}"
    return edit


HOSTILE = [
    setter("rows", 2**60),
    setter("rows", -1),
    setter("rows", 1.5),
    setter("rows", True),
    setter("rows", "9"),
    setter("examples", 10**30),
    setter("layout.shard_rows", 2**40),
    setter("layout.shard_rows", 128.0),
    setter("layout.chunk_rows", 0),
    setter("layout.more", 1),
    setter("shards", 0),
    setter("shards", 2**40),
    setter("shards", "1"),
    setter("bytes", {}),
    setter("bytes", []),
    setter("identity.teacher.vocabulary_size", 2**40),
    setter("identity.teacher.vocabulary_size", 4),
    setter("identity.targets.top_k", 2**31),
    setter("identity.targets.samples", 2**40),
    setter("identity.targets.tail_bands", 2**40),
    setter("identity.targets.temperatures", []),
    setter("identity.targets.temperatures", [1.0] * 10),
    setter("identity.targets.logprob_codec", "pickle"),
    setter("identity.targets.profile", "other"),
    setter("identity.targets", None),
    setter("identity", []),
    setter("arrays", []),
    setter("files", []),
    setter("quality", {"rows": "many"}),
    rename_file("../vocabulary.parquet"),
    rename_file("/etc/passwd"),
    rename_file("a/../../b"),
    rename_file("a\\b"),
    rename_file("a//b"),
    rename_file("a\0b"),
]


HOSTILE_BEFORE = [
    setter("shards", []),
    setter("shards", 1),
    setter("shards.0.2", 2**50),
    setter("shards.0.0", 1),
    setter("shards.1.1", 0),
    setter("commits", ["00"]),
    setter("commits", ["0" * 64]),
    setter("commits.0", 7),
]


@pytest.mark.parametrize("edit", HOSTILE_BEFORE, ids=lambda e: e.__name__)
def test_hostile_tables_in_an_older_manifest_are_refused(tmp_path: Path, edit):
    with pytest.raises(CacheDamageError) as caught:
        load_manifest(edited(GOLDEN / "v2", tmp_path / "c", edit))
    assert "manifest.json" in str(caught.value)


def test_a_draft_of_the_third_version_is_told_apart_from_damage(cache: Path, tmp_path: Path):
    with pytest.raises(CacheMismatchError, match="draft"):
        load_manifest(edited(cache, tmp_path / "c", setter("shards", [[0, 1, 1]])))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_an_older_manifest_is_written_as_it_was(version: str):
    assert load_manifest(GOLDEN / version).to_json() == (GOLDEN / version / "manifest.json").read_text()


@pytest.mark.parametrize("edit", HOSTILE, ids=lambda e: e.__name__)
def test_a_hostile_manifest_is_refused(cache: Path, tmp_path: Path, edit):
    with pytest.raises(CacheDamageError) as caught:
        load_manifest(edited(cache, tmp_path / "c", edit))
    assert "manifest.json" in str(caught.value)


def test_the_check_itself_accepts_an_unchanged_manifest(cache: Path, tmp_path: Path):
    assert load_manifest(edited(cache, tmp_path / "c", lambda document: None)) == load_manifest(cache)


def test_arrays_too_large_to_allocate_are_refused_although_everything_agrees(cache: Path, tmp_path: Path):
    manifest = load_manifest(cache)

    def edit(document: dict) -> None:  # 2^24 rows of 65,535 draws: consistent, and 4 TB
        document["layout"] = {"shard_rows": 2**24, "chunk_rows": 64}
        document["identity"]["targets"]["samples"] = 2**16 - 1
        for array in document["arrays"]:
            if array["name"].startswith("sample"):
                array |= {"columns": 2**16 - 1} | ({"dtype": "uint16"} if array["name"] == "sample_counts" else {})

    with pytest.raises(CacheDamageError, match="too large"):
        load_manifest(edited(cache, tmp_path / "c", edit))
    assert manifest.layout.shard_rows == 128


@pytest.mark.parametrize(
    "edit",
    [
        setter("provenance.corpus", "another"),
        setter("quality.mass_kept", 1.0),
        setter("bytes.examples", 1),
        setter("rows", 5),
        lambda document: document.pop("checksum"),
        lambda document: document.pop("quality"),
    ],
)
def test_a_manifest_edited_by_hand_is_damaged(cache: Path, tmp_path: Path, edit):
    with pytest.raises(CacheDamageError):
        load_manifest(edited(cache, tmp_path / "c", edit, sign=False))


def test_every_flipped_byte_of_a_manifest_is_noticed(cache: Path, tmp_path: Path):
    data = (cache / "manifest.json").read_bytes()
    whole = load_manifest(cache)
    for name in TABLES:
        shutil.copy(cache / name, tmp_path / name)
    for place in range(0, len(data), 41):
        damaged = bytearray(data)
        damaged[place] ^= 1
        (tmp_path / "manifest.json").write_bytes(bytes(damaged))
        try:
            assert load_manifest(tmp_path) == whole, place  # white space between tokens carries nothing
        except CacheError:
            continue
        assert data[place : place + 1].isspace(), place


def test_another_format_and_another_version_are_told_apart_from_damage(cache: Path, tmp_path: Path):
    with pytest.raises(CacheError, match="not a cache") as caught:
        load_manifest(edited(cache, tmp_path / "c", setter("format", "other")))
    assert not isinstance(caught.value, CacheDamageError)
    with pytest.raises(CacheMismatchError, match="format version"):
        load_manifest(edited(cache, tmp_path / "c", setter("format_version", 4)))


def test_a_folder_that_is_no_cache_says_how_to_make_one(tmp_path: Path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(CacheError, match="not a cache") as caught:
            load_manifest(folder)
        assert "kd cache build" in str(caught.value)
        assert caught.value.exit_code == 1


def test_a_cache_whose_manifest_was_lost_is_damaged(cache: Path, tmp_path: Path):
    shutil.copytree(cache, tmp_path / "c")
    (tmp_path / "c" / "manifest.json").unlink()
    with pytest.raises(CacheDamageError, match="manifest is missing"):
        load_manifest(tmp_path / "c")


@pytest.mark.parametrize("rows", [(100, 64), (64, 128), (0, 64), (64, 0)])
def test_shards_hold_whole_chunks(rows: tuple[int, int]):
    with pytest.raises(CacheError, match="does not fit the chunk size"):
        Layout(*rows)


@pytest.mark.parametrize(
    ("rows", "shard_rows"), [(1, 32_768), (2**32, 32_768), (2**32 + 1, 65_536), (10**10, 131_072), (2**40, 2**23)]
)
def test_shards_grow_where_there_would_be_too_many(rows: int, shard_rows: int):
    assert Layout.for_rows(rows) == Layout(shard_rows)


def test_a_misspelled_cache_is_named_with_the_one_beside_it(cache: Path, tmp_path: Path) -> None:
    shutil.copytree(cache, tmp_path / "wiki-top64")
    with pytest.raises(CacheError, match="not a cache") as near:
        load_manifest(tmp_path / "wiki-tpo64")
    assert near.value.details["did you mean"] == tmp_path / "wiki-top64"
    with pytest.raises(CacheError, match="not a cache") as far:
        load_manifest(tmp_path / "something-else")
    assert "did you mean" not in far.value.details
