"""Is a difference more than chance? Student's t for any degrees of freedom, Holm's correction, and an exact permutation test.

Student's t for n seeds, ν = n - 1, d_s the difference of two students that share seed s:

    t = mean(d) / (sd(d) / √n)        sd with n - 1

Its probabilities come from the continued fraction of the incomplete beta function, so no statistics library is needed; the
tests hold them against scipy. An error over seeds and documents together has pooled degrees of freedom (`pooled_freedom`).
The permutation test asks in how many of the 2^n ways to swap the two students within seeds the mean difference is at least as
far from 0: exact, without a normal distribution, and never below 2 / 2^n. Three seeds can therefore not show p < 0.25 and five
not p < 0.0625 in it; the t test can, at the price of its assumption.

A table of many differences shows some that are larger than their errors by chance. `holm` corrects their p-values for that.

Fisher 1935, The Design of Experiments, §21.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_EXACT = 16
"""Most differences for which all 2^n changes of sign are tried."""
LEVEL = 0.05
"""Largest p-value, after Holm's correction, of a difference that is called better or worse."""
SMALLEST = sys.float_info.min
"""Least p-value that is reported: none is 0."""


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
    return PairedTest(n, mean, sd, stderr, interval, t, two_sided_p(t, n - 1), flips)


def two_sided_p(t: float, freedom: float) -> float:
    """P(|T| >= |t|) of Student's t with `freedom` > 0 degrees of freedom; infinitely many are the normal distribution.

    It is exact to rounding in relative terms, so a tiny probability is a tiny number; the smallest is that of a float.
    """
    t = abs(t)
    if t == 0:
        return 1.0
    if math.isinf(t):
        return SMALLEST
    if math.isinf(freedom):
        return max(math.erfc(t / math.sqrt(2)), SMALLEST)
    log_x = -math.log1p(t * t / freedom)  # x = ν / (ν + t²), and 1 - x = t² / (ν + t²)
    log_rest = -math.log1p(freedom / (t * t))
    a, b = freedom / 2, 0.5
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * log_x + b * log_rest
    x = math.exp(log_x)
    if x < (a + 1) / (a + b + 2):
        logarithm = log_front - math.log(a) + math.log(_fraction(a, b, x))
        return max(math.exp(logarithm), SMALLEST)
    return 1 - math.exp(log_front) / b * _fraction(b, a, math.exp(log_rest))


def _fraction(a: float, b: float, x: float) -> float:
    """The continued fraction of the incomplete beta function (Abramowitz & Stegun 26.5.8), by Lentz's method."""
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1))
    result = d
    for m in range(1, 10_000):
        for numerator in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + numerator * d)
            c = 1 + numerator / c
            result *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return result


def quantile(share: float, freedom: float) -> float:
    """The t with P(|T| <= t) = share, by bisection to the last digits."""
    low, high = 0.0, 1.0
    while two_sided_p(high, freedom) > 1 - share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided_p(middle, freedom) > 1 - share else (low, middle)
    return high


def pooled_freedom(errors: Sequence[tuple[float, float]]) -> float:
    """Degrees of freedom of a sum of independent errors, each given with its own (Welch 1947, Satterthwaite 1946).

    It is at least the smallest of theirs, and at most their sum.
    """
    variance = sum(error**2 for error, _ in errors)
    shares = [(error**2 / variance) ** 2 / freedom for error, freedom in errors if error > 0]
    if not shares:
        return min(freedom for _, freedom in errors)
    return 1 / sum(shares) if sum(shares) > 0 else math.inf


def difference_p(difference: float, error: float, freedom: float) -> float:
    """Two-sided p of a difference with this standard error.

    Without any spread there is no scale for t: then all n = freedom + 1 differences agree, which chance does with 2 / 2^n.
    """
    if error > 0:
        return two_sided_p(difference / error, freedom)
    return 1.0 if difference == 0 else max(2.0 ** -min(freedom, 1000), SMALLEST)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values after Holm's correction: with those at most 0.05 taken for real, one false one or more has probability 0.05.

    The tests may depend on each other in any way. None stays None, and is not counted. Holm 1979.
    """
    known = sorted((p, number) for number, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, number) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        corrected[number] = largest
    return corrected


def sign_flip_p(differences: np.ndarray) -> float:
    """Share of the 2^n changes of sign of `[n]` differences that take |sum| at least as far as it is."""
    sums = np.zeros(1)
    for d in differences:
        sums = np.concatenate([sums + d, sums - d])
    observed = abs(float(differences.sum()))
    close = 1e-9 * float(np.abs(differences).sum())  # sums that are equal but for rounding count
    return float(np.mean(np.abs(sums) >= observed - close))
