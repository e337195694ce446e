"""The columns of the reference table: each is one metric of one task on one text.

A *column* is the chief metric of one task on one text, or of one task of a mixture. The last column is the mean over the
columns that are shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kd.evaluation.report.comparison import ARROWS, Comparison
from kd.evaluation.unseen_tasks import MARK

CHIEF = {
    "perplexity": ("perplexity", "bits_per_byte"),
    "agreement": ("kl", "kl_kept"),
    "choices": ("accuracy", "accuracy_original", "accuracy_flan"),
    "hellaswag": ("acc_norm_nanogpt", "acc_norm_harness"),
    "samples": (),
}
"""Task -> its metrics in the table. Of a task that is not here, the table shows the first metric that says which way is
better."""
ANSWERS = ("squad_f1", "rougeL", "rougeLsum", "coverage", "bleu", "bertscore", "rouge1", "squad_em", "exact_match")
"""Metrics of `generation` in order of preference: each task of a text has one column, the first of these that it was scored
with."""
UNCOUNTED = ("agreement",)
"""Tasks that count neither for wins nor for means: closeness to the teacher is a means, not an end."""


@dataclass(frozen=True)
class Column:
    """One metric on one text, or the mean over several."""

    title: str
    parts: tuple[tuple[Comparison, str], ...]
    """Comparison and metric of each figure; several of them make a mean."""
    counts: bool = True
    """Whether the column counts for wins and means. False for a second metric of something that another column counts."""

    @property
    def better(self) -> str:
        """`lower` or `higher`."""
        return str(self._about["better"])

    @property
    def unit(self) -> str:
        """The unit of the first part."""
        return str(self._about["unit"])

    @property
    def sign(self) -> float:
        """+1 where more is better, else -1."""
        return 1.0 if self.better == "higher" else -1.0

    @property
    def is_share(self) -> bool:
        """Whether the figure lies between 0 and 1 and is better when higher, so that a mean over tasks may contain it."""
        values = [e for c, m in self.parts for entry in c.entries if (e := c.figure(entry, m).get("value")) is not None]
        return self.better == "higher" and bool(values) and all(0 <= v <= 1 for v in values)

    @property
    def _about(self) -> dict[str, Any]:
        comparison, metric = self.parts[0]
        return next(f for e in comparison.entries if (f := comparison.figure(e, metric)))

    def value(self, model: str) -> float | None:
        """The figure of one model; None where it was not measured or is not finite."""
        figures = [_figure(c, m, model) for c, m in self.parts]
        values = [f.get("value") for f in figures]
        return None if any(v is None for v in values) else float(np.mean(np.array(values, dtype=np.float64)))

    def mark(self, model: str) -> str | None:
        """`seen` or `unseen`, where it is known and the same for every part; see `kd.evaluation.unseen_tasks`."""
        marks = {_figure(c, m, model).get(MARK) for c, m in self.parts}
        return marks.pop() if len(marks) == 1 else None

    def stderr(self, model: str) -> float | None:
        """An upper bound of the standard error over documents, from the errors of the parts; None where one is unknown."""
        errors = [_figure(c, m, model).get("stderr") for c, m in self.parts]
        return None if any(e is None for e in errors) else float(np.mean(np.array(errors, dtype=np.float64)))

    def influence(self, model: str) -> dict[str, np.ndarray] | None:
        """How far each document moves the figure, by digest of the documents; None where this is unknown for a part."""
        influences: dict[str, np.ndarray] = {}
        for comparison, metric in self.parts:
            kept = next(
                (e.report.documents.get(comparison.task, {}) for e in comparison.entries if e.name == model), {}
            )
            influence = kept.get("influence", {}).get(metric)
            if influence is None:
                return None
            digest = str(kept.get("digest"))
            u = np.array(influence) / len(self.parts)
            if digest in influences and len(influences[digest]) != len(u):
                return None
            influences[digest] = influences[digest] + u if digest in influences else u
        return influences

    def comparable(self, models: Sequence[str]) -> bool:
        """Whether these models were measured alike in every part."""
        return all(c.comparable_models(models, m) for c, m in self.parts)


def columns_of(comparisons: Sequence[Comparison]) -> tuple[Column, ...]:
    """The columns of all comparisons, and their mean where at least two are shares."""
    harness = any("acc_norm_harness" in c.metrics for c in comparisons)  # of two protocols one counts
    columns = [
        replace(column, counts=False) if harness and column.parts[0][1] == "acc_norm_nanogpt" else column
        for c in comparisons
        for column in _columns(c)
    ]
    titles = [c.title for c in columns]
    columns = [replace(c, title=f"{c.title}, {_condition(c)}") if titles.count(c.title) > 1 else c for c in columns]
    shares = [c for c in columns if c.is_share and c.counts]
    if len(shares) > 1:
        columns.append(Column(f"mean of {len(shares)}", tuple(p for c in shares for p in c.parts)))
    return tuple(columns)


def _columns(comparison: Comparison) -> list[Column]:
    """The chief metrics, task by task where the text has several."""
    there = comparison.metrics
    if comparison.task == "generation":
        return [_column(comparison, m) for m in _answers(there)]
    chief = [m for m in CHIEF.get(comparison.task, ()) if m in there]
    if not chief and comparison.task not in CHIEF:
        chief = [m for m in there if "/" not in m and _better(comparison, m)][:1]
    columns = []
    for metric in chief:
        parts = [m for m in there if m.startswith(f"{metric}/")]
        counts = metric == chief[0] and comparison.task not in UNCOUNTED
        columns += [replace(_column(comparison, m), counts=counts) for m in (parts if len(parts) > 1 else [metric])]
    return columns


def _answers(there: Sequence[str]) -> list[str]:
    """One metric for each task of a text of generated answers, or one for the text where it is one task."""
    tasks = list(dict.fromkeys(m.partition("/")[2] for m in there if "/" in m))
    if len(tasks) < 2:
        return [m for m in ANSWERS if m in there][:1]
    metrics = [next((f"{m}/{task}" for m in ANSWERS if f"{m}/{task}" in there), None) for task in tasks]
    return [m for m in metrics if m is not None]


def _column(comparison: Comparison, metric: str) -> Column:
    about = next(f for e in comparison.entries if (f := comparison.figure(e, metric)))
    return Column(str(about["title"]), ((comparison, metric),))


def _condition(column: Column) -> str:
    """What tells a column from others of the same title: the temperature of a divergence, else the text."""
    ((comparison, _),) = column.parts
    temperature = comparison.entries[0].report.settings[comparison.task].get("temperature")
    return comparison.title.partition(": ")[2] if temperature is None else f"T = {temperature:g}"


def _better(comparison: Comparison, metric: str) -> bool:
    return any(comparison.figure(e, metric).get("better") in ARROWS for e in comparison.entries)


def _figure(comparison: Comparison, metric: str, model: str) -> dict[str, Any]:
    return next((comparison.figure(e, metric) for e in comparison.entries if e.name == model), {})
