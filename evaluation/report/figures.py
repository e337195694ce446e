"""The figures of a report: loss curves, bars and differences with error bars, and scores during training.

They are drawn through matplotlib's object API, without pyplot, global state or a display. A `Figure` on the Agg canvas is
a value that becomes a PNG file. The colours are those of Okabe and Ito, which most colour-blind readers can tell apart.
Runs beyond eight repeat the colours with another dash. Panels stand one above the other, so that the width of a phone is
enough. Students over several seeds are one curve: their mean, with the range of the seeds as a band.

Raw losses are drawn faint. The line over them is their mean under a two-sided exponential window with a half-life of 1 %
of the run. Training dashboards use a one-sided mean, which lags: on 2.4 + 5.3 exp(-step/150) over 2000 steps it reads up
to 0.7 nats too high. The two-sided mean is off by at most 0.06 beyond the first few records.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np

from kd.common.files import publish
from kd.common.shown_text import for_figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
DASHES = ("-", "--", ":", "-.")
HALF_LIFE = 0.01
"""Half-life of the smoothing to either side, as a share of the run's records."""
BESIDE = 24
"""Letters of the longest name, up to which a legend above curves has two names in a line."""
TITLE = 46
"""Letters of a line of a panel's title."""
DPI, WIDTH = 200, 5.5
"""Dots per inch, inches: letters of 10 points are still 8 pixels high where a phone shrinks the picture to its width."""


@dataclass(frozen=True)
class Series:
    """One run's values of one quantity."""

    label: str
    steps: np.ndarray
    """[n] optimiser steps, ascending"""
    values: np.ndarray
    """[n] nats per token"""
    seeds: tuple[np.ndarray, ...] = ()
    """[n] values of every seed, where `values` is their mean; else empty."""


@dataclass(frozen=True)
class Bar:
    """One model's value of one metric."""

    label: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class Delta:
    """What a pair gained in one column; positive is better."""

    label: str
    """Name of the column."""
    other: str
    baseline: str
    gain: float
    error: float | None
    by_seed: tuple[float, ...] = ()
    """Gain of each seed; several are drawn as dots."""


