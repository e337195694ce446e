"""What another cache holds already need not be computed again: the same text built elsewhere, or more text after it.

A shard is taken over when it is the very shard this build would make: the same examples by number, and every example's
tokens by digest. Batches are made inside a shard, so its bytes are those the teacher would have given on that machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.store import commits
from kd.cache_builder.store.cache_identity import refuse_mismatch
from kd.cache_builder.store.encoding.arrays import Arrays
from kd.cache_builder.store.manifest import CacheManifest
from kd.cache_builder.store.reader import CacheReader
from kd.cache_builder.store.vocabulary import tokens_digest
from kd.cache_builder.upkeep.cache_registry import located
from kd.common.errors import CacheDamageError
from kd.data.blocks import TokenRows


class Earlier:
    """The shards of another cache that a build of `manifest` would make as well."""

    def __init__(self, path: Path, manifest: CacheManifest) -> None:
        """Raises CacheMismatchError, with the difference, where anything but the text differs."""
        self.reader = CacheReader(located(path))
        theirs = self.reader.manifest
        digest = manifest.identity["corpus"]["text_digest"]
        corpus = theirs.identity["corpus"] | {"text_digest": digest}
        refuse_mismatch(path, manifest.identity, replace(theirs, identity=theirs.identity | {"corpus": corpus}))
        self.manifest = manifest

    def shard(self, index: int, rows: Sequence[TokenRows]) -> tuple[Arrays, dict[str, float]] | None:
        """Stored arrays and quality sums of shard `index`, which holds `rows`; None where the other cache has another."""
        theirs = self.reader.manifest
        if (
            theirs.layout != self.manifest.layout
            or theirs.shards[index : index + 1] != self.manifest.shards[index : index + 1]
        ):
            return None
        try:
            shard = self.reader.shard(index)
        except CacheDamageError:  # then it is made again
            return None
        digests: list[Any] = shard.examples["tokens_digest"]
        wanted = [tokens_digest(r.context_ids, r.target_ids) for r in rows]
        ends = np.concatenate([r.byte_end for r in rows])
        if digests != wanted or not np.array_equal(shard.arrays["byte_end"], ends):
            return None
        return shard.arrays, commits.read_commit(self.reader.root, theirs, index).quality
