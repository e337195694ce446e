"""Shards of another cache that a build can copy: of the same text built elsewhere, or of its beginning.

A shard is copied where this build would make the same shard: the same examples by number, and the same tokens of every
example by digest. Batches are made inside a shard, so its bytes are those the teacher would give on the machine it was
built on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.store.encoding.arrays import Arrays
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.cache_identity import refuse_mismatch, without_text_rules
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.cache_builder.store.vocabulary import tokens_digest
from kd.cache_builder.upkeep.cache_registry import located
from kd.common.errors import CacheDamageError
from kd.data.tokenizing.token_rows import TokenRows


class Earlier:
    """A finished cache, of whose shards a build of `manifest` copies those it would make itself."""

    def __init__(self, path: Path, manifest: CacheManifest) -> None:
        """Raises CacheMismatchError, with the difference, where anything but the text differs.

        Whether the rules of tokenising are named depends on the text too; `shard` compares the tokens themselves.
        """
        self.reader = CacheReader(located(path))
        theirs = self.reader.manifest
        digest = manifest.identity["corpus"]["text_digest"]
        identity = without_text_rules(theirs.identity)
        identity |= {"corpus": theirs.identity["corpus"] | {"text_digest": digest}}
        refuse_mismatch(path, without_text_rules(manifest.identity), replace(theirs, identity=identity))
        self.manifest = manifest

    def shard(self, index: int, rows: Sequence[TokenRows]) -> tuple[Arrays, dict[str, float]] | None:
        """Stored arrays and quality sums of shard `index`, which is to hold `rows`; None where the other cache's differs."""
        theirs = self.reader.manifest
        if (
            theirs.layout != self.manifest.layout
            or theirs.shards[index : index + 1] != self.manifest.shards[index : index + 1]
        ):
            return None
        try:
            shard = self.reader.shard(index)
        except CacheDamageError:  # the teacher scores it again
            return None
        digests: list[Any] = shard.examples["tokens_digest"]
        wanted = [tokens_digest(r.context_ids, r.target_ids, r.gaps) for r in rows]
        ends = np.concatenate([r.byte_end for r in rows])
        if digests != wanted or not np.array_equal(shard.arrays["byte_end"], ends):
            return None
        return shard.arrays, commits.read_commit(self.reader.root, theirs, index).quality
