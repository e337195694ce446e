"""Is a difference over a few seeds more than chance? Paired t test, its interval, and an exact permutation test.

Student's t for n seeds, ν = n - 1, d_s the difference of two students that share seed s:

    t = mean(d) / (sd(d) / √n)        sd with n - 1

Its probabilities are finite sums for whole ν (Abramowitz & Stegun 26.7.3 and 26.7.4), so no statistics library is needed;
the tests hold them against scipy. The permutation test asks in how many of the 2^n ways to swap the two students within
seeds the mean difference is at least as far from 0: exact, without a normal distribution, and never below 2 / 2^n. Three
seeds can therefore not show p < 0.25 and five not p < 0.0625 in it; the t test can, at the price of its assumption.

Fisher 1935, The Design of Experiments, §21.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_EXACT = 16
"""Most differences for which all 2^n changes of sign are tried."""


@dataclass(frozen=True)
class PairedTest:
    """What n paired differences say about their mean. Everything but `mean` is None where n is 1."""

    n: int
    mean: float
    sd: float | None
    """Standard deviation of the differences, with n - 1 in the denominator."""
    stderr: float | None
    interval: tuple[float, float] | None
    """Confidence interval of 95 % of the mean, from Student's t."""
    t: float | None
    """Student's t; None where all differences are equal."""
    p_t: float | None
    """Two-sided p of the t test; None where all differences are equal, because the test then has no scale."""
    p_permutation: float | None
    """Two-sided exact p of the sign-flip test; None for more than MOST_EXACT differences."""


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Test `[n >= 1]` differences against a mean of 0."""
    d = np.asarray(differences, dtype=np.float64)
    n, mean = len(d), float(d.mean())
    if n < 2:
        return PairedTest(n, mean, None, None, None, None, None, None)
    sd = float(d.std(ddof=1))
    stderr = sd / math.sqrt(n)
    reach = quantile(0.95, n - 1) * stderr
    flips = sign_flip_p(d) if n <= MOST_EXACT else None
    interval = (mean - reach, mean + reach)
    if sd <= 1e-12 * float(np.abs(d).max()):  # equal but for rounding
        return PairedTest(n, mean, sd, stderr, interval, None, None, flips)
    t = mean / stderr
    return PairedTest(n, mean, sd, stderr, interval, t, 1 - central(abs(t), n - 1), flips)


def central(t: float, freedom: int) -> float:
    """P(|T| <= t) of Student's t with `freedom` >= 1 degrees of freedom, t >= 0."""
    angle = math.atan(t / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = 0.0 if freedom == 1 else term
    for k in range(3 if odd else 2, freedom - 1, 2):  # k - 1 over k, from the power k - 2 of the cosine to the power k
        term *= (k - 1) / k * cosine**2
        total += term
    return min(1.0, 2 / math.pi * (angle + sine * total) if odd else sine * total)


def quantile(share: float, freedom: int) -> float:
    """The t with P(|T| <= t) = share, by bisection to the last digits."""
    low, high = 0.0, 1.0
    while central(high, freedom) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if central(middle, freedom) < share else (low, middle)
    return high


def sign_flip_p(differences: np.ndarray) -> float:
    """Share of the 2^n changes of sign of `[n]` differences that take |sum| at least as far as it is."""
    sums = np.zeros(1)
    for d in differences:
        sums = np.concatenate([sums + d, sums - d])
    observed = abs(float(differences.sum()))
    close = 1e-9 * float(np.abs(differences).sum())  # sums that are equal but for rounding count
    return float(np.mean(np.abs(sums) >= observed - close))
