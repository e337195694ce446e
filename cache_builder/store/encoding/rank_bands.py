"""Rank bands of rows that differ in length: the mass of a token that a row does not keep belongs to the band of its rank.

The bands of such a cache begin where its shortest row may end, at the same ranks in all rows (`TargetConfig.edges`). Of each
band a row stores the mass of the ranks that it does not keep. So a row can be made shorter without its teacher: the bands
receive what is cut, and kept tokens and bands still add up to one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LOG_MASS_FLOOR = -60.0
"""Log-mass of an empty rank band: e^-60 is below anything float32 can sum."""


def with_cut_tokens(
    bands: np.ndarray, edges: Sequence[int], rows: np.ndarray, ranks: np.ndarray, logprobs: np.ndarray
) -> np.ndarray:
    """`[N, B]` log-masses of the bands between `edges`, with the mass of C cut tokens added; float64.

    rows, ranks  [C]  the row and the rank of each cut token, no rank before the first edge
    logprobs     [C]  its log-probability, nats
    """
    band = np.searchsorted(np.asarray(edges), ranks, side="right") - 1
    added = np.bincount(rows * bands.shape[1] + band, weights=np.exp(logprobs), minlength=bands.size)
    with np.errstate(divide="ignore"):
        mass = np.log(np.exp(bands.astype(np.float64)) + added.reshape(bands.shape))
    return np.asarray(np.maximum(mass, LOG_MASS_FLOOR))
