"""Find what a report is made of in its input folders: training runs, evaluations, or both.

    run.json  metrics.jsonl      a training run (`kd train --out`); one JSON object per logged step
    eval.json                    an evaluation (`kd eval --out`), in the folder itself or, of a run, in a folder in it
    0-NAME  1-NAME  …            evaluations of several models at once
    RUN  RUN  …                  runs and evaluations, each in a folder of its own

A run that is not finished or was killed can be read. A last line that was cut off is left out. A step that was logged
twice counts once, with its later record.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from kd.common.errors import DataError
from kd.common.files import read_object
from kd.common.paths import as_path
from kd.common.setting_fields import settings_of
from kd.common.shown_text import redacted
from kd.evaluation.report.comparison import Entry, short_name, texts_read
from kd.evaluation.report.figures import Series, smooth
from kd.evaluation.results import EVAL, EvalReport, load_report, numbered
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.run_folder import METRICS, RUN, is_run, read_log, read_run

EXPERIMENT = "experiment.json"
"""File of an experiment's folder that says which command made which of its folders."""


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
    texts_of: dict[str, _Known] = {}
    for folder in input_folders(inputs):
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
        name = None if trained else _same_model(wanted, reports, texts_of)
        if name is None:
            names[wanted] = names.get(wanted, 0) + 1
            name = wanted if names[wanted] == 1 else f"{wanted} ({names[wanted]})"
            run_folder = folder.resolve() if trained else None
            texts_of[name] = _Known(wanted, reports[0].identity if reports else {}, run_folder, set())
        texts_of[name].texts.update(text for report in reports for text in texts_read(report))
        if trained:
            runs.append(Run(name, facts, _steps(folder)))
        entries += [Entry(name, report, facts) for report in reports]
    return runs, entries


def input_folders(inputs: Sequence[Path], also: Callable[[Path], bool] = lambda folder: False) -> list[Path]:
    """The folders that hold something: those given, or where one is nothing itself those in it, or in the folders in it.

    also   whether a folder is something else that the caller reads
    """

    def known(folder: Path) -> list[Path]:
        if _is_training(folder) or _evaluations(folder) or also(folder):
            return [folder]
        return numbered(folder)

    folders = []
    for given in inputs:
        inner = sorted(path for path in given.iterdir() if path.is_dir()) if given.is_dir() else []
        folders += known(given) or [one for path in inner for one in known(path)] or [given]
    return folders


@dataclass(frozen=True)
class _Known:
    """A model that was met before."""

    wanted: str
    identity: Mapping[str, Any]
    """Empty where it was not scored."""
    folder: Path | None
    """Folder of its run; None where none was given."""
    texts: set[tuple[str, ...]]
    """What it was scored on."""


def _same_model(wanted: str, reports: Sequence[EvalReport], known: Mapping[str, _Known]) -> str | None:
    """The name of the model that other folders hold scores of, on other texts; None where there is none.

    A model that is scored on a second text is still one model. What it was scored on twice, with other settings, stays apart.
    """
    texts = {text for report in reports for text in texts_read(report)}
    for name, one in known.items():
        same = one.identity and all(report.identity == one.identity for report in reports)
        same = same or (one.folder is not None and as_path(reports[0].model).resolve() == one.folder)
        if same and one.wanted == wanted and not texts & one.texts:
            return name
    return None


def _is_training(folder: Path) -> bool:
    """Whether a training was started in this folder, and has logged a step."""
    return is_run(folder) and (folder / METRICS).is_file()


def _evaluations(folder: Path) -> list[Path]:
    """The folder itself, or its `eval`, `eval-2`, …, and of a training run any folder in it, in the order of their names."""
    if (folder / EVAL).is_file():
        return [folder]
    return sorted(path.parent for path in folder.glob(f"{'*' if _is_training(folder) else 'eval*'}/{EVAL}"))


def _training_of(report: EvalReport) -> dict[str, Any]:
    """`run.json` of the evaluated model's folder, or nothing."""
    folder = as_path(report.model)
    return read_run(folder) if is_run(folder) else {}


def _steps(folder: Path) -> tuple[dict[str, Any], ...]:
    """The lines of `metrics.jsonl` by ascending step; of a step that was logged twice the later line. Raises DataError."""
    records = {record["step"]: record for record in read_log(folder)}
    return tuple(records[step] for step in sorted(records))


def commands_of(runs: Sequence[Run], inputs: Sequence[Path]) -> list[str]:
    """The commands that made the inputs: those of their experiment where they belong to one, else the trainings'.

    Of an experiment over several seeds, those of the first seed.
    """
    folders = [
        folder for folder in dict.fromkeys(p.resolve().parent for p in inputs) if (folder / EXPERIMENT).is_file()
    ]
    lines = [line for folder in folders for line in _commands_of_experiment(read_object(folder / EXPERIMENT))]
    return lines or [command for run in runs if (command := _training_command(run))]


def _commands_of_experiment(state: Mapping[str, Any]) -> list[str]:
    seeds = list(map(str, state.get("seeds") or []))
    lines = [
        f"# kd experiment {state.get('name')}" + (f" --seeds {','.join(seeds)}; seed {seeds[0]}:" if seeds else ":")
    ]
    steps = state.get("steps")
    shown = {}
    for folder, words in steps.items() if isinstance(steps, dict) else ():
        seed = re.search(r"-seed(\d+)(/|$)", folder)
        if seed is None or not seeds or seed[1] == seeds[0]:
            shown[folder] = list(map(str, words))
    return lines + [_typed(["kd", *words]) for words in _in_order(shown)]


def _in_order(steps: Mapping[str, list[str]]) -> list[list[str]]:
    """The commands of steps, each after those whose folders it reads; else by name, as they are given."""
    left, ordered = {folder: _out_of(words) for folder, words in steps.items()}, []
    while left:
        waiting = set(left.values()) - {None}
        ready = (f for f, out in left.items() if not waiting.intersection(steps[f]) - {out})
        folder = next(ready, next(iter(left)))
        ordered.append(steps[folder])
        del left[folder]
    return ordered


def _out_of(words: Sequence[str]) -> str | None:
    """The folder that a command writes."""
    return words[words.index("--out") + 1] if "--out" in words[:-1] else None


def _training_command(run: Run) -> str | None:
    """`kd train` with the settings of a run that are not the defaults."""
    saved = run.fact("settings")
    if not isinstance(saved, dict):
        return None
    words = ["kd", "train"]
    for setting in settings_of(TrainConfig).values():
        value = saved.get(setting.name)
        if value is None or value == setting.default or isinstance(value, dict | list):
            continue
        if isinstance(value, bool):
            words.append(setting.option if value else f"--no-{setting.option[2:]}")
        else:
            words += [setting.option, str(value)]
    return _typed(redacted(words))


def _typed(words: Sequence[str]) -> str:
    """A command as it is typed; a path of one machine is shown by its last part alone."""
    return " ".join(f"…/{PurePath(w).name}" if PurePath(w).is_absolute() else shlex.quote(w) for w in words)


def versions_of(runs: Sequence[Run], entries: Sequence[Entry]) -> str:
    """Package and version of everything that made runs and scores; several versions of one package are all named."""
    numbers_of: dict[str, set[str]] = {}
    for versions in (*(entry.report.versions for entry in entries), *(run.fact("versions") or {} for run in runs)):
        for package, number in versions.items():
            numbers_of.setdefault(package, set()).add(str(number))
    return ", ".join(f"{package} {' and '.join(sorted(numbers))}" for package, numbers in sorted(numbers_of.items()))


def is_number(value: Any) -> bool:
    """A finite number, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
