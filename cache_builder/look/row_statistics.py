"""Figures of all rows of a cache, as histograms: how uncertain the teacher was, what was kept, and how often it was right.

One pass over the rows, with the arrays that these figures need. `kd.evaluation.cache_figures` draws them.

Calibration compares what the teacher said with what was there: rows are put into 15 bins of equal width by the probability of
their most probable token, and each bin has its rows, their mean probability, and the share in which that token was there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kd.cache_builder.look.find_rows import blocks_of_rows
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.row_figures import entropy_bounds
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.common.errors import CacheError
from kd.common.progress import Progress

BINS = 15
"""Bins of the calibration, as in `kd.evaluation.statistics.calibration`."""
PROBABILITY_EDGES = (0.0, *(10.0**power for power in np.arange(-6, 0.01, 0.5)))
"""Half powers of ten; the first bin holds what is below a millionth."""


@dataclass
class Histogram:
    """Counts of rows by the value of one figure."""

    edges: np.ndarray
    """`[B + 1]` ascending; a bin holds its lower edge, and the last one its upper edge too. Values outside go to the outer bins."""
    counts: np.ndarray
    """`[B]` rows"""

    def add(self, values: np.ndarray) -> None:
        """Count some rows."""
        places = np.clip(np.searchsorted(self.edges, values, side="right") - 1, 0, len(self.counts) - 1)
        self.counts += np.bincount(places, minlength=len(self.counts))

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {"edges": [float(edge) for edge in self.edges], "rows": self.counts.tolist()}


def histogram(edges: Any) -> Histogram:
    """One without rows."""
    edges = np.asarray(edges, dtype=np.float64)
    return Histogram(edges, np.zeros(len(edges) - 1, dtype=np.int64))


@dataclass
class RowStatistics:
    """Figures of the rows of a cache."""

    vocabulary_size: int
    tail_known: bool
    """False where nobody knows the probability beyond the kept tokens: then nothing is said of mass and calibration."""
    ranks_known: bool
    """False where the rank of a token that is not among the kept ones is a lower bound, and its probability an upper one."""
    rows: int = 0
    entropy: Histogram = field(default_factory=lambda: histogram(np.arange(0, 12.01, 0.25)))
    """Lower bound, in nats, see `row_figures`."""
    kept_mass: Histogram = field(default_factory=lambda: histogram(np.linspace(0, 1, 51)))
    """Probability of the kept tokens at temperature 1; empty for a profile that keeps none."""
    rank: Histogram = field(default_factory=lambda: histogram(2.0 ** np.arange(0, 21)))
    """Rank of the token that is there, from 1; each bin is twice as wide as the one before."""
    probability: Histogram = field(default_factory=lambda: histogram(PROBABILITY_EDGES))
    """Probability of the token that is there."""
    confidence: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    """`[BINS]` sums of the largest probability"""
    right: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    """`[BINS]` rows whose most probable token was there"""
    in_bin: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    """`[BINS]` rows"""

    def add(self, targets: SoftTargets) -> None:
        """Count some rows."""
        self.rows += len(targets)
        self.entropy.add(entropy_bounds(targets, self.vocabulary_size)[0])
        self.rank.add(targets.gold_rank + 1)
        self.probability.add(np.exp(targets.gold_logprob.astype(np.float64)))
        if not self.tail_known:
            return
        if targets.logprobs is not None:
            self.kept_mass.add(1.0 - targets.tail_mass_at(1.0))
            largest = np.exp(targets.logprobs.reshape(-1)[targets.most_probable].astype(np.float64))
        else:
            largest = np.exp(-targets.log_z[:, targets.grid_index(1.0)].astype(np.float64))
        bins = np.clip(np.ceil(largest * BINS).astype(np.int64) - 1, 0, BINS - 1)
        self.in_bin += np.bincount(bins, minlength=BINS)
        self.confidence += np.bincount(bins, weights=largest, minlength=BINS)
        self.right += np.bincount(bins, weights=targets.gold_rank == 0, minlength=BINS)

    @property
    def calibration(self) -> list[dict[str, Any]]:
        """A record for each bin that has rows."""
        return [
            {
                "from": b / BINS,
                "to": (b + 1) / BINS,
                "rows": int(n),
                "confidence": float(self.confidence[b] / n),
                "accuracy": float(self.right[b] / n),
            }
            for b, n in enumerate(self.in_bin)
            if n
        ]

    @property
    def calibration_error(self) -> float | None:
        """Expected calibration error (Guo et al. 2017, arXiv:1706.04599); None where nothing is known of it."""
        rows = int(self.in_bin.sum())
        return float(np.abs(self.right - self.confidence).sum() / rows) if rows else None

    @property
    def document(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "rows": self.rows,
            "entropy_at_least": self.entropy.document,
            "kept_mass": self.kept_mass.document if self.kept_mass.counts.any() else None,
            "rank": self.rank.document | {"lower_bounds": not self.ranks_known},
            "probability": self.probability.document | {"upper_bounds": not self.ranks_known},
            "calibration": self.calibration if self.tail_known else None,
            "calibration_error": self.calibration_error,
        }


def row_statistics(reader: CacheReader) -> Iterator[Progress[RowStatistics]]:
    """The figures of all rows that are here; yields progress in rows. Raises CacheError where there are none, or no arrays."""
    manifest = reader.manifest
    total = sum(manifest.shards[shard][2] for shard in reader.shards)
    if not total:
        raise CacheError("this cache holds no rows", where=reader.root)
    figures = RowStatistics(manifest.vocabulary_size, not manifest.tail_unknown, not manifest.gold_in_top_k)
    yield Progress(0, total)
    for block in blocks_of_rows(reader, ["logprobs"] if manifest.targets.top_k else ["log_z"]):
        figures.add(block.targets)
        yield Progress(figures.rows, total)
    yield Progress(total, total, figures)
