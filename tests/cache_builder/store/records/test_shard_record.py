"""A commit that was changed, or never was one, is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from kd.cache_builder.store.records.shard_record import parse_shard_record
from kd.common.errors import CacheDamageError
from kd.common.files import digest_of


@pytest.mark.parametrize(
    "edit",
    [
        lambda document: document.update(rows=2**60),
        lambda document: document.update(index=-1),
        lambda document: document.update(examples=[0]),
        lambda document: document.update(files={"../x": {"bytes": 1, "sha256": ""}}),
        lambda document: document.update(quality=None),
        lambda document: document.pop("fingerprint"),
    ],
)
def test_a_hostile_commit_is_refused(cache: Path, edit):
    document = json.loads((cache / "commits" / "00000.json").read_text())
    parse_shard_record(copy.deepcopy(document), cache)
    edit(document)
    with pytest.raises(CacheDamageError, match="a commit was changed"):
        parse_shard_record(document, cache)
    document["checksum"] = digest_of({k: v for k, v in document.items() if k != "checksum"})
    with pytest.raises(CacheDamageError, match=r"commit cannot be read|a commit was changed"):
        parse_shard_record(document, cache)
