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
from kd.evaluation.tasks.lm_eval_task import PREFIX
from kd.evaluation.tasks.template_scores import BEST
from kd.evaluation.unseen_tasks import MARK

CHIEF = {
    "perplexity": ("perplexity", "bits_per_byte"),
    "agreement": ("kl", "kl_kept"),
    "choices": ("accuracy", "accuracy_original", "accuracy_flan", f"accuracy{BEST}"),
    "hellaswag": ("acc_norm_nanogpt", "acc_norm_harness"),
    "samples": (),
}
"""Task -> its metrics in the table. Of a task that is not here, the table shows the first metric that says which way is
better."""
ANSWERS = ("squad_f1", "rougeL", "rougeLsum", "coverage", "bleu", "bertscore", "rouge1", "squad_em")
"""Metrics of `generation` in order of preference. A task has a column for each kind that it was scored with; the first of them
counts."""
KINDS = {"squad_em": "squad", "squad_f1": "squad", "rougeL": "rouge", "rougeLsum": "rouge", "rouge1": "rouge"}
"""Metric -> its kind, of which a task has one column; other metrics are a kind of their own."""
PLAIN_ANSWER = "exact_match"
"""Metric of a task without any of these."""
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
    """The columns of all comparisons, and their mean where at least two are shares.

    Questions that were answered by rank and in words count once, by rank.
    """
    harness = any("acc_norm_harness" in c.metrics for c in comparisons)  # of two protocols one counts
    columns = [
        replace(column, counts=False) if harness and column.parts[0][1] == "acc_norm_nanogpt" else column
        for c in comparisons
        for column in _columns(c)
    ]
    ranked = {asked for c in columns for asked in _asked(c, "choices")}
    columns = [replace(c, counts=False) if _asked(c, "generation") & ranked else c for c in columns]
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
        metrics = [(m, number == 0) for of_task in _answers(there) for number, m in enumerate(of_task)]
        metrics += [(m, False) for m in there if m == f"exact_match{BEST}"]
        return [replace(_column(comparison, m), counts=counts) for m, counts in metrics]
    chief = [m for m in CHIEF.get(comparison.task, ()) if m in there]
    if not chief and comparison.task not in CHIEF:
        chief = [m for m in there if "/" not in m and _better(comparison, m)][:1]
    columns = []
    for metric in chief:
        whole = comparison.task.startswith(PREFIX) or BEST in metric
        parts = [] if whole else [m for m in there if m.startswith(f"{metric}/")]
        counts = metric == chief[0] and comparison.task not in UNCOUNTED
        columns += [replace(_column(comparison, m), counts=counts) for m in (parts if len(parts) > 1 else [metric])]
    return columns


def _answers(there: Sequence[str]) -> list[list[str]]:
    """The metrics of each task of a text of generated answers, or of the text where it is one task; the chief one first."""
    tasks = list(dict.fromkeys(m.partition("/")[2] for m in there if "/" in m))
    suffixes = [f"/{task}" for task in tasks] if len(tasks) > 1 else [""]
    return [metrics for suffix in suffixes if (metrics := _of_kinds(there, suffix))]


def _of_kinds(there: Sequence[str], suffix: str) -> list[str]:
    """One metric of each kind that a task was scored with; the exact match where there is none."""
    by_kind: dict[str, str] = {}
    for metric in ANSWERS:
        if f"{metric}{suffix}" in there:
            by_kind.setdefault(KINDS.get(metric, metric), f"{metric}{suffix}")
    plain = f"{PLAIN_ANSWER}{suffix}"
    return list(by_kind.values()) or ([plain] if plain in there else [])


def _asked(column: Column, task: str) -> set[tuple[str, str]]:
    """The text and its tasks that a column of `choices` or `generation` stands for; empty for other columns."""
    comparison, metric = column.parts[0]
    if comparison.task != task:
        return set()
    base, slash, part = metric.partition("/")
    names = [part] if slash else [m.partition("/")[2] for m in comparison.metrics if m.startswith(f"{base}/")]
    text = str(comparison.entries[0].report.settings[task].get("text_digest"))
    return {(text, name) for name in names or [""]}


def _column(comparison: Comparison, metric: str) -> Column:
    about = next(f for e in comparison.entries if (f := comparison.figure(e, metric)))
    harness = f": {comparison.task.removeprefix(PREFIX)}" if comparison.task.startswith(PREFIX) else ""
    return Column(f"{about['title']}{harness}", ((comparison, metric),))


def _condition(column: Column) -> str:
    """What tells a column from others of the same title: the temperature of a divergence, else the text."""
    ((comparison, _),) = column.parts
    temperature = comparison.entries[0].report.settings[comparison.task].get("temperature")
    return comparison.title.partition(": ")[2] if temperature is None else f"T = {temperature:g}"


def _better(comparison: Comparison, metric: str) -> bool:
    return any(comparison.figure(e, metric).get("better") in ARROWS for e in comparison.entries)


def _figure(comparison: Comparison, metric: str, model: str) -> dict[str, Any]:
    return next((comparison.figure(e, metric) for e in comparison.entries if e.name == model), {})
