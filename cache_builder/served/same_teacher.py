"""Before a build through a server continues: does the server still run the teacher of the shards that are there?

A server's weights cannot be digested, and its name and version stay when somebody starts it with other weights. So an example
of a committed shard is scored again, and its tokens' log-probabilities are compared with the stored ones. This notices another
model. It does not notice weights that differ by less than what batches and 16-bit numbers change.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kd.cache_builder.served.served_pass import ServedPass
from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.cache_builder.store.shard_store import read_shard
from kd.common.errors import CacheMismatchError
from kd.data.tokenizing.token_rows import TokenRows

APART = 0.25
"""Median nats between two models. A model in bfloat16, batched otherwise, differs from itself by hundredths."""


def refuse_other_teacher(root: Path, manifest: CacheManifest, shard: int, row: TokenRows, served: ServedPass) -> None:
    """Raise CacheMismatchError unless the server predicts what the committed `shard` holds of `row`, its first example."""
    stored = read_shard(LocalFiles(root), manifest, shard, ["gold_ids", "gold_logprob"]).arrays
    *_, (_, again) = served.shard([row], 0)
    assert again is not None
    kept = stored["gold_logprob"][: len(row.target_ids)].astype(np.float64)
    apart = float(np.median(np.abs(kept - again.gold_logprob)))
    if apart > APART:
        raise CacheMismatchError(
            "the server runs another teacher than when this build began",
            cache=root,
            where=f"example {row.example.id}, shard {shard}",
            found=f"log-probabilities that are {apart:.2g} nats apart (median)",
            expected=f"at most {APART:g}",
            try_="the server with the weights of before; or another --out, and a --teacher-id that names these weights",
        )
