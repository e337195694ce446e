"""Laws of the smoothing of curves, and where the marks of a picture of gains lie."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure

from kd.evaluation.report import figures
from kd.evaluation.report.figures import Delta, draw_deltas, smooth


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


def test_gains_lie_on_their_rows_and_every_row_is_named(tmp_path, monkeypatch):
    drawn = Figure()
    monkeypatch.setattr(figures, "save_figure", lambda path, draw, height: draw(drawn))
    pairs = ("kl", "uld", "alm")
    one = [Delta("perplexity", other, "ce", gain, 0.5, (0.1, 0.2)) for gain, other in enumerate(pairs)]
    several = [Delta(label, other, "ce", 1.0, 0.5) for label in ("boolq", "paws") for other in pairs]
    draw_deltas(tmp_path / "x.png", {"gain in perplexity [per token]": one, "gain [percentage points]": several})
    alone, many = drawn.axes
    assert [t.get_text() for t in alone.get_yticklabels()] == list(pairs)
    assert alone.get_title(loc="left") == "gain in perplexity [per token], against ce"
    assert [float(bar[0].get_ydata()[0]) for bar in alone.containers] == list(alone.get_yticks())
    assert [t.get_text() for t in many.get_yticklabels()] == ["boolq", "paws"]
    rows = [round(float(bar[0].get_ydata()[0])) for bar in many.containers]
    assert rows == [0, 0, 0, 1, 1, 1], "within the band of their column"
