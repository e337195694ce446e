"""Several caches read as one, each with a share of the examples: two teachers side by side, or two texts.

    MixedReader([(CacheReader(a), 0.7), (CacheReader(b), 0.3)])

An epoch has as many examples as all caches together. Which cache comes next is drawn with the weights, from (seed, epoch); each
cache goes through its own shuffled epochs, one after another, so none of its examples comes twice before all came once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.store.manifest import identity_difference
from kd.cache_builder.store.reader import CacheReader
from kd.cache_builder.store.shard_store import Shard
from kd.common.errors import CacheError, CacheMismatchError


class MixedReader(CacheReader):
    """Examples of all caches, numbered one cache after another; weights say how often each is drawn."""

    def __init__(self, parts: Sequence[tuple[CacheReader, float]], *, top_k: int | None = None) -> None:
        """Raises CacheMismatchError unless tokenizer, blocks and settings are equal; teacher and text may differ."""
        self.parts = [reader for reader, _ in parts]
        self.weights = np.array([weight for _, weight in parts])
        self.weights /= self.weights.sum()
        refuse_unlike(self.parts, ("tokenizer", "blocks", "targets"), "these caches cannot be mixed")
        sizes = {r.manifest.vocabulary_size for r in self.parts}
        if len(sizes) > 1:
            raise CacheError("these caches cannot be mixed", found=f"teachers with {sorted(sizes)} ids")
        first = self.parts[0].manifest
        self._examples = np.cumsum([0, *(len(r) for r in self.parts)])
        self._numbers = [(part, i) for part, r in enumerate(self.parts) for i in range(len(r.manifest.shards))]
        shards = [
            (a + int(offset), b + int(offset), rows)
            for offset, r in zip(self._examples, self.parts, strict=False)
            for a, b, rows in r.manifest.shards
        ]
        mixture = [[r.manifest.fingerprint, float(w)] for r, w in zip(self.parts, self.weights, strict=True)]
        names = [str(r.manifest.provenance.get("teacher")) for r in self.parts]
        self._open(
            Path(", ".join(str(r.root) for r in self.parts)),
            replace(
                first,
                identity=first.identity | {"mixture": mixture},
                examples=int(self._examples[-1]),
                rows=sum(r.manifest.rows for r in self.parts),
                shards=tuple(shards),
                commits=tuple(c for r in self.parts for c in r.manifest.commits),
                provenance=first.provenance | {"teacher": ", ".join(dict.fromkeys(names))},
            ),
            top_k,
            self.parts[0].window,
        )

    def keep(self, arrays: Sequence[str]) -> None:
        """Read no other stored arrays than these from now on."""
        for reader in self.parts:
            reader.keep(arrays)

    def announce(self, batches: Sequence[Sequence[int]]) -> None:
        """Nothing: caches of a mixture fetch from URLs as they are touched."""

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """`(tokens [E], rows [E])` of every example, one cache after another."""
        tokens, rows = zip(*(r.lengths() for r in self.parts), strict=True)
        return np.concatenate(tokens), np.concatenate(rows)

    def shard(self, index: int) -> Shard:
        """A verified shard of the cache it lies in."""
        part, number = self._numbers[index]
        shard = self.parts[part].shard(number)
        return replace(shard, index=index, first_example=shard.first_example + int(self._examples[part]))

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """`[E]` example numbers of one epoch: a function of (seed, epoch), the caches and their weights."""
        taken = sum((self._counts(seed, e) for e in range(epoch)), np.zeros(len(self.parts), dtype=np.int64))
        drawn = self._drawn(seed, epoch)
        order = np.empty(len(drawn), dtype=np.int64)
        for part, reader in enumerate(self.parts):
            places = np.flatnonzero(drawn == part)
            size, start = len(reader), int(taken[part])
            orders = [reader.epoch_order(seed, e) for e in range(start // size, -(-(start + len(places)) // size))]
            stream = np.concatenate([*orders, np.empty(0, dtype=np.int64)])
            first = start % size
            order[places] = stream[first : first + len(places)] + self._examples[part]
        return order

    def _drawn(self, seed: int, epoch: int) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch + 2**32]))
        return rng.choice(len(self.parts), size=len(self), p=self.weights / self.weights.sum())

    def _counts(self, seed: int, epoch: int) -> np.ndarray:
        return np.bincount(self._drawn(seed, epoch), minlength=len(self.parts))

    def vocabulary(self) -> list[bytes]:
        """The bytes every teacher id stands for: the same in all caches."""
        return self.parts[0].vocabulary()


def refuse_unlike(readers: Sequence[CacheReader], parts: Sequence[str], headline: str) -> None:
    """Raise CacheMismatchError unless these parts of the caches' identities, and the kind of text, are equal."""

    def compared(reader: CacheReader) -> dict[str, Any]:
        identity = reader.manifest.identity
        return {name: identity[name] for name in parts} | {"corpus": {"kind": identity["corpus"]["kind"]}}

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
