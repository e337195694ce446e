"""Laws of the smoothing of curves."""

from __future__ import annotations

import numpy as np
import pytest

from kd.evaluation.report.figures import smooth


def test_smoothing_keeps_a_constant_and_calms_noise():
    assert smooth(np.full(50, 3.25)) == pytest.approx(np.full(50, 3.25), rel=1e-12)
    assert smooth(np.array([7.0])).tolist() == [7.0]
    values = np.random.default_rng(0).normal(size=400)
    assert smooth(values).std() < 0.5 * values.std()  # weights fall by half every 4 records: about 11 of them count


def test_smoothing_does_not_lag_behind_a_slope():
    line = np.linspace(7.0, 2.0, 500)
    assert smooth(line)[100:400] == pytest.approx(line[100:400], abs=1e-6)  # the window's ends are 2^-20 of its middle
    values = np.random.default_rng(0).normal(size=80)
    assert smooth(values[::-1]) == pytest.approx(smooth(values)[::-1], rel=1e-9)


def test_smoothing_equals_a_double_loop():
    values = np.random.default_rng(1).normal(size=30)
    keep = 0.5  # 1 % of 30 records is less than one: the half-life is a record
    weights = keep ** np.abs(np.arange(30)[:, None] - np.arange(30)[None, :])
    assert smooth(values) == pytest.approx(weights @ values / weights.sum(1), rel=1e-12)