def draw_losses(path: Path, panels: Mapping[str, Sequence[Series]], order: Sequence[str] = ()) -> Path:
    """Write one panel per quantity: the key is the y axis' label with its unit. Returns `path`.

    order   names whose colours come first, so that a model has one colour in all pictures
    """
    order = list(dict.fromkeys([*order, *(s.label for series in panels.values() for s in series)]))

    def draw(figure: Any) -> None:
        drawn = zip(panels_of(figure, len(panels)), panels.items(), strict=True)
        for axes, (title, series) in drawn:
            for one in series:
                index = order.index(one.label)
                look = {
                    "color": COLOURS[index % len(COLOURS)],
                    "linestyle": DASHES[index // len(COLOURS) % len(DASHES)],
                }
                if one.seeds:
                    calm = np.stack([smooth(values) for values in one.seeds])
                    axes.fill_between(one.steps, calm.min(0), calm.max(0), color=look["color"], alpha=0.15, linewidth=0)
                else:
                    axes.plot(one.steps, one.values, alpha=0.2, linewidth=0.8, **look)
                axes.plot(one.steps, smooth(one.values), linewidth=1.8, label=for_figure(one.label), **look)
            axes.set_xlabel("optimiser step")
            axes.set_ylabel(for_figure(title))
            axes.set_ylim(*_limits([smooth(s.values) for s in series]))
        entries = {
            label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(entries.values(), entries, loc="outside upper left", ncols=beside, frameon=False)

    names = {for_figure(s.label) for series in panels.values() for s in series}
    beside = 2 if max(map(len, names), default=0) <= BESIDE else 1
    return save_figure(path, draw, 3.1 * len(panels) + 0.25 * -(-len(names) // beside))


def draw_bars(
    path: Path, panels: Mapping[str, Sequence[Bar]], order: Sequence[str] = (), *, longest: float = math.inf
) -> Path:
    """Write one panel of horizontal bars per metric, from 0: the key is its title with unit; `order` as above.

    longest   bars end there, those that go on with an arrow: one that is far longer than the rest would hide them
    """
    order = list(dict.fromkeys([*order, *(b.label for bars in panels.values() for b in bars)]))
    heights = [0.9 + 0.4 * len(bars) for bars in panels.values()]

    def draw(figure: Any) -> None:
        for axes, (title, bars) in zip(panels_of(figure, len(panels), heights), panels.items(), strict=True):
            places = np.arange(len(bars))
            values = np.array([b.value for b in bars])
            errors = np.array([b.stderr or 0.0 for b in bars])
            colours = [COLOURS[order.index(b.label) % len(COLOURS)] for b in bars]
            axes.barh(places, np.minimum(values, longest), height=0.6, color=colours, alpha=0.85)
            known = np.array([b.stderr is not None for b in bars])
            axes.errorbar(values[known], places[known], xerr=errors[known], fmt="none", ecolor="#222222", capsize=3)
            ends = np.minimum(values + errors, longest)
            reach = max(float(ends.max()), 1e-12)
            for row, bar in enumerate(bars):
                on = " →" if bar.value > longest else ""
                axes.text(ends[row] + 0.02 * reach, row, f"{bar.value:.4g}{on}", va="center")
            axes.set_yticks(places, [for_figure(_short(b.label)) for b in bars])
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_xlim(0, 1.15 * reach)
            axes.set_title(for_figure(title), loc="left", fontsize="medium")

    return save_figure(path, draw, sum(heights))


def draw_deltas(path: Path, panels: Mapping[str, Sequence[Delta]], order: Sequence[str] = ()) -> Path:
    """Write one panel per unit: a band per column, a mark per pair, whiskers of one error; right of 0 is better.

    A panel of one column has a row for each pair instead, which names it.

    order   as above
    """
    pairs = list(dict.fromkeys((d.other, d.baseline) for deltas in panels.values() for d in deltas))
    order = list(dict.fromkeys([*order, *(other for other, _ in pairs)]))
    columns = [list(dict.fromkeys(d.label for d in deltas)) for deltas in panels.values()]
    space = 0.16 * len(pairs) + 0.24
    heights = [1.0 + (space * len(labels) if len(labels) > 1 else 0.3 * len(pairs)) for labels in columns]
    same = pairs[0][1] if len({baseline for _, baseline in pairs}) == 1 else None
    legend = any(len(labels) > 1 for labels in columns)

    def draw(figure: Any) -> None:
        drawn = zip(panels_of(figure, len(panels), heights), panels.items(), strict=True)
        for number, (axes, (title, deltas)) in enumerate(drawn):
            axes.axvline(0, color="#5b6472", linewidth=1)
            alone = len(columns[number]) == 1
            for d in deltas:
                position = pairs.index((d.other, d.baseline))
                row = columns[number].index(d.label)
                height = float(position) if alone else row + (position - (len(pairs) - 1) / 2) * 0.7 / len(pairs)
                colour = COLOURS[order.index(d.other) % len(COLOURS)]
                axes.errorbar(d.gain, height, xerr=d.error, fmt="o", color=colour, markersize=6, capsize=3, zorder=3)
                if len(d.by_seed) > 1:
                    axes.plot(d.by_seed, [height] * len(d.by_seed), "|", color=colour, markersize=7, alpha=0.6)
            names = columns[number]
            if alone:  # the title says which column it is
                names = [other if same is not None else f"{other} – {baseline}" for other, baseline in pairs]
                title = title if same is None else f"{title}, against {same}"
            else:
                axes.grid(visible=False, axis="y")
                for band in range(0, len(names), 2):
                    axes.axhspan(band - 0.5, band + 0.5, color="#f1f3f6", zorder=0)
            axes.set_yticks(range(len(names)), [for_figure(_short(name)) for name in names])
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_title("\n".join(wrap(for_figure(title), TITLE)), loc="left", fontsize="medium")
            if number == 0 and legend:
                from matplotlib.lines import Line2D

                marks = [
                    Line2D(
                        [],
                        [],
                        color=COLOURS[order.index(other) % len(COLOURS)],
                        marker="o",
                        linestyle="",
                        label=for_figure(f"{other} against {baseline}"),
                    )
                    for other, baseline in pairs
                ]
                figure.legend(handles=marks, loc="outside upper left", frameon=False)

    return save_figure(path, draw, sum(heights) + (0.3 * len(pairs) if legend else 0.0))


def smooth(values: np.ndarray) -> np.ndarray:
    """Mean of `values [n]` around each record, weights halving every max(1, HALF_LIFE * n) records to either side."""
    keep = 0.5 ** (1 / max(1.0, HALF_LIFE * len(values)))
    counted = np.stack([np.asarray(values, dtype=np.float64), np.ones(len(values))])
    total, weight = _decaying_sum(counted, keep) + _decaying_sum(counted[:, ::-1], keep)[:, ::-1] - counted
    return np.asarray(total / weight)


def _decaying_sum(values: np.ndarray, keep: float) -> np.ndarray:
    """`result[:, i] = values[:, i] + keep * result[:, i - 1]`."""
    result = values.copy()
    for i in range(1, values.shape[1]):
        result[:, i] += keep * result[:, i - 1]
    return result


def _limits(curves: Sequence[np.ndarray]) -> tuple[float, float]:
    """The y range of the smoothed curves without their first 1 %, and a little more: the first steps of random
    weights would flatten all the rest."""
    shown = np.concatenate([c[len(c) // 100 :] for c in curves])
    low, high = float(shown.min()), float(shown.max())
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _short(label: str) -> str:
    """Names that would take more than a third of the picture lose their middle."""
    return label if len(label) <= 24 else f"{label[:11]}…{label[-12:]}"


def panels_of(figure: Any, count: int, heights: Sequence[float] | None = None) -> list[Any]:
    """The axes of panels one above the other, as high as their share of `heights`: no box, a light grid behind the data."""
    panels = list(figure.subplots(count, 1, squeeze=False, height_ratios=heights)[:, 0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e3e6ea")
        axes.set_axisbelow(True)
    return panels


def save_figure(path: Path, draw: Any, height: float, *, width: float = WIDTH) -> Path:
    """Draw on a fresh Agg figure of `width` by `height` inches and write it, whole or absent."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    draw(figure)
    figure.savefig(temporary, dpi=DPI, format="png")
    publish(temporary, path)
    return path


@dataclass(frozen=True)
class Curve:
    """One run's scores in one metric."""

    label: str
    steps: np.ndarray
    """[n] optimiser steps, ascending; the first is 0 where there is a baseline"""
    values: np.ndarray
    """[n] in the metric's unit"""
    errors: np.ndarray
    """[n] standard errors, NaN where unknown"""

    @property
    def baseline(self) -> float | None:
        """The score before the first step."""
        return float(self.values[0]) if self.steps[0] == 0 else None


def draw_progress(path: Path, panels: Mapping[str, Sequence[Curve]]) -> Path:
    """Write one panel per metric: a curve per run with its errors, its baseline as a dashed line. Returns `path`.

    A panel whose largest value is over ten times its smallest has a logarithmic axis, or what follows the first step is a line.
    """
    order = list(dict.fromkeys(c.label for curves in panels.values() for c in curves))

    def draw(figure: Any) -> None:
        for number, (title, curves) in enumerate(panels.items()):
            axes = figure.add_subplot(len(panels), 1, number + 1)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#e3e6ea")
            for curve in curves:
                index = order.index(curve.label)
                colour = COLOURS[index % len(COLOURS)]
                axes.errorbar(
                    curve.steps,
                    curve.values,
                    yerr=np.nan_to_num(curve.errors),
                    color=colour,
                    capsize=2,
                    linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
                    marker="o",
                    markersize=3.5,
                    linewidth=1.5,
                    label=for_figure(curve.label),
                )
                if curve.baseline is not None:
                    axes.axhline(curve.baseline, color=colour, linestyle=(0, (4, 4)), linewidth=1.0, alpha=0.7)
            axes.set_xlabel("optimiser step")
            axes.set_title(for_figure(title), loc="left", fontsize="medium")
            values = np.concatenate([c.values for c in curves])
            if np.nanmin(values) > 0 and np.nanmax(values) > 10 * np.nanmin(values):
                axes.set_yscale("log")
            if number == 0 or {c.label for c in curves} != {c.label for c in next(iter(panels.values()))}:
                beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(curves) > 6 else {"loc": "best"}
                axes.legend(frameon=False, **beside)

    return save_figure(path, draw, 3.0 * len(panels))
