"""Several caches read as one, each with a share of the examples: two teachers side by side, or two texts.

    MixedReader([(CacheReader(a), 0.7), (CacheReader(b), 0.3)])

An epoch has as many examples as all caches together. The cache of each example is drawn with the weights, from (seed, epoch).
Each cache goes through its own shuffled epochs, one after another (`mixed_order`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.store.cache_files import bytes_below
from kd.cache_builder.store.readers.decoding import Decoder
from kd.cache_builder.store.readers.description import Facts, facts, html_table, one_line
from kd.cache_builder.store.readers.epoch_order import EpochOrder
from kd.cache_builder.store.readers.mixed_order import mixed_order
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.readers.reading import CachedExample
from kd.cache_builder.store.records.cache_identity import identity_difference, without_text_rules
from kd.cache_builder.store.records.commit_table import CommitTable
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.cache_builder.store.records.part import Part
from kd.cache_builder.store.records.shard_table import ShardTable
from kd.cache_builder.store.shard_store import Shard
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.common.errors import CacheError, CacheMismatchError


class MixedReader:
    """A `Reader` of several caches: examples are numbered one cache after another, weights say how often each is drawn."""

    def __init__(self, parts: Sequence[tuple[CacheReader, float]], *, top_k: int | None = None) -> None:
        """Raises CacheMismatchError unless tokenizer, blocks and settings are equal; teacher and text may differ."""
        self.parts = [reader for reader, _ in parts]
        self.weights = np.array([weight for _, weight in parts], dtype=np.float64)
        self.weights /= self.weights.sum()
        refuse_unlike(self.parts, ("tokenizer", "blocks", "targets"), "these caches cannot be mixed")
        sizes = {r.manifest.vocabulary_size for r in self.parts}
        if len(sizes) > 1:
            raise CacheError("these caches cannot be mixed", found=f"teachers with {sorted(sizes)} ids")
        self._first_examples = np.cumsum([0, *(len(r) for r in self.parts)])
        """`[parts + 1]` number of the first example of each cache, and one past the last."""
        self._numbers = [(part, i) for part, r in enumerate(self.parts) for i in range(len(r.manifest.shards))]
        """Shard of the mixture -> its cache, and its number in that."""
        self.root = Path(", ".join(str(r.root) for r in self.parts))
        self.manifest = _joined_manifest(self.parts, self.weights)
        self.config, self.top_k = self.manifest.targets, top_k
        self.part: Part | None = None
        self.shards: Sequence[int] = [n for n, (part, i) in enumerate(self._numbers) if i in self.parts[part].shards]
        self._decoder = Decoder(self.root, self.manifest, top_k)

    def __len__(self) -> int:
        return self.manifest.examples

    def __getitem__(self, example: int) -> CachedExample:
        return self.read([example])[0]

    def __repr__(self) -> str:
        return one_line("MixedReader", self._title(), self._facts())

    def _repr_html_(self) -> str:
        return html_table(self._title(), self._facts())

    def _title(self) -> str:
        return ", ".join(f"{r.root}={weight:.3g}" for r, weight in zip(self.parts, self.weights, strict=True))

    def _facts(self) -> Facts:
        return facts(self.manifest, sum(bytes_below(r.root) for r in self.parts), self.top_k)

    def keep(self, arrays: Sequence[str]) -> None:
        """As `Reader.keep`."""
        for reader in self.parts:
            reader.keep(arrays)

    def announce(self, batches: Iterable[Sequence[int]]) -> None:
        """Nothing: caches of a mixture fetch files from URLs when they are touched."""

    def lengths(self, first: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `Reader.lengths`."""
        stop = len(self) if stop is None else stop
        if not 0 <= first < stop <= len(self):
            raise IndexError(f"examples {first}:{stop} of a cache of {len(self)}")
        pairs = []
        for reader, start in zip(self.parts, self._first_examples.tolist(), strict=False):
            begin, end = max(first - start, 0), min(stop - start, len(reader))
            if begin < end:
                pairs.append(reader.lengths(begin, end))
        tokens, rows = zip(*pairs, strict=True)
        return np.concatenate(tokens), np.concatenate(rows)

    def shard(self, index: int) -> Shard:
        """As `Reader.shard`, from the cache it lies in."""
        part, number = self._numbers[index]
        shard = self.parts[part].shard(number)
        return replace(shard, index=index, first_example=shard.first_example + int(self._first_examples[part]))

    def locate(self, example: int) -> tuple[Shard, int]:
        """As `Reader.locate`."""
        if not 0 <= example < len(self):
            raise IndexError(f"example {example} of a cache of {len(self)}")
        shard = self.shard(int(self.manifest.shards.shard_of(example)))
        return shard, example - shard.first_example

    def example_table(self, shard: int, columns: Sequence[str]) -> dict[str, list[Any]]:
        """As `Reader.example_table`, from the cache the shard lies in."""
        part, number = self._numbers[shard]
        return self.parts[part].example_table(number, columns)

    def read(self, examples: Sequence[int]) -> list[CachedExample]:
        """As `Reader.read`."""
        return self._decoder.examples(examples, self._located(examples)) if len(examples) else []

    def read_rows(self, examples: Sequence[int]) -> SoftTargets:
        """As `Reader.read_rows`."""
        return self._decoder.rows(self._located(examples))

    def _located(self, examples: Sequence[int]) -> list[tuple[Shard, int]]:
        return [self.locate(int(e)) for e in examples]

    def epoch_order(self, seed: int, epoch: int) -> EpochOrder:
        """As `Reader.epoch_order`: a function of (seed, epoch), the caches and their weights."""
        return mixed_order(
            seed,
            epoch,
            self.weights,
            self._first_examples,
            lambda part, part_epoch: self.parts[part].epoch_order(seed, part_epoch),
        )

    def vocabulary(self) -> list[bytes]:
        """As `Reader.vocabulary`: the same in all caches."""
        return self.parts[0].vocabulary()


