"""Draws from a tail that has grown, or fewer draws: made out of a row whose tail was drawn, without the teacher.

A stored row is an estimate p̂ of the teacher's: kept tokens as they are, and every draw with an equal share of the tail's mass.
What of p̂ lies beyond the new head is drawn again, systematically, so the new estimate has p̂ as its mean. And p̂ has p. So the
draws of a slice are an unbiased estimate of the teacher's tail too. Its variance is the sum of both: that of a new build is less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

REDRAWN_ROWS = 1000
"""Rows drawn at once: a table of all points against all sums is made."""


@dataclass(frozen=True)
class StoredTail:
    """What lies beyond the new head of N rows: tokens that were kept, and draws."""

    ids: np.ndarray
    """[N, C] token ids; what has no mass may be anything"""
    mass: np.ndarray
    """[N, C] float64 probability of each at temperature 1; a token that was drawn twice is there twice"""


def redrawn(tail: StoredTail, most: int, uniforms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Draws `[N, most]` and their number `[N]`, as `TargetConfig.tail_samples` = `most` says; `uniforms [N]` in [0, 1)."""
    ids, counts = np.zeros((len(uniforms), most), dtype=tail.ids.dtype), np.zeros(len(uniforms), dtype=np.int64)
    for first in range(0, len(uniforms), REDRAWN_ROWS):
        rows = slice(first, first + REDRAWN_ROWS)
        sums = tail.mass[rows].cumsum(axis=1)
        total = sums[:, -1:]
        counts[rows] = np.clip(np.ceil(most * total[:, 0]), 1, most) * (total[:, 0] > 0)
        slots = np.arange(most)
        points = (uniforms[rows, None] + slots) / np.maximum(counts[rows, None], 1) * total
        places = (sums[:, None, :] <= points[:, :, None]).sum(axis=2)
        last = (sums < total).sum(axis=1, keepdims=True)  # what follows has no mass
        drawn = np.take_along_axis(tail.ids[rows], np.minimum(places, last), axis=1)
        ids[rows] = np.where(slots < counts[rows, None], drawn, 0)
    return ids, counts


def row_uniforms(fingerprint: str, shard: int, first: int, stop: int) -> np.ndarray:
    """`[stop - first]` numbers in [0, 1) of rows of a source's shard, which depend on the source and the row alone.

    They are others than those that the source was drawn with, and others for a slice of the slice.
    """
    drawn = np.random.Generator(np.random.Philox(key=[int(fingerprint[:16], 16), shard])).random(stop)
    return np.asarray(drawn[first:])
