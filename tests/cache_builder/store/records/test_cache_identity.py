"""A mismatch names everything that differs, and nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from kd.cache_builder.store.records.cache_identity import identity_difference, refuse_mismatch
from kd.cache_builder.store.records.manifest import load_manifest
from kd.common.errors import CacheMismatchError


def test_a_difference_names_each_key_with_both_sides():
    a = {"blocks": {"seq_len": 32, "bos": True}, "corpus": {"digest": "x"}}
    b = {"blocks": {"seq_len": 64, "bos": True}, "tokenizer": {"entries": 3}}
    assert identity_difference(a, b) == [
        ("blocks.seq_len", 32, 64),
        ("corpus.digest", "x", None),
        ("tokenizer.entries", None, 3),
    ]
    assert identity_difference(a, copy.deepcopy(a)) == []


def test_a_mismatch_prints_the_keys_as_the_manifest_spells_them(cache: Path):
    manifest = load_manifest(cache)
    refuse_mismatch(cache, manifest.identity, manifest)
    wanted = copy.deepcopy(manifest.identity)
    wanted["blocks"]["seq_len"] = 99
    wanted["corpus"]["text_digest"] = "0" * 64
    with pytest.raises(CacheMismatchError) as caught:
        refuse_mismatch(cache, wanted, manifest)
    message = str(caught.value)
    assert "differs blocks.seq_len" in message
    assert "asked for 99, the cache has 32" in message
    assert "differs corpus.text_digest" in message
    assert "teacher" not in message
