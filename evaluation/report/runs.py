"""Find what a report is made of in its input folders: training runs, evaluations, or both.

    run.json  metrics.jsonl      a training run (`kd train --out`); one JSON object per logged step
    eval.json                    an evaluation (`kd eval --out`), in the folder itself or, of a run, in `eval`, `eval-2`, …
    0-NAME  1-NAME  …            evaluations of several models at once

A run that is not finished or was killed can be read. A last line that was cut off is left out. A step that was logged
twice counts once, with its later record.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kd.common.errors import DataError
from kd.common.paths import as_path
from kd.evaluation.report.comparison import Entry, short_name
from kd.evaluation.report.figures import Series, smooth
from kd.evaluation.results import EVAL, EvalReport, load_report, numbered
from kd.student_trainer.run_folder import METRICS, RUN, is_run, read_log, read_run


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str
    facts: dict[str, Any]
    """`run.json`: student, loss, teacher, cache_fingerprint, settings. An unfinished run has its `identity` alone."""
    records: tuple[dict[str, Any], ...]
    """Lines of `metrics.jsonl` by ascending step."""

    def fact(self, key: str) -> Any:
        """A fact of `run.json`, or of its `identity` while the run is unfinished; None where it says nothing."""
        return fact(self.facts, key)

    def series(self, key: str) -> Series | None:
        """Finite values of one key over the steps; None where there are none."""
        points = [(r["step"], r[key]) for r in self.records if is_number(r.get(key))]
        if not points:
            return None
        steps, values = zip(*points, strict=True)
        return Series(self.name, np.array(steps), np.array(values, dtype=np.float64))

    def last(self, key: str) -> float | None:
        """Smoothed value at the end, in nats per token."""
        series = self.series(key)
        return None if series is None else float(smooth(series.values)[-1])


def fact(facts: Mapping[str, Any], key: str) -> Any:
    """A fact of a `run.json`, or of its `identity` while the run is unfinished; None where it says nothing."""
    return facts.get(key, (facts.get("identity") or {}).get(key))


def collect_runs(inputs: Sequence[Path]) -> tuple[list[Run], list[Entry]]:
    """Runs and evaluations of the input directories, in their order, under names that differ.

    An evaluation of a run's folder that lies elsewhere still knows how its model was trained, while that folder is there.
    Raises DataError, naming what cannot be read.
    """
    runs: list[Run] = []
    entries: list[Entry] = []
    names: dict[str, int] = {}
    for folder in (one for given in inputs for one in _folders(given)):
        trained = _is_training(folder)
        reports = [load_report(f) for f in _evaluations(folder)]
        if not trained and not reports:
            reason = "no such directory" if not folder.is_dir() else f"no {EVAL}, no {RUN} with {METRICS}"
            raise DataError(
                "neither an evaluation nor a training run",
                where=folder,
                found=reason,
                expected="a directory written by kd eval --out or kd train --out",
            )
        facts = read_run(folder) if trained else _training_of(reports[0])
        wanted = facts.get("name") or (short_name(reports[0].model) if reports else None) or folder.name
        names[wanted] = names.get(wanted, 0) + 1
        name = wanted if names[wanted] == 1 else f"{wanted} ({names[wanted]})"
        if trained:
            runs.append(Run(name, facts, _steps(folder)))
        entries += [Entry(name, report, facts) for report in reports]
    if not runs and not entries:
        raise DataError("there is nothing to report", expected="at least one evaluation or training run")
    return runs, entries


def _is_training(folder: Path) -> bool:
    """Whether a training was started in this folder, and has logged a step."""
    return is_run(folder) and (folder / METRICS).is_file()


def _folders(given: Path) -> list[Path]:
    """The folder, or where it is nothing itself those of several models' evaluations in it."""
    return [given] if _is_training(given) or _evaluations(given) else numbered(given) or [given]


def _evaluations(folder: Path) -> list[Path]:
    """The folder itself, or its `eval`, `eval-2`, … in the order of their names."""
    if (folder / EVAL).is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"eval*/{EVAL}"))


def _training_of(report: EvalReport) -> dict[str, Any]:
    """`run.json` of the evaluated model's folder, or nothing."""
    folder = as_path(report.model)
    return read_run(folder) if is_run(folder) else {}


def _steps(folder: Path) -> tuple[dict[str, Any], ...]:
    """The lines of `metrics.jsonl` by ascending step; of a step that was logged twice the later line. Raises DataError."""
    records = {record["step"]: record for record in read_log(folder)}
    return tuple(records[step] for step in sorted(records))


def is_number(value: Any) -> bool:
    """A finite number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
