"""`CacheReader`: stream a finished cache in any order, each shard verified on first touch.

The order of an epoch is a function of (seed, epoch) alone: shards are shuffled, taken `window` at a time, and the
examples of a window are shuffled together. Random single examples would cost 2-6 ms each in Zarr; a window of
whole shards costs one read per shard and keeps `window + 1` shards in memory (about 7 MB each at k=64).
Batch size and world size do not enter, so a run may be resumed or re-split without changing the order.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.store import codecs, commits, shard_store
from kd.cache_builder.store.manifest import CacheManifest, load_manifest
from kd.cache_builder.store.part import Part, load_part
from kd.cache_builder.store.targets import SoftTargets
from kd.cache_builder.store.vocabulary import read_vocabulary, tokens_digest
from kd.common.errors import CacheDamageError, CacheError
from kd.common.memory import keep_freed_memory


@dataclass(frozen=True)
class CachedExample:
    """One example with its decoded targets."""

    index: int
    id: str
    prompt: str
    target: str
    context_ids: np.ndarray
    """[C] int32: tokens before the first target token"""
    targets: SoftTargets
    """n rows; row t predicts the token at position C + t"""

    @property
    def input_ids(self) -> np.ndarray:
        """`[C + n]` context and target tokens."""
        return np.concatenate([self.context_ids, self.targets.gold_ids.astype(np.int32)])


class CachedBatch(list[CachedExample]):
    """Examples that were decoded together."""

    def __init__(self, examples: Sequence[CachedExample], rows: SoftTargets) -> None:
        super().__init__(examples)
        self.rows = rows
        """Of all examples, one after another: what `targets` of each are views of."""


class CacheReader:
    """Random access to a complete cache by example number; thread-safe."""

    def __init__(self, root: str | Path, *, top_k: int | None = None, window: int = 16) -> None:
        """A cache in the directory `root`; `kd.cache_builder.opening.open_cache` takes URLs and fingerprints too.

        `top_k` keeps fewer tokens than stored. Raises CacheError for an incomplete cache or an impossible k.
        """
        root = Path(root)
        manifest = load_manifest(root)
        if not manifest.complete:
            done = len(commits.committed(root, len(manifest.shards)))
            raise CacheError(
                "this cache is not complete",
                where=root,
                found=f"{done} of {len(manifest.shards)} shards",
                try_="run its kd cache build command again: it continues",
            )
        for name, entry in manifest.files.items():
            commits.verify_file(root, name, entry)
        self._open(root, manifest, top_k, window)

    def _open(self, root: Path, manifest: CacheManifest, top_k: int | None, window: int) -> None:
        keep_freed_memory()
        self.root, self.manifest, self.config = root, manifest, manifest.targets
        if top_k is not None and not 1 <= top_k <= self.config.top_k:
            raise CacheError(
                "this cache does not hold that many tokens per row",
                found=f"top-k {top_k}",
                expected=f"1..{self.config.top_k}",
            )
        self.top_k = top_k
        self.window = window
        self.part: Part | None = load_part(root, manifest)
        self.shards: Sequence[int] = range(len(manifest.shards)) if self.part is None else self.part.shards
        """Shards that this copy holds: all, but for a part of a cache."""
        self._arrays: Sequence[str] | None = None
        self._dtypes = {"token_ids": np.int32}  # as `codecs.decode` gives them out: copied once
        self._position: dict[tuple[int, ...], int] = {}
        """Of each announced batch."""
        self._loads: list[tuple[int, int]] = []
        """(batch, shard) of every shard that will be loaded, in order."""
        self._asked = -1
        self._starts = np.array([first for first, _, _ in manifest.shards])
        self._shards: OrderedDict[int, shard_store.Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: Mapping[int, threading.Lock] = defaultdict(threading.Lock)

    def __len__(self) -> int:
        return self.manifest.examples

    def keep(self, arrays: Sequence[str]) -> None:
        """Read no other stored arrays than these from now on. Raises CacheError where this copy does not hold them."""
        if self.part is not None:
            self.part.require(arrays, self.root)
        self._arrays = arrays
        with self._lock:
            self._shards.clear()

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """`(tokens [E], rows [E])` of every example: context + target tokens, and target tokens alone; 0 if not here."""
        tokens, rows = np.zeros(len(self), dtype=np.int64), np.zeros(len(self), dtype=np.int64)
        for place, index in enumerate(self.shards):
            if place % self.window == 0:
                commits.ask(self.root, self.shards[place : place + 4 * self.window], ["examples"])
            table = shard_store.read_example_table(
                self.root, self.manifest, index, ["n_tokens", "row_start", "row_end"]
            )
            of_shard = slice(*self.manifest.shards[index][:2])
            tokens[of_shard] = table["n_tokens"]
            rows[of_shard] = np.array(table["row_end"]) - np.array(table["row_start"])
        return tokens, rows

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """`[E]` example numbers in the order of one epoch: a function of (seed, epoch) and the shards that are here."""
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        shards = rng.permutation(np.asarray(self.shards))
        parts = []
        for start in range(0, len(shards), self.window):
            ranges = [np.arange(*self.manifest.shards[s][:2]) for s in shards[start : start + self.window]]
            parts.append(rng.permutation(np.concatenate(ranges)))
        return np.concatenate(parts)

    def shard(self, index: int) -> shard_store.Shard:
        """A verified shard, from memory where it was touched lately."""
        found = self._held(index)
        if found is not None:
            return found
        with self._loading[index]:  # who comes second waits, instead of loading it too
            found = self._held(index)
            if found is not None:
                return found
            if not self._loads:
                commits.ask(self.root, [index], self._names())
            loaded = shard_store.read_shard(self.root, self.manifest, index, names=self._arrays)
            with self._lock:
                self._shards[index] = loaded
                while len(self._shards) > self.window + 1:
                    self._shards.popitem(last=False)
        return loaded

    def _held(self, index: int) -> shard_store.Shard | None:
        with self._lock:
            if index in self._shards:
                self._shards.move_to_end(index)
            return self._shards.get(index)

    def announce(self, batches: Sequence[Sequence[int]]) -> None:
        """Say in which order `read` will be asked for examples: a mirror then fetches shards before they are needed."""
        if self.root not in commits.ORIGINS:
            return
        memory: OrderedDict[int, None] = OrderedDict()  # which shards `shard` will hold, and when it loads another
        for number, batch in enumerate(batches):
            self._position[tuple(batch)] = number
            for index in np.unique(np.searchsorted(self._starts, batch, side="right") - 1).tolist():
                if index not in memory:
                    self._loads.append((number, index))
                memory[index] = None
                memory.move_to_end(index)
                if len(memory) > self.window + 1:
                    memory.popitem(last=False)
        self._ask(-1)

    def _ask(self, batch: int) -> None:
        after = bisect_right(self._loads, (batch, -1))
        if after == self._asked:
            return
        self._asked = after
        coming = dict.fromkeys(index for _, index in self._loads[after : after + 2 * self.window])
        commits.ask(self.root, list(coming), self._names())

    def _names(self) -> list[str] | None:
        return None if self._arrays is None else [*self._arrays, "examples"]

    def locate(self, example: int) -> tuple[shard_store.Shard, int]:
        """The shard that holds an example, and its number in that shard."""
        if not 0 <= example < len(self):
            raise IndexError(example)
        index = int(np.searchsorted(self._starts, example, side="right")) - 1
        shard = self.shard(index)
        return shard, example - shard.first_example

    def __getitem__(self, example: int) -> CachedExample:
        return self.read([example])[0]

    def read(self, examples: Sequence[int]) -> list[CachedExample]:
        """Decode several examples at once: a `CachedBatch`, or nothing for nothing.

        Raises CacheDamageError where rows and tokens do not belong together.
        """
        if not len(examples):
            return []
        located, decoded = self._decode(examples)
        result = []
        start = 0
        for number, (shard, i) in zip(examples, located, strict=True):
            table = shard.examples
            stop = start + table["row_end"][i] - table["row_start"][i]
            result.append(
                CachedExample(
                    int(number),
                    table["id"][i],
                    table["prompt"][i],
                    table["target"][i],
                    table["context_ids"][i],
                    take_rows(decoded, slice(start, stop)),
                )
            )
            start = stop
        return CachedBatch(result, decoded)

    def read_rows(self, examples: Sequence[int]) -> SoftTargets:
        """The rows of several examples, one after another, without their texts."""
        return self._decode(examples)[1]

    def _decode(self, examples: Sequence[int]) -> tuple[list[tuple[shard_store.Shard, int]], SoftTargets]:
        batch = self._position.get(tuple(int(e) for e in examples)) if self._position else None
        if batch is not None:
            self._ask(batch)
        located = [self.locate(int(e)) for e in examples]
        spans = [(s, slice(s.examples["row_start"][i], s.examples["row_end"][i])) for s, i in located]
        stored = {
            name: np.concatenate([s.arrays[name][rows] for s, rows in spans], dtype=self._dtypes.get(name))
            for name in located[0][0].arrays
        }
        decoded = codecs.decode(stored, self.config, self.top_k)
        self._refuse_broken(decoded)
        start = 0
        for (shard, i), (_, rows) in zip(located, spans, strict=True):
            table, stop = shard.examples, start + rows.stop - rows.start
            if tokens_digest(table["context_ids"][i], decoded.gold_ids[start:stop]) != table["tokens_digest"][i]:
                raise CacheDamageError(
                    "cached rows do not belong to their tokens",
                    where=self.root,
                    shard=shard.index,
                    example=table["id"][i],
                    rows=f"{rows.start}:{rows.stop}",
                )
            start = stop
        return located, decoded

    def _refuse_broken(self, targets: SoftTargets) -> None:
        """Raise CacheDamageError for what no teacher gives, and no loss survives: cheap enough for every batch."""
        broken = not (np.isfinite(targets.log_z).all() and np.isfinite(targets.gold_logprob).all())
        for values in (targets.tail_bands, targets.boundary_logprob, targets.logprobs):
            if values is not None and values.size:
                broken |= not values.max() < np.inf  # of values with NaN the largest is NaN
        if broken:
            raise CacheDamageError("cached targets are not finite", where=self.root, try_="kd cache verify")
        size = self.manifest.vocabulary_size
        for ids in (targets.token_ids, targets.sample_ids) if self.manifest.format_version == 1 else ():
            # later versions: no code stands for such an id
            if ids is not None and ids.size and not 0 <= ids.min() <= ids.max() < size:
                raise CacheDamageError("a cached id is beyond the vocabulary", where=self.root, try_="kd cache verify")

    def vocabulary(self) -> list[bytes]:
        """The bytes every teacher id stands for."""
        return read_vocabulary(self.root, self.manifest)


def take_rows(targets: SoftTargets, rows: slice) -> SoftTargets:
    """A range of rows of every array."""
    taken: dict[str, Any] = {n: v[rows] if isinstance(v, np.ndarray) else v for n, v in vars(targets).items()}
    return SoftTargets(**taken)


def concatenate(parts: Sequence[SoftTargets]) -> SoftTargets:
    """Rows of several examples of one cache, one after another."""
    joined: dict[str, Any] = {}
    for f in fields(parts[0]):
        if isinstance(getattr(parts[0], f.name), np.ndarray):
            joined[f.name] = np.concatenate([getattr(p, f.name) for p in parts])
    return replace(parts[0], **joined)


def quality_means(manifest: CacheManifest) -> Mapping[str, float]:
    """Per-row means of the quality sums."""
    rows = manifest.quality.get("rows", 0.0)
    return {name: value / rows for name, value in manifest.quality.items() if name != "rows" and rows}
