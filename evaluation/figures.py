"""The two pictures of a report: loss curves and bars with error bars, drawn through matplotlib's object API.

No pyplot, no global state, no display: a `Figure` on the Agg canvas is a value that becomes a PNG file. Colours are
Okabe and Ito's, told apart by most colour-blind readers; runs beyond eight repeat them with another dash.
Raw losses are drawn faint, and over them their exponential mean with a half-life of 2 % of the run, bias-corrected
so that the curve starts at the data and not at zero (Kingma and Ba 2015, arXiv:1412.6980).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.files import publish

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
DASHES = ("-", "--", ":", "-.")
HALF_LIFE = 0.02
"""Half-life of the smoothing, as a share of the run's records."""
DPI = 150
RC = {"font.size": 10.0, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
      "grid.color": "#e3e6ea", "axes.axisbelow": True, "figure.facecolor": "white", "legend.frameon": False}  # fmt: skip


@dataclass(frozen=True)
class Series:
    """One run's values of one quantity."""

    label: str
    steps: np.ndarray
    """[n] optimiser steps, ascending"""
    values: np.ndarray
    """[n] nats per token"""


@dataclass(frozen=True)
class Bar:
    """One model's value of one metric."""

    label: str
    value: float
    stderr: float | None


def draw_losses(path: Path, panels: Mapping[str, Sequence[Series]]) -> Path:
    """Write one panel per quantity, side by side: the key is the y axis' label with its unit. Returns `path`."""
    order = list(dict.fromkeys(s.label for series in panels.values() for s in series))

    def draw(figure: Any) -> None:
        for number, (title, series) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), number + 1)
            for one in series:
                place = order.index(one.label)
                look = {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place // len(COLOURS) % len(DASHES)]}
                axes.plot(one.steps, one.values, alpha=0.2, linewidth=0.8, **look)
                axes.plot(one.steps, smooth(one.values), linewidth=1.8, label=one.label, **look)
            axes.set_xlabel("optimiser step")
            axes.set_ylabel(title)
            axes.set_ylim(*_limits([smooth(s.values) for s in series]))
            if number == 0 or {s.label for s in series} != {s.label for s in next(iter(panels.values()))}:
                axes.legend(loc="upper right")

    return _save(path, draw, (6.0 * len(panels), 4.0))


def draw_bars(path: Path, panels: Mapping[str, Sequence[Bar]]) -> Path:
    """Write one panel of horizontal bars per metric: the key is its title with unit. Bars start at 0. Returns `path`."""
    tallest = max(len(bars) for bars in panels.values())

    def draw(figure: Any) -> None:
        for number, (title, bars) in enumerate(panels.items()):
            axes = figure.add_subplot(1, len(panels), number + 1)
            places = np.arange(len(bars))
            values = np.array([b.value for b in bars])
            errors = np.array([b.stderr or 0.0 for b in bars])
            axes.barh(places, values, height=0.6, color=[COLOURS[i % len(COLOURS)] for i in places], alpha=0.85)
            known = np.array([b.stderr is not None for b in bars])
            axes.errorbar(values[known], places[known], xerr=errors[known], fmt="none", ecolor="#222222", capsize=3)
            reach = max(float((values + errors).max()), 1e-12)
            for place, bar in enumerate(bars):
                axes.text(bar.value + errors[place] + 0.02 * reach, place, f"{bar.value:.4g}", va="center")
            axes.set_yticks(places, [b.label for b in bars])
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_xlim(0, 1.15 * reach)
            axes.set_xlabel(title)

    return _save(path, draw, (6.0 * len(panels), 1.4 + 0.45 * tallest))


def smooth(values: np.ndarray) -> np.ndarray:
    """Bias-corrected exponential mean of `values [n]`, half-life max(1, HALF_LIFE * n) records."""
    keep = 0.5 ** (1 / max(1.0, HALF_LIFE * len(values)))
    result = np.empty(len(values), dtype=np.float64)
    mean = weight = 0.0
    for i, value in enumerate(values):
        mean = keep * mean + (1 - keep) * float(value)
        weight = keep * weight + (1 - keep)
        result[i] = mean / weight
    return result


def _limits(curves: Sequence[np.ndarray]) -> tuple[float, float]:
    """The y range of the smoothed curves without their first 1 %, and a little more: the first steps of random
    weights would flatten all the rest."""
    shown = np.concatenate([c[len(c) // 100 :] for c in curves])
    low, high = float(shown.min()), float(shown.max())
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _save(path: Path, draw: Any, size: tuple[float, float]) -> Path:
    """Draw on a fresh Agg figure and write it, whole or absent."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with matplotlib.rc_context(RC):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(temporary, dpi=DPI, format="png")
    publish(temporary, path)
    return path
