"""Decode rows of shards to targets, and check them: shared by all readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd.cache_builder.store.encoding import codecs
from kd.cache_builder.store.example_table import gaps_at
from kd.cache_builder.store.readers.reading import CachedBatch, CachedExample
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.cache_builder.store.shard_store import Shard
from kd.cache_builder.store.soft_targets import SoftTargets, take_rows
from kd.cache_builder.store.vocabulary import tokens_digest
from kd.common.errors import CacheDamageError

DTYPES = {"token_ids": np.int32}
"""Arrays that are converted while they are joined, to the dtype `codecs.decode` hands out: copied once."""

Located = Sequence[tuple[Shard, int]]
"""Shard and number in the shard of each wanted example."""


@dataclass(frozen=True)
class Decoder:
    """Decodes rows of one cache, or of caches with equal settings."""

    root: Path
    """Named in errors."""
    manifest: CacheManifest
    top_k: int | None
    """Tokens per row to hand out; None means all that are stored."""

    def examples(self, numbers: Sequence[int], located: Located) -> CachedBatch:
        """The examples with these numbers. Raises CacheDamageError."""
        rows = self.rows(located)
        examples, start = [], 0
        for number, (shard, i) in zip(numbers, located, strict=True):
            table = shard.examples
            stop = start + table["row_end"][i] - table["row_start"][i]
            examples.append(
                CachedExample(
                    int(number),
                    table["id"][i],
                    table["prompt"][i],
                    table["target"][i],
                    table["context_ids"][i],
                    take_rows(rows, slice(start, stop)),
                    gaps_at(table, i),
                    not self.manifest.gold_in_top_k,
                )
            )
            start = stop
        return CachedBatch(examples, rows)

    def rows(self, located: Located) -> SoftTargets:
        """The rows of the examples, one after another. Raises CacheDamageError."""
        spans = [(s, slice(s.examples["row_start"][i], s.examples["row_end"][i])) for s, i in located]
        stored = {
            name: np.concatenate([s.part(name, rows) for s, rows in spans], dtype=DTYPES.get(name))
            for name in located[0][0].arrays
        }
        decoded = codecs.decode(stored, self.manifest.targets, self.top_k)
        self._refuse_broken(decoded)
        start = 0
        for (shard, i), (_, rows) in zip(located, spans, strict=True):
            table, stop = shard.examples, start + rows.stop - rows.start
            tokens = tokens_digest(table["context_ids"][i], decoded.gold_ids[start:stop], gaps_at(table, i))
            if tokens != table["tokens_digest"][i]:
                raise CacheDamageError(
                    "cached rows do not belong to their tokens",
                    where=self.root,
                    shard=shard.index,
                    example=table["id"][i],
                    rows=f"{rows.start}:{rows.stop}",
                )
            start = stop
        return decoded

    def _refuse_broken(self, targets: SoftTargets) -> None:
        """Raise CacheDamageError for values that no teacher gives and no loss survives: cheap enough for every batch."""
        broken = not (np.isfinite(targets.log_z).all() and np.isfinite(targets.gold_logprob).all())
        for values in (targets.tail_bands, targets.boundary_logprob, targets.logprobs):
            if values is not None and values.size:
                broken |= not values.max() < np.inf  # the maximum of values with a NaN is NaN
        if broken:
            raise CacheDamageError("cached targets are not finite", where=self.root, try_="kd cache verify")
        size = self.manifest.vocabulary_size
        # from format version 2 on, no stored code can stand for an id beyond the vocabulary
        for ids in (targets.token_ids, targets.sample_ids) if self.manifest.format_version == 1 else ():
            if ids is not None and ids.size and not 0 <= ids.min() <= ids.max() < size:
                raise CacheDamageError("a cached id is beyond the vocabulary", where=self.root, try_="kd cache verify")
