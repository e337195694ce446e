"""`CacheReader`: read a finished cache in any order; every shard is verified when it is first touched.

The order of an epoch (`epoch_order`) is a function of (seed, epoch) alone: examples of `window` shards at a time are mixed. Random
single examples would cost 2-6 ms each in Zarr; whole shards cost one read each, and `window + 1` of them are kept in memory (about
7 MB each at k=64). Batch size and world size do not enter, so a run may be resumed or re-split without changing the order.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from kd.cache_builder.store import shard_store
from kd.cache_builder.store.cache_files import CacheFiles, bytes_below, files_at, recorded_bytes
from kd.cache_builder.store.lengths import LengthPages
from kd.cache_builder.store.readers.announced import Announced
from kd.cache_builder.store.readers.decoding import Decoder
from kd.cache_builder.store.readers.description import Facts, facts, html_table, one_line
from kd.cache_builder.store.readers.epoch_order import EpochOrder, epoch_order
from kd.cache_builder.store.readers.reading import CachedExample
from kd.cache_builder.store.records.manifest import CacheManifest, load_manifest
from kd.cache_builder.store.records.manifest_checks import length_pages
from kd.cache_builder.store.records.part import Part, load_part
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.cache_builder.store.vocabulary import read_vocabulary
from kd.common.errors import CacheError
from kd.common.memory import keep_freed_memory


class CacheReader:
    """A `Reader` of one complete cache."""

    def __init__(
        self, cache: str | os.PathLike[str] | CacheFiles, *, top_k: int | None = None, window: int = 16
    ) -> None:
        """Open the cache in a folder, or the cache that `CacheFiles` hold.

        `kd.cache_builder.opening.open_cache` takes URLs and fingerprints too.

        top_k    tokens per row to hand out; None means all that are stored
        window   shards that are read at a time, whose examples are mixed and that are kept in memory

        Raises CacheError for an incomplete cache or an impossible `top_k`, CacheDamageError for damaged metadata.
        """
        self.files = files_at(cache)
        self.root = self.files.root
        self.manifest = load_manifest(self.root)
        if not self.manifest.complete:
            total = len(self.manifest.shards)
            raise CacheError(
                "this cache is not complete",
                where=self.root,
                found=f"{len(self.files.committed(total))} of {total} shards",
                try_="run its kd cache build command again: it continues",
            )
        pages = set(length_pages(len(self)))  # these are large, and compared when they are read
        for name, entry in self.manifest.files.items():
            if name not in pages:
                self.files.verify_file(name, entry)
        self.config = self.manifest.targets
        if top_k is not None and not 1 <= top_k <= self.config.top_k:
            raise CacheError(
                "this cache does not hold that many tokens per row",
                found=f"top-k {top_k}",
                expected=f"1..{self.config.top_k}",
            )
        keep_freed_memory()
        self.top_k, self.window = top_k, window
        self.part: Part | None = load_part(self.root, self.manifest)
        self.shards: Sequence[int] = range(len(self.manifest.shards)) if self.part is None else self.part.shards
        self._length_pages = LengthPages(self.files, self.manifest)
        self._decoder = Decoder(self.root, self.manifest, top_k)
        self._arrays: Sequence[str] | None = None
        self._announced: Announced | None = None
        self._shards: OrderedDict[int, shard_store.Shard] = OrderedDict()
        self._lock = threading.Lock()
        self._loading: Mapping[int, threading.Lock] = defaultdict(threading.Lock)

    def __len__(self) -> int:
        return self.manifest.examples

    def __getitem__(self, example: int) -> CachedExample:
        return self.read([example])[0]

    def __repr__(self) -> str:
        return one_line("CacheReader", str(self.root), self._facts())

    def _repr_html_(self) -> str:
        return html_table(str(self.root), self._facts())

    def _facts(self) -> Facts:
        size = recorded_bytes(self.manifest, self.part) if self.files.on_disk else None
        return facts(self.manifest, bytes_below(self.root) if size is None else size, self.top_k)

    def keep(self, arrays: Sequence[str]) -> None:
        """As `Reader.keep`."""
        if self.part is not None:
            self.part.require(arrays, self.root)
        self._arrays = arrays
        with self._lock:
            self._shards.clear()

    def lengths(self, first: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As `Reader.lengths`."""
        stop = len(self) if stop is None else stop
        if not 0 <= first < stop <= len(self):
            raise IndexError(f"examples {first}:{stop} of a cache of {len(self)}")
        if self.manifest.format_version > 2:
            return self._those_here(first, *self._length_pages.read(first, stop))
        table = self.manifest.shards
        tokens, rows = np.zeros(stop - first, dtype=np.int64), np.zeros(stop - first, dtype=np.int64)
        touched = range(int(table.shard_of(first)), int(table.shard_of(stop - 1)) + 1)
        here = touched if self.part is None else [i for i in self.part.shards if i in touched]
        for number, index in enumerate(here):
            if number % self.window == 0:
                self.files.expect(here[number : number + 4 * self.window], ["examples"])
            columns = self.example_table(index, ["n_tokens", "row_start", "row_end"])
            start, end, _ = table[index]
            into = slice(max(start, first) - first, min(end, stop) - first)
            taken = slice(max(start, first) - start, min(end, stop) - start)
            tokens[into] = columns["n_tokens"][taken]
            rows[into] = (np.array(columns["row_end"]) - np.array(columns["row_start"]))[taken]
        return tokens, rows

    def _those_here(self, first: int, tokens: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of consecutive examples from number `first` on, with 0 for those whose shard this copy does not hold."""
        if self.part is None:
            return tokens, rows
        held = np.zeros(len(self.manifest.shards), dtype=bool)
        held[list(self.part.shards)] = True
        here = held[self.manifest.shards.shard_of(np.arange(first, first + len(rows)))]
        return tokens * here, rows * here

    def epoch_order(self, seed: int, epoch: int) -> EpochOrder:
        """As `Reader.epoch_order`: a function of (seed, epoch) and the shards that are here."""
        table, here = self.manifest.shards, slice(None) if self.part is None else np.asarray(self.part.shards)
        return epoch_order(seed, epoch, table.starts[here], table.examples[here], self.window)

    def shard(self, index: int) -> shard_store.Shard:
        """As `Reader.shard`; taken from memory where it was touched lately."""
        held = self._held(index)
        if held is not None:
            return held
        with self._loading[index]:  # a second thread waits for the first instead of loading the shard too
            held = self._held(index)
            if held is not None:
                return held
            coming = [] if self._announced is None or self.files.on_disk else self._announced.coming()
            if index not in coming:
                self.files.expect([index, *coming], self._names())
            loaded = shard_store.read_shard(self.files, self.manifest, index, names=self._arrays)
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

    def announce(self, batches: Iterable[Sequence[int]]) -> None:
        """As `Reader.announce`: a mirror fetches shards before they are needed."""
        if not self.files.on_disk:
            self._announced = Announced(
                batches, self.manifest.shards.shard_of, held=self.window + 1, ahead=2 * self.window
            )
            self._expect(self._announced)

    def _expect(self, announced: Announced) -> None:
        """Announce to the files which shards are loaded next."""
        self.files.expect(announced.coming(), self._names())

    def _names(self) -> list[str] | None:
        return None if self._arrays is None else [*self._arrays, "examples"]

    def locate(self, example: int) -> tuple[shard_store.Shard, int]:
        """As `Reader.locate`."""
        if not 0 <= example < len(self):
            raise IndexError(f"example {example} of a cache of {len(self)}")
        shard = self.shard(int(self.manifest.shards.shard_of(example)))
        return shard, example - shard.first_example

    def example_table(self, shard: int, columns: Sequence[str]) -> dict[str, list[Any]]:
        """As `Reader.example_table`."""
        return shard_store.read_example_table(self.files, self.manifest, shard, columns)

    def read(self, examples: Sequence[int]) -> list[CachedExample]:
        """As `Reader.read`."""
        return self._decoder.examples(examples, self._located(examples)) if len(examples) else []

    def read_rows(self, examples: Sequence[int]) -> SoftTargets:
        """As `Reader.read_rows`."""
        return self._decoder.rows(self._located(examples))

    def _located(self, examples: Sequence[int]) -> list[tuple[shard_store.Shard, int]]:
        if self._announced is not None and self._announced.read(examples):
            self._expect(self._announced)
        return [self.locate(int(e)) for e in examples]

    def vocabulary(self) -> list[bytes]:
        """As `Reader.vocabulary`."""
        return read_vocabulary(self.files, self.manifest)


def quality_means(manifest: CacheManifest) -> Mapping[str, float]:
    """Per-row means of the quality sums."""
    rows = manifest.quality.get("rows", 0.0)
    return {name: value / rows for name, value in manifest.quality.items() if name != "rows" and rows}
