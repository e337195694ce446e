"""`Reader`, the protocol of all readers of caches, and the `CachedExample`s that they hand out.

Training and evaluation take a `Reader`. `CacheReader` is one over a single cache, `MixedReader` one over several.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from kd.cache_builder.store.readers.epoch_order import EpochOrder
from kd.cache_builder.store.readers.shaded_text import example_html
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.cache_builder.store.records.part import Part
from kd.cache_builder.store.shard_store import Shard
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.cache_builder.store.targets import TargetConfig
from kd.models.batching.gaps import NO_GAPS, Gaps


@dataclass(frozen=True, repr=False)
class CachedExample:
    """One example with its decoded targets."""

    index: int
    """Number of the example in the cache."""
    id: str
    prompt: str
    target: str
    context_ids: np.ndarray
    """[C] int32: tokens before the first target token."""
    targets: SoftTargets
    """n rows; row t predicts target token t."""
    gaps: Gaps = NO_GAPS
    """Tokens between target tokens, which are read and not scored: what others say between an assistant's turns."""
    gold_known: bool = True
    """False where the log-probability of a token of the text that is not among the kept ones is an upper bound."""

    @property
    def input_ids(self) -> np.ndarray:
        """`[T]` context and target tokens, and the gaps between them."""
        return self.gaps.sequence(self.context_ids, self.targets.gold_ids.astype(np.int32))

    def __repr__(self) -> str:
        texts = f"prompt={len(self.prompt)} characters, target={len(self.target)} characters"
        shapes = f"context_ids={list(self.context_ids.shape)}, targets={len(self.targets)} rows"
        return f"CachedExample(index={self.index}, id={self.id!r}, {texts}, {shapes})"

    def _repr_html_(self) -> str:
        turns = self.gaps.turns(len(self.targets))
        name, known = f"example {self.index}: {self.id}", self.gold_known
        return example_html(name, self.prompt, self.target, self.targets, turns, gold_known=known)


class CachedBatch(list[CachedExample]):
    """Examples that were decoded together."""

    def __init__(self, examples: Sequence[CachedExample], rows: SoftTargets) -> None:
        super().__init__(examples)
        self.rows = rows
        """The rows of all examples, one after another; the `targets` of each example are views of them."""


class Reader(Protocol):
    """Random access to the examples of a finished cache, or of several that are read as one; thread-safe.

    >>> import kd
    >>> cache: kd.Reader = kd.open_cache("cache")
    >>> example = cache[0]
    >>> example.target
    'Once upon a time there was a small fox who lived at the edge of the wood. ...'
    >>> example.targets.token_ids.shape[1], cache.manifest.targets.temperatures
    (64, (1.0, 2.0))
    """

    root: Path
    """Folder of the cache, for messages; of a mixture, the folders with commas between them."""
    manifest: CacheManifest
    config: TargetConfig
    """Which targets are stored: `manifest.targets`."""
    top_k: int | None
    """Tokens per row that are handed out; None means all that are stored."""
    part: Part | None
    """What this copy holds of the cache; None for a whole cache and for a mixture."""
    shards: Sequence[int]
    """Shards that can be read, ascending: all of them, except in a copy of a part."""

    def __len__(self) -> int:
        """Number of examples, those of missing shards included."""

    def __getitem__(self, example: int) -> CachedExample:
        """One example."""

    def keep(self, arrays: Sequence[str]) -> None:
        """Read no other stored arrays than these from now on. Raises CacheError where this copy does not hold them."""

    def lengths(self, first: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """`(tokens [E], rows [E])` of the examples `[first, stop)`, or of all; 0 for those that are not here.

        `tokens` counts all tokens that a model reads (context, targets and gaps), `rows` the target tokens alone. Raises
        IndexError for a range that is empty or not in the cache.
        """

    def epoch_order(self, seed: int, epoch: int) -> EpochOrder:
        """Example numbers in the order of one epoch; parts of it are worked out when they are asked for."""

    def announce(self, batches: Iterable[Sequence[int]]) -> None:
        """Say in which order `read` will be called, so that files can be fetched before they are needed."""

    def shard(self, index: int) -> Shard:
        """A verified shard."""

    def locate(self, example: int) -> tuple[Shard, int]:
        """The shard that holds an example, and the example's number in that shard. Raises IndexError."""

    def example_table(self, shard: int, columns: Sequence[str]) -> dict[str, list[Any]]:
        """Some columns of a shard's examples (`kd.cache_builder.store.example_table`), without reading its targets."""

    def read(self, examples: Sequence[int]) -> list[CachedExample]:
        """Several examples, decoded together: a `CachedBatch`, or an empty list for no examples.

        Raises CacheDamageError where rows and tokens do not belong together.
        """

    def read_rows(self, examples: Sequence[int]) -> SoftTargets:
        """The rows of several examples, one after another, without their texts."""

    def vocabulary(self) -> list[bytes]:
        """The bytes every teacher id stands for."""
