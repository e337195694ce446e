"""The pictures of a report: loss curves, bars of metrics, and what each kind of student gained on its partner.

Students over several seeds are one curve and one bar. `figures` draws; here is decided what is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd.evaluation.report.columns import Column
from kd.evaluation.report.comparison import Comparison
from kd.evaluation.report.figures import Bar, Delta, Series, draw_bars, draw_deltas, draw_losses
from kd.evaluation.report.pairs import Arm
from kd.evaluation.report.reference import Reference
from kd.evaluation.report.runs import Run

LOSSES = {"ce": "cross-entropy (nats per token)", "kd": "distillation loss (nats per token)"}
"""Key of a step record -> label of its axis; `loss` is drawn only where a run has neither."""
BARS = (
    "perplexity",
    "kl",
    "kl_kept",
    "top1_agreement",
    "accuracy",
    "exact_match",
    "acc_norm_nanogpt",
    "acc_norm_harness",
)
"""Metrics that get a panel of bars."""


def loss_picture(path: Path, runs: Sequence[Run], reference: Reference) -> Path | None:
    """Loss curves of the runs, one panel per kind of loss; None where no run logged one."""
    arms = reference.arms
    panels = {label: _curves(runs, arms, key) for key, label in LOSSES.items()}
    plain = [run for run in runs if all(run.series(key) is None for key in LOSSES)]
    panels["training loss (nats per token)"] = _curves(plain, arms, "loss")
    drawn = {label: series for label, series in panels.items() if series}
    return draw_losses(path, drawn, _order(reference)) if drawn else None


def metrics_picture(path: Path, comparisons: Sequence[Comparison], reference: Reference) -> Path | None:
    """Bars of the metrics in `BARS`, one panel per metric and task; None where there are none."""
    panels: dict[str, list[Bar]] = {}
    for comparison in comparisons:
        for metric in BARS:
            if metric not in comparison.metrics:
                continue
            column = Column(metric, ((comparison, metric),))
            figures = [(arm.name, reference.figure(arm, column)) for arm in reference.rows]
            bars = [Bar(name, f.value, f.error) for name, f in figures if f is not None]
            if bars:
                about = next(f for e in comparison.entries if (f := comparison.figure(e, metric)))
                panels[f"{about['title']} [{about['unit']}]  {comparison.title.partition(': ')[2]}"] = bars
    return draw_bars(path, panels, _order(reference)) if panels else None


def gains_picture(path: Path, reference: Reference) -> Path | None:
    """Gains of each pair: shares in one panel, in percentage points, every other metric in one of its own; None without pairs."""
    panels: dict[str, list[Delta]] = {}
    for pair in reference.pairs:
        for d in reference.differences(pair):
            share = d.column.is_share
            scale = 100.0 if share else 1.0
            title = "gain [percentage points]" if share else f"gain in {d.column.title} [{d.column.unit}]"
            gains = tuple(scale * d.column.sign * x for x in d.by_seed)
            error = None if d.error is None else scale * d.error
            panels.setdefault(title, []).append(
                Delta(d.column.title, pair.other.name, pair.baseline.name, scale * d.gain, error, gains)
            )
    return draw_deltas(path, panels, _order(reference)) if panels else None


def _curves(runs: Sequence[Run], arms: Sequence[Arm], key: str) -> list[Series]:
    """One curve per arm where its seeds logged the same steps, else one per run."""
    arm_of = {model: arm.name for arm in arms for model in arm.models.values() if len(arm.models) > 1}
    groups: dict[str, list[Series]] = {}
    for run in runs:
        if (series := run.series(key)) is not None:
            groups.setdefault(arm_of.get(run.name, run.name), []).append(series)
    curves = []
    for name, group in groups.items():
        if len(group) > 1 and all(np.array_equal(s.steps, group[0].steps) for s in group):
            values = tuple(s.values for s in group)
            curves.append(Series(name, group[0].steps, np.mean(values, axis=0), values))
        else:
            curves += group
    return curves


def _order(reference: Reference) -> list[str]:
    """Names in the order of their colours: the same in all pictures."""
    return [arm.name for arm in reference.rows]
