"""The final table of merged classifiers (system 003): a row per method, a column per GLUE task, and their average.

It is read from the folders that `kd merge` and `kd classify matrix` write. The matrix gives the first rows: the most frequent
class, the base, and each task's own backbone. A sweep gives one row, that of the scaling that was chosen, and a table of its
own with every scaling. Pools of other tasks make tables of their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.common.errors import DataError
from kd.common.files import read_object
from kd.evaluation.report.page import Section, Table

MERGE, MATRIX = "merge.json", "matrix.json"
OWN = "fine-tuned, own backbone"
"""Row of the models before they are merged: each task's own."""
BASE = "_pretrained_"
"""Row of a matrix that is the base, which the models were made from."""
HALF = "dev-half"

Figures = Mapping[str, Mapping[str, float | None]]
"""Task -> accuracy, and accuracy_stderr where it is known."""


@dataclass(frozen=True)
class MergedRow:
    """One method."""

    label: str
    figures: Figures
    is_merged: bool = True
    """Whether one backbone serves all tasks, so that the row competes for the best average."""


@dataclass(frozen=True)
class MergedFolder:
    """What one folder holds."""

    tasks: tuple[str, ...]
    rows: tuple[MergedRow, ...]
    title: str
    """Heading of the folder's own table."""
    whole: Mapping[str, Figures]
    """Label -> figures of every row of the folder's own table; empty where it has one row."""
    remark: str = ""
    is_matrix: bool = False


def is_merged(folder: Path) -> bool:
    """Whether a folder holds a merge or a matrix of classifiers."""
    return (folder / MERGE).is_file() or (folder / MATRIX).is_file()


def read_merged(folder: Path) -> MergedFolder:
    """The figures of a merge or a matrix. Raises DataError for a file of something else, and for a merge without scores."""
    path = folder / (MATRIX if (folder / MATRIX).is_file() else MERGE)
    document = read_object(path)
    try:
        return _matrix(document) if path.name == MATRIX else _merge(document, path)
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError("this is no table of merged classifiers", where=path, found=f"no {error}") from error


def merged_sections(folders: Sequence[MergedFolder]) -> list[Section]:
    """The final table of each set of tasks, then the tables of the matrix and of the sweeps."""
    sections = []
    for tasks in dict.fromkeys(folder.tasks for folder in folders):
        inside = sorted((f for f in folders if f.tasks == tasks), key=lambda f: not f.is_matrix)
        rows = [row for folder in inside for row in folder.rows]
        note = [
            "Accuracy in percent on the dev rows ± standard error. Bold: the best average of one backbone for all tasks."
        ]
        note += [folder.remark for folder in inside if folder.remark]
        sections.append(Section("Methods", table=_table("method", tasks, rows), note=" ".join(note)))
        for folder in inside:
            if folder.whole:
                every = [MergedRow(label, figures) for label, figures in folder.whole.items()]
                sections.append(Section(folder.title, table=_table("", tasks, every), folded=len(every) > 12))
    return sections


def _matrix(document: Mapping[str, Any]) -> MergedFolder:
    tasks, table = tuple(document["tasks"]), document["rows"]
    outside = sorted((name for name in table if name not in tasks), key=lambda name: name == BASE)
    labels = {BASE: "base, not fine-tuned"}
    rows = [MergedRow(labels.get(name, name), table[name], is_merged=False) for name in outside]
    if all(task in table for task in tasks):
        rows.append(MergedRow(OWN, {task: table[task][task] for task in tasks}, is_merged=False))
    whole = {labels.get(name, name): table[name] for name in (*outside, *(task for task in tasks if task in table))}
    return MergedFolder(tasks, tuple(rows), "Every backbone under every head", whole, is_matrix=True)


def _merge(document: Mapping[str, Any], path: Path) -> MergedFolder:
    result = document["result"]
    table, method, scaling = result["table"], str(result["method"]), result["scaling"]
    if table is None:
        raise DataError("a merge without scores has no row", where=path, try_="kd merge without --no-score")
    tasks, rows = tuple(table["tasks"]), table["rows"]
    if document["select_on"] is None:
        label = method if scaling is None else f"{method}, λ = {scaling:g}"
        return MergedFolder(tasks, (MergedRow(label, next(iter(rows.values()))),), "", {})
    label = f"{method}, λ = {scaling:g}"
    chosen_on = "the even dev rows" if document["select_on"] == HALF else "the rows that it is scored on here"
    remark = f"The λ of {method} is the best of {len(rows)} on {chosen_on}."
    every = {label: rows[label] for label in sorted(rows, key=float)}
    return MergedFolder(tasks, (MergedRow(label, rows[f"{scaling:g}"]),), f"Sweep of {method}", every, remark)


def _table(first: str, tasks: Sequence[str], rows: Sequence[MergedRow]) -> Table:
    averages = [_average(row.figures, tasks) for row in rows]
    cells = [
        [
            row.label,
            *(_percent(row.figures[t]["accuracy"], row.figures[t].get("accuracy_stderr")) for t in tasks),
            _percent(*a),
        ]
        for row, a in zip(rows, averages, strict=True)
    ]
    competing = [i for i, row in enumerate(rows) if row.is_merged]
    best = max(competing, key=lambda i: averages[i][0], default=None)
    marked = frozenset() if best is None or len(competing) < 2 else frozenset({(best, len(tasks) + 1)})
    return Table([first, *tasks, "average"], cells, marked)


def _average(figures: Figures, tasks: Sequence[str]) -> tuple[float, float | None]:
    """The unweighted mean; tasks share no rows, so errors add in squares."""
    values = [float(figures[task]["accuracy"] or 0.0) for task in tasks]
    errors = [e for task in tasks if (e := figures[task].get("accuracy_stderr")) is not None]
    error = math.sqrt(sum(e * e for e in errors)) / len(tasks) if len(errors) == len(tasks) else None
    return sum(values) / len(values), error


def _percent(value: float | None, error: float | None) -> str:
    shown = "–" if value is None else f"{100 * value:.1f}"
    return shown if error is None else f"{shown} ± {100 * error:.1f}"
