"""The outcome of a sweep, cluster by cluster: a table and a curve for each evaluation, as FLAN shows its ablations.

A figure of a cluster is the mean over its tasks, each counted alike; the last column is the mean over clusters. ± is one standard
error, over seeds and over rows; a row counts once, however many templates it is asked in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd.common.shown_text import for_figure
from kd.data.instruction_tasks.mixing.rendered_mixture import clusters_of_name
from kd.evaluation.report.columns import CHIEF, Column
from kd.evaluation.report.comparison import Comparison, compare, value_with_error
from kd.evaluation.report.differences import Figure
from kd.evaluation.report.figures import COLOURS, panels_of, save_figure
from kd.evaluation.report.page import Section, Table
from kd.evaluation.report.pairs import Arm, arms_of
from kd.evaluation.report.reference import Reference, reference_of
from kd.evaluation.report.runs import collect_runs
from kd.evaluation.tasks.template_scores import BEST

PICTURE = "sweep.png"
MEAN = "mean of clusters"
METRICS = (*CHIEF["choices"][:1], "exact_match")
"""Metrics of which a sweep is drawn; each is a share."""
NOTE = (
    "Each arm of the sweep on the tasks of each cluster: means over tasks, templates and seeds. Whiskers and ± are one standard "
    "error, over seeds and over rows."
)


def sweep_sections(inputs: Sequence[Path], names: Sequence[str], out: Path) -> list[Section]:
    """Sections of a report on a sweep: a table for each evaluation, and one picture; none where no task of a cluster was scored.

    inputs   folders of the scores
    names    arms in the order of the sweep
    """
    _, entries = collect_runs(inputs)
    comparisons, arms = compare(entries), arms_of(entries)
    reference = reference_of(comparisons, arms, ())
    in_order = sorted((arm for arm in arms if arm.name in names), key=lambda arm: names.index(arm.name))
    rows = [*(arm for arm in arms if arm.name not in names), *in_order]
    panels = {
        title: columns
        for comparison in comparisons
        for metric in METRICS
        if (columns := cluster_columns(comparison, metric))
        and (title := f"{metric.replace('_', ' ')}, {comparison.title}")
    }
    if not panels:
        return []
    sections = [Section(f"Sweep, {title}", table=_table(reference, rows, columns)) for title, columns in panels.items()]
    return [*sections, Section("Sweep", image=_picture(out / PICTURE, reference, in_order, panels), note=NOTE)]


def cluster_columns(comparison: Comparison, metric: str) -> list[Column]:
    """A column for each cluster of the tasks that were scored, their mean, and the mean in the best templates where it is known."""
    clusters: dict[str, list[tuple[Comparison, str]]] = {}
    for name in comparison.metrics:
        base, _, task = name.partition("/")
        if base == metric and task:
            for cluster in sorted(clusters_of_name(task) or ()):
                clusters.setdefault(cluster, []).append((comparison, name))
    columns = [Column(cluster.replace("_", " "), tuple(parts)) for cluster, parts in clusters.items()]
    if len(columns) > 1:  # tasks are repeated so that each cluster has the same weight
        most = math.lcm(*(len(column.parts) for column in columns))
        columns.append(
            Column(MEAN, tuple(part for column in columns for part in column.parts * (most // len(column.parts))))
        )
    if columns and f"{metric}{BEST}" in comparison.metrics:
        columns.append(Column("best template", ((comparison, f"{metric}{BEST}"),)))
    return columns


def _table(reference: Reference, arms: Sequence[Arm], columns: Sequence[Column]) -> Table:
    rows = []
    for arm in arms:
        figures = [reference.figure(arm, column) for column in columns]
        seeds = f" ({len(arm.models)} seeds)" if len(arm.models) > 1 else ""
        rows.append([f"{arm.name}{seeds}", f"{arm.parameters:,}", *map(_in_words, figures)])
    return Table(["arm", "parameters", *(column.title for column in columns)], rows)


def _in_words(figure: Figure | None) -> str:
    return "–" if figure is None else value_with_error(figure.value, figure.error)


def _picture(path: Path, reference: Reference, arms: Sequence[Arm], panels: dict[str, list[Column]]) -> Path:
    """A panel per evaluation, a line per column, the arms from left to right."""

    def draw(figure: Any) -> None:
        for axes, (title, columns) in zip(panels_of(figure, len(panels)), panels.items(), strict=True):
            for number, column in enumerate(columns):
                points = [(x, f) for x, arm in enumerate(arms) if (f := reference.figure(arm, column)) is not None]
                axes.errorbar(
                    np.array([x for x, _ in points]) + 0.03 * (number - len(columns) / 2),
                    [f.value for _, f in points],
                    yerr=[f.error or 0.0 for _, f in points],
                    color=COLOURS[number % len(COLOURS)],
                    linestyle="--" if column.title == "best template" else "-",
                    linewidth=2.0 if column.title == MEAN else 1.3,
                    marker="o",
                    markersize=4,
                    capsize=3,
                    label=for_figure(column.title),
                )
            names = [for_figure(arm.name) for arm in arms]
            axes.set_xticks(range(len(arms)), names, rotation=20 if max(map(len, names)) > 8 else 0)
            axes.set_title(for_figure(title), loc="left", fontsize="small")
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False, fontsize="small")

    return save_figure(path, draw, 4.0 * len(panels))
