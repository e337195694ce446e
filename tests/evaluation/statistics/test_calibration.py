"""Expected calibration error: a calibrated model has none, and figures by hand."""

from __future__ import annotations

import numpy as np
import pytest

from kd.evaluation.statistics.calibration import BINS, calibration_error, calibration_gaps
from kd.evaluation.statistics.estimates import Documents


def naive(confidence: np.ndarray, right: np.ndarray, bins: int = BINS) -> float:
    """The definition, bin by bin."""
    total = 0.0
    for b in range(bins):
        inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return total


def test_the_error_of_a_calibrated_model_tends_to_nothing():
    rng = np.random.default_rng(0)
    found = []
    for rows in (1_000, 100_000):
        confidence = rng.uniform(0.05, 1.0, rows)
        right = rng.random(rows) < confidence
        found.append(calibration_gaps(confidence, right).mean())
        expected = (
            sum(
                np.sqrt(2 / np.pi * inside.sum() * (c := confidence[inside].mean()) * (1 - c))
                for b in range(BINS)
                if (inside := np.ceil(confidence * BINS) == b + 1).any()
            )
            / rows
        )
        assert found[-1] == pytest.approx(expected, rel=0.6)  # a sum of 15 absolute normal deviates
    assert 0 <= found[1] < found[0] / 4  # a hundredfold rows: a tenth, within what two such sums differ


def test_the_error_is_the_overconfidence_of_a_model_that_is_always_sure():
    right = np.array([1, 0, 0, 1, 0])
    assert calibration_gaps(np.ones(5), right).mean() == pytest.approx(1 - 2 / 5)
    assert calibration_gaps(np.full(5, 1e-9), right).mean() == pytest.approx(2 / 5)


def test_gaps_equal_the_definition_bin_by_bin():
    rng = np.random.default_rng(1)
    confidence = rng.beta(2, 2, 500)
    confidence[:BINS] = np.arange(1, BINS + 1) / BINS  # the upper edges belong to their bins
    right = rng.random(500) < confidence**2
    for bins in (1, 4, BINS):
        assert calibration_gaps(confidence, right, bins=bins).mean() == pytest.approx(naive(confidence, right, bins))
    assert naive(confidence, right) > abs(right.mean() - confidence.mean()) - 1e-12  # more bins never hide an error


def test_order_and_documents_change_the_value_nowhere_and_the_error_where_they_should():
    rng = np.random.default_rng(2)
    confidence = rng.uniform(0.1, 0.9, 60)
    right = np.repeat(rng.random(6) < 0.5, 10).astype(float)  # ten rows of one document are right together
    together = calibration_error(Documents.of_examples(list("abcdef"), "pairs"), confidence, right, [10] * 6)
    apart = calibration_error(Documents.of_examples([str(i) for i in range(60)], "pairs"), confidence, right, [1] * 60)
    assert together.value == pytest.approx(apart.value) == pytest.approx(naive(confidence, right))
    assert together.n == apart.n == 60
    order = rng.permutation(60)
    assert calibration_gaps(confidence[order], right[order]).mean() == pytest.approx(apart.value)
