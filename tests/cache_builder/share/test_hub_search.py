"""Caches on the hub are found by the tags of their cards: teacher and tokenizer, pushed as a user pushes them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
from hostile import change_manifest
from servers import HubServer
from terminal import kd

from kd.cache_builder.share.hub_search import FoundCache, search_caches
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheError
from kd.common.progress import final

pytestmark = pytest.mark.usefixtures("hasty")


def named(teacher: str, document: dict) -> None:
    document["provenance"]["teacher"] = teacher


@pytest.fixture
def shared_caches(small: Path, hub: HubServer, tmp_path: Path) -> HubServer:
    """Two caches of other teachers, with what the command draws, and a data set that is none."""
    for name in ("one", "two"):
        shutil.copytree(small, tmp_path / name)
        change_manifest(tmp_path / name, partial(named, f"Big/Teacher-{name}"))
        kd("cache", "push", tmp_path / name, f"hf://datasets/us/{name}")
    kd("cache", "push", small, "hf://datasets/us/other")
    other = hub.repositories["us/other"]
    other.commits["f" * 40] = {"README.md": (b"---\nlicense: mit\ntags: [text]\n---\n", False)}
    other.branches["main"] = "f" * 40
    return hub


def test_caches_are_found_by_teacher_and_tokenizer(shared_caches: HubServer, small: Path, tokenizer_dir: Path) -> None:
    words = load_manifest(small).identity["tokenizer"]["fingerprint"]
    one, two = (FoundCache(f"hf://datasets/us/{n}", f"Big/Teacher-{n}", words[:16], 7) for n in ("one", "two"))
    assert search_caches() == [one, two]
    assert search_caches(limit=1) == [one]
    assert search_caches(teacher="teacher-TWO") == [two]
    assert search_caches(tokenizer=words) == search_caches(tokenizer=words[:5]) == [one, two]
    assert search_caches(tokenizer="f" * 8) == search_caches(teacher="nobody") == []
    said = json.loads(kd("cache", "search", "hf", "--tokenizer", tokenizer_dir, "--teacher", "one", "--json"))
    assert said == {"caches": [vars(one)]}
    assert "hf://datasets/us/two: Big/Teacher-two" in kd("cache", "search", "hf")
    assert "no cache" in kd("cache", "search", "hf", "--teacher", "nobody")


def test_the_card_shows_a_picture_and_the_commands(shared_caches: HubServer, tmp_path: Path) -> None:
    files = shared_caches.repositories["us/one"].files("main")
    assert files is not None
    card, picture = files["README.md"][0].decode(), files["entropy.png"][0]
    assert picture.startswith(b"\x89PNG")
    assert "](entropy.png)" in card
    for command in (
        "kd cache show hf://datasets/us/one",
        "kd train --cache hf://datasets/us/one",
        "kd cache pull hf://",
    ):
        assert command in card
    for name in ("README.md", "entropy.png"):  # a clone of the repository is a sound cache
        (tmp_path / "one" / name).write_bytes(files[name][0])
    assert final(verify(tmp_path / "one")) == ()


def test_a_hub_that_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CacheError, match="offline mode"):
        search_caches()
