"""Student's t and the permutation test against scipy, enumeration, and what they must say by symmetry."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.evaluation.statistics.significance import central, paired_test, quantile, sign_flip_p

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 9, 15, 30])
def test_the_sums_are_students_distribution(freedom: int):
    for t in (0.0, 0.1, 0.7, 1.0, 2.3, 4.0, 12.0):
        expected = stats.t.cdf(t, freedom) - stats.t.cdf(-t, freedom)
        assert central(t, freedom) == pytest.approx(expected, abs=1e-12)  # sums of at most 15 terms in float64
    assert quantile(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_one_degree_of_freedom_is_cauchys_distribution():
    assert central(1.0, 1) == pytest.approx(0.5, abs=1e-15)
    assert quantile(0.5, 1) == pytest.approx(1.0, rel=1e-12)


@given(st.lists(st.integers(-300, 300).map(lambda n: n / 100), min_size=2, max_size=9))
def test_the_test_is_scipys(d):
    found = paired_test(d)
    assert (found.t is None) == (len(set(d)) == 1)
    if found.t is None:
        return
    expected = stats.ttest_1samp(d, 0.0)
    assert found.t == pytest.approx(expected.statistic, rel=1e-7)
    assert found.p_t == pytest.approx(expected.pvalue, abs=1e-9)
    assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)), rel=1e-6, abs=1e-9)


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=7))
def test_the_permutation_test_counts_every_change_of_sign(d):
    sums = [sum(s * x for s, x in zip(signs, d, strict=True)) for signs in itertools.product((1, -1), repeat=len(d))]
    expected = sum(abs(s) >= abs(sum(d)) for s in sums) / len(sums)
    assert sign_flip_p(np.array(d, dtype=float)) == expected
    assert sign_flip_p(np.array(d, dtype=float)) >= 2 / 2 ** len(d)


def test_agreeing_seeds_reach_the_least_p_there_is():
    found = paired_test([0.3, 0.2, 0.4])
    assert found.p_permutation == 0.25
    assert found.p_t is not None
    assert found.p_t < 0.05


def test_the_sign_of_all_differences_changes_nothing_but_the_sign():
    a, b = paired_test([1.0, 2.0, -0.5]), paired_test([-1.0, -2.0, 0.5])
    assert (a.mean, a.t, a.p_t, a.p_permutation) == (-b.mean, -b.t, b.p_t, b.p_permutation)


def test_what_cannot_be_tested_says_nothing():
    assert paired_test([0.4]).p_t is None
    equal = paired_test([0.1, 0.1, 0.1])
    assert (equal.t, equal.p_t, equal.p_permutation) == (None, None, 0.25)
    assert paired_test([0.0, 0.0]).p_permutation == 1.0
    assert paired_test([float(n) for n in range(1, 18)]).p_permutation is None
