"""Student's t and the permutation test against scipy, enumeration, and what they must say by symmetry."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.evaluation.statistics.significance import (
    difference_p,
    holm,
    paired_test,
    pooled_freedom,
    quantile,
    sign_flip_p,
    two_sided_p,
)

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("freedom", [1, 2, 2.36, 3, 4.7, 8, 30, 59.5, 1000])
def test_probabilities_are_students_also_where_they_are_tiny(freedom: float):
    for t in (1e-6, 0.1, 0.7, 1.0, 2.3, 4.0, 12.0, 50.0, 1e4):
        expected = 2 * stats.t.sf(t, freedom)
        if expected > 1e-300:
            # lgamma of half a thousand has 13 digits, and its error is that of the logarithm of the result
            assert two_sided_p(t, freedom) == pytest.approx(expected, rel=1e-10)
            assert two_sided_p(-t, freedom) == two_sided_p(t, freedom)
    assert quantile(0.95, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_no_probability_is_zero():
    for freedom in (1, 3, 1e6, math.inf):
        assert 0 < two_sided_p(1e200, freedom) <= two_sided_p(1e3, freedom)
        assert two_sided_p(math.inf, freedom) > 0
    assert difference_p(1.0, 0.0, 1e9) > 0


def test_infinitely_many_degrees_of_freedom_are_the_normal_distribution():
    assert two_sided_p(1.959963984540054, math.inf) == pytest.approx(0.05, rel=1e-12)
    assert two_sided_p(2.0, 1e8) == pytest.approx(two_sided_p(2.0, math.inf), rel=1e-6)


def test_one_degree_of_freedom_is_cauchys_distribution():
    assert two_sided_p(1.0, 1) == pytest.approx(0.5, abs=1e-14)
    assert quantile(0.5, 1) == pytest.approx(1.0, rel=1e-12)


@given(st.lists(st.tuples(st.floats(0.01, 9), st.floats(1, 99)), min_size=1, max_size=5))
def test_pooled_degrees_of_freedom_lie_between_the_least_and_the_sum(errors):
    pooled = pooled_freedom(errors)
    assert min(f for _, f in errors) * (1 - 1e-9) <= pooled <= sum(f for _, f in errors) * (1 + 1e-9)


def test_errors_that_are_nothing_or_known_exactly_do_not_count():
    assert pooled_freedom([(1.0, 2.0), (0.0, 50.0)]) == 2.0
    assert pooled_freedom([(1.0, math.inf)]) == math.inf
    assert pooled_freedom([(0.0, 3.0), (0.0, 7.0)]) == 3.0


def test_a_difference_without_spread_is_as_likely_as_equal_signs():
    assert difference_p(0.3, 0.0, 3) == 2 / 2**4
    assert difference_p(0.0, 0.0, 3) == 1.0


@given(st.lists(st.none() | st.floats(1e-9, 1), max_size=9))
def test_holms_correction_is_that_of_a_loop(p_values):
    corrected = holm(p_values)
    known = sorted(p for p in p_values if p is not None)
    for p, q in zip(p_values, corrected, strict=True):
        if p is None:
            assert q is None
        else:
            assert q == pytest.approx(min(1.0, max((len(known) - i) * x for i, x in enumerate(known) if x <= p)))
    assert [q for q in holm([0.01, 0.04, 0.03]) if q is not None] == pytest.approx([0.03, 0.06, 0.06])


def test_holm_keeps_false_findings_of_a_table_of_nothing_rare():
    """In 2,000 tables of ten differences of nothing, about one in twenty has a finding; uncorrected, four in ten."""
    rng = np.random.default_rng(0)
    p_values = rng.uniform(size=(2000, 10))
    rate = np.mean([any(q is not None and q <= 0.05 for q in holm(list(row))) for row in p_values])
    assert 0.035 < rate < 0.065  # three standard errors of a share of 2,000 are 0.015
    assert np.mean((p_values <= 0.05).any(axis=1)) > 0.35


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
