"""A table of GLUE figures: a row per backbone, a column per task, and their average.

The average over tasks is unweighted, as in the reference. Tasks share no rows, so errors add in squares.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.common.files import canonical_json, write_atomic
from kd.common.shown_text import for_markdown
from kd.evaluation.merged.glue_figures import GLUE_METRICS, Score, Scores


@dataclass(frozen=True)
class GlueTable:
    """Figures of several backbones on several tasks."""

    title: str
    """Heading of the labels: scaling, method or backbone."""
    tasks: tuple[str, ...]
    rows: Mapping[str, Mapping[str, Scores]]
    """Label -> task -> figures."""

    def average(self, label: str, metric: str = "accuracy") -> Score:
        """The unweighted mean over the tasks of one row."""
        scores = [self.rows[label][task][metric] for task in self.tasks]
        errors = [score.stderr for score in scores if score.stderr is not None]
        error = math.sqrt(sum(e * e for e in errors)) / len(scores) if len(errors) == len(scores) else None
        return Score(sum(s.value for s in scores) / len(scores), error, sum(s.n for s in scores))

    @property
    def best(self) -> str:
        """The label with the highest average accuracy; the first of several that are equal."""
        return max(self.rows, key=lambda label: self.average(label).value)

    def report(self, label: str) -> dict[str, Any]:
        """One row in the shape of the reference's reports, with standard errors and numbers of rows added."""
        tasks = {
            task: {name: s.value for name, s in self.rows[label][task].items()}
            | {f"{name}_stderr": s.stderr for name, s in self.rows[label][task].items()}
            | {"n": self.rows[label][task]["accuracy"].n}
            for task in self.tasks
        }
        accuracy = self.average(label)
        average = {
            "accuracy": accuracy.value,
            "loss": self.average(label, "loss").value,
            "accuracy_stderr": accuracy.stderr,
        }
        return tasks | {"average": average}

    def to_dict(self) -> dict[str, Any]:
        """The table as JSON holds it."""
        return {
            "title": self.title,
            "tasks": list(self.tasks),
            "best": self.best,
            "rows": {label: self.report(label) for label in self.rows},
        }

    def markdown(self) -> str:
        """Accuracy in percent with the best average in bold, then GLUE's own figures of the tasks that have one."""
        counts = ", ".join(f"{t} {next(iter(self.rows.values()))[t]['accuracy'].n:,}" for t in self.tasks)
        note = f"Accuracy in percent ± standard error; rows: {counts}."
        return "\n".join([*self._accuracies(), *self._other_figures(), "", note])

    def _accuracies(self) -> list[str]:
        lines = [_row([self.title, *self.tasks], "average"), "|---" * (len(self.tasks) + 2) + "|"]
        for label, tasks in self.rows.items():
            average = self.average(label).percent()
            average = f"**{average}**" if label == self.best and len(self.rows) > 1 else average
            lines.append(_row([label, *(tasks[t]["accuracy"].percent() for t in self.tasks)], average))
        return lines

    def _other_figures(self) -> list[str]:
        columns = [(t, m) for t in self.tasks for m in GLUE_METRICS if all(m in row[t] for row in self.rows.values())]
        if not columns:
            return []
        return [
            "",
            _row([self.title, *(f"{t} {m}" for t, m in columns)]),
            "|---" * (len(columns) + 1) + "|",
            *(_row([label, *(tasks[t][m].percent() for t, m in columns)]) for label, tasks in self.rows.items()),
        ]

    def save(self, folder: Path, name: str) -> None:
        """Write `NAME.json` and `NAME.md`."""
        write_atomic(folder / f"{name}.json", canonical_json(self.to_dict()))
        write_atomic(folder / f"{name}.md", self.markdown() + "\n")


def _row(cells: Sequence[str], *marked: str) -> str:
    """A row of a Markdown table; `marked` cells hold markup of ours."""
    return f"| {' | '.join([*map(for_markdown, cells), *marked])} |"
