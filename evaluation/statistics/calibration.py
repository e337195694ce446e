"""Is a model as often right as it says? Expected calibration error of the most probable token.

    ECE = Σ_b |B_b|/N · |accuracy(B_b) - confidence(B_b)|        B_b: rows whose confidence lies in ((b-1)/M, b/M]

M = 15 bins of equal width, confidence = the largest probability (temperature 1), accuracy = how often that token is the one
that was there; 0 for a model that is right 70 % of the times it says 0.7. Within a bin the differences are summed before
their absolute value is taken, so ECE is a mean over rows of sign(bin) · (right - confidence): a ratio with a clustered error
like the others, the signs taken as known. From few rows it comes out too high: N rows of a calibrated model give about
Σ_b sqrt(2/π · |B_b| · conf (1 - conf)) / N, not 0. Guo et al. 2017, arXiv:1706.04599; Naeini et al. 2015.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kd.evaluation.statistics.estimates import Documents, Estimate, per_example

BINS = 15


def calibration_gaps(confidence_N: np.ndarray, right_N: np.ndarray, *, bins: int = BINS) -> np.ndarray:
    """`[N]` float64 whose mean is the expected calibration error: right - confidence, with the sign of its bin's sum.

    confidence_N   (0, 1]
    right_N        1 where the most probable token was there, else 0
    """
    bin_N = np.clip(np.ceil(confidence_N * bins).astype(np.int64) - 1, 0, bins - 1)
    gap_N = right_N.astype(np.float64) - confidence_N
    return np.asarray(gap_N * np.sign(np.bincount(bin_N, weights=gap_N, minlength=bins))[bin_N])


def calibration_error(
    documents: Documents, confidence_N: np.ndarray, right_N: np.ndarray, lengths: Sequence[int]
) -> Estimate:
    """The expected calibration error over consecutive examples of `lengths` rows, its error clustered by document."""
    return documents.ratio(per_example(calibration_gaps(confidence_N, right_N), lengths), np.array(lengths))