def _joined_manifest(readers: Sequence[CacheReader], weights: np.ndarray) -> CacheManifest:
    """The manifest of a mixture: the shards of all caches; its fingerprint covers theirs and the weights."""
    first, shards = readers[0].manifest, ShardTable.joined([r.manifest.shards for r in readers])
    mixture = [[r.manifest.fingerprint, float(w)] for r, w in zip(readers, weights, strict=True)]
    teachers = dict.fromkeys(str(r.manifest.provenance.get("teacher")) for r in readers)
    return replace(
        first,
        identity=first.identity | {"mixture": mixture},
        examples=shards.example_count,
        rows=sum(r.manifest.rows for r in readers),
        shards=shards,
        commits=CommitTable.joined([r.manifest.commits for r in readers]),
        provenance=first.provenance | {"teacher": ", ".join(teachers)},
    )


def refuse_unlike(readers: Sequence[CacheReader], names: Sequence[str], headline: str) -> None:
    """Raise CacheMismatchError unless these entries of the caches' identities, and the kind of text, are equal.

    The rules by which texts became ids may differ: each row is of its own ids.
    """

    def compared(reader: CacheReader) -> dict[str, Any]:
        identity = without_text_rules(reader.manifest.identity)
        shared = {"corpus": {"kind": identity["corpus"]["kind"]}, "chat": identity.get("chat")}
        shared["unknown"] = {"tail": reader.manifest.tail_unknown, "gold": reader.manifest.gold_in_top_k}
        return {name: identity[name] for name in names} | shared

    for other in readers[1:]:
        differences = identity_difference(compared(readers[0]), compared(other))
        if differences:
            raise CacheMismatchError(
                headline,
                first=readers[0].root,
                other=other.root,
                **{f"differs {key}": f"{a} and {b}" for key, a, b in differences},
                try_="caches of one teacher, tokenizer and settings (kd cache info)",
            )
