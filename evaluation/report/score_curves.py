"""Students' scores during training, read from `evaluations.jsonl`: one panel per metric.

The dashed line is the score before the first step. A curve that stays on it shows that the student learned nothing that
the task measures. Bars are one standard error over examples. Every step is scored on the same examples, so differences
along a curve are more certain than its bars suggest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd.common.errors import DataError
from kd.evaluation.report.comparison import value_with_error
from kd.evaluation.report.figures import Curve, draw_progress
from kd.evaluation.report.page import Section, Table
from kd.evaluation.report.pairs import Arm
from kd.evaluation.tasks.agreement_task import figures_now
from kd.student_trainer.run_folder import EVALUATIONS, is_run, read_evaluations, read_run

PICTURE = "progress.png"
SHOWN = (
    "perplexity",
    "kl",
    "kl_kept",
    "top1_agreement",
    "accuracy",
    "exact_match",
    "f1",
    "rougeL",
    "coverage",
    "bleu",
    "acc_norm_nanogpt",
    "acc_norm_harness",
)
"""Metrics that get a panel."""
NOTE = (
    "Scores while the students learn; the dashed line is the score before the first step. Bars are one standard error; "
    "every step is asked the same examples. Students over several seeds are one curve: their mean, and its error over seeds."
)


def progress_sections(folders: Sequence[Path], arms: Sequence[Arm], out: Path) -> list[Section]:
    """The sections of a report on runs that were scored while they learned, picture and figures; none where no run was."""
    panels = {title: over_seeds(curves, arms) for title, curves in curves_of(folders).items()}
    if not panels:
        return []
    picture = Section("Progress", image=draw_progress(out / PICTURE, panels), note=NOTE)
    return [picture, *(Section(f"Progress, {title}", table=_table(c), folded=True) for title, c in panels.items())]


def curves_of(folders: Sequence[Path]) -> dict[str, list[Curve]]:
    """Panel title -> curves, of the run directories among `folders`; runs of one name are numbered."""
    panels: dict[str, list[Curve]] = {}
    names: dict[str, int] = {}
    for folder in folders:
        records = _records(folder)
        if not records:
            continue
        wanted = str((read_run(folder) if is_run(folder) else {}).get("name") or folder.name)
        names[wanted] = names.get(wanted, 0) + 1
        name = wanted if names[wanted] == 1 else f"{wanted} ({names[wanted]})"
        for (task, metric), about in _metrics(records).items():
            points = [
                (r["step"], f["value"], f["stderr"])
                for r in records
                if (f := r["tasks"].get(task, {}).get(metric)) and f["value"] is not None
            ]
            steps, values, errors = (
                np.array([np.nan if v is None else v for v in part], dtype=np.float64)
                for part in zip(*points, strict=True)
            )
            title = f"{task}: {about['title']} [{about['unit']}]"
            panels.setdefault(title, []).append(Curve(name, steps, values, errors))
    return panels


def over_seeds(curves: Sequence[Curve], arms: Sequence[Arm]) -> list[Curve]:
    """One curve per arm where its seeds were scored at the same steps, their mean with its standard error; else one per run."""
    arm_of = {model: arm.name for arm in arms for model in arm.models.values() if len(arm.models) > 1}
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(arm_of.get(curve.label, curve.label), []).append(curve)
    drawn: list[Curve] = []
    for name, group in groups.items():
        if len(group) > 1 and all(np.array_equal(curve.steps, group[0].steps) for curve in group):
            values = np.stack([curve.values for curve in group])
            errors = values.std(axis=0, ddof=1) / len(group) ** 0.5
            drawn.append(Curve(name, group[0].steps, values.mean(axis=0), errors))
        else:
            drawn += group
    return drawn


def _table(curves: Sequence[Curve]) -> Table:
    """Scores by step, a column per curve; an empty cell where a run was not scored at a step."""
    of_curves = [
        {
            int(step): "not finite" if np.isnan(value) else value_with_error(value, None if np.isnan(error) else error)
            for step, value, error in zip(curve.steps, curve.values, curve.errors, strict=True)
        }
        for curve in curves
    ]
    steps = sorted({step for cells in of_curves for step in cells})
    rows = [[f"{step:,}", *(cells.get(step, "") for cells in of_curves)] for step in steps]
    return Table(["step", *(curve.label for curve in curves)], rows)


def _records(folder: Path) -> list[dict[str, Any]]:
    try:
        by_step = {int(r["step"]): _named_now(r) for r in read_evaluations(folder) if isinstance(r["tasks"], dict)}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "a line of scores cannot be read",
            where=folder / EVALUATIONS,
            found=f"{type(error).__name__}: {error}",
        ) from error
    return [by_step[step] for step in sorted(by_step)]


def _named_now(record: dict[str, Any]) -> dict[str, Any]:
    """A line of scores, also of an earlier release: it had one name for divergences from a cache and from a teacher at hand."""
    tasks = record["tasks"]
    if "agreement" not in tasks:
        return record
    figures = figures_now(tasks["agreement"], record.get("settings", {}).get("agreement", {}))
    return record | {"tasks": tasks | {"agreement": figures}}


def _metrics(records: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    """(task, metric) -> its title and unit, of metrics that are drawn and have a finite value."""
    return {
        (task, metric): figure
        for record in records
        for task, metrics in record["tasks"].items()
        for metric, figure in metrics.items()
        if metric in SHOWN and figure["value"] is not None
    }
