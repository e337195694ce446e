"""Compare models: which figures may be compared, and which differences are larger than their errors.

There is one table per task and text (or cache). A figure is marked as best only when it is better than every other one, by a
test of each difference with Holm's correction over the differences that the table looks at. Usually both evaluations have the
same documents, and the error is paired over them. Otherwise the two errors are added in squares, which overstates the error.

Nothing is marked where the settings differ (window, stride, limit, temperature). Nothing is marked where a figure is per
token and the tokenizers differ; a share of examples may still be compared. A text of a single document has no error, so
nothing is marked there either.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from kd.evaluation.report.page import Table
from kd.evaluation.results import EvalReport
from kd.evaluation.statistics.estimates import difference_stderr, documents_behind
from kd.evaluation.statistics.significance import LEVEL, difference_p, holm
from kd.evaluation.tasks.lm_eval_task import PREFIX
from kd.evaluation.tasks.task_registry import TASKS
from kd.evaluation.unseen_tasks import MARK, SEEN, UNSEEN

ARROWS = {"lower": " ↓", "higher": " ↑"}


@dataclass(frozen=True)
class Entry:
    """One evaluated model under the name a table shows."""

    name: str
    report: EvalReport
    facts: Mapping[str, Any] = field(default_factory=dict)
    """`run.json` of the training that made the model; empty for a model that was not trained here."""


@dataclass(frozen=True)
class Comparison:
    """Entries of one task on one text or cache."""

    task: str
    entries: tuple[Entry, ...]

    @property
    def title(self) -> str:
        """The task, and the text or cache as the user named it."""
        report = self.entries[0].report
        if "cache_fingerprint" in report.settings[self.task]:
            cache = report.cache or {}
            softened = report.settings[self.task].get("temperature", 1)
            at = "" if softened == 1 else f" at T = {softened:g}"
            return f"{self.task}: cache {str(cache.get('fingerprint'))[:12]} of {short_name(str(cache.get('teacher')))}{at}"
        if "protocol" in report.settings[self.task]:
            settings = report.settings[self.task]
            return f"{self.task}, {settings['protocol']} protocol: {settings.get('source')}"
        if self.task.startswith(PREFIX):
            return f"lm-eval: {self.task.removeprefix(PREFIX)}, {report.settings[self.task].get('shots')} examples before each"
        if "prompts_digest" in report.settings[self.task]:
            return f"{self.task}: {report.settings[self.task]['source']}"
        data = report.data or {}
        asked = ", ".join([str(data.get("split")), *_wording(data.get("source") or {})])
        return f"{self.task}: {short_name(str(data.get('spec')))} ({asked})"

    @property
    def metrics(self) -> list[str]:
        """Metric names that any entry has, in the task's own order (a file's keys are sorted)."""
        names = dict.fromkeys(m for e in self.entries for m in e.report.tasks[self.task])
        known = list(TASKS[self.task].metrics) if self.task in TASKS else []
        return [m for m in known if m in names] + [m for m in names if m not in known]

    @property
    def shown(self) -> list[str]:
        """Metrics of the table. In a text of one task, its part and the mean of tasks repeat the whole and are left out."""
        parts = {m.partition("/")[2] for m in self.metrics if "/" in m}
        return [m for m in self.metrics if len(parts) > 1 or not ("/" in m or "_mean_of_tasks" in m)]

    def figure(self, entry: Entry, metric: str) -> dict[str, Any]:
        """value, stderr, n, over, unit, better, title; empty where the entry lacks the metric."""
        return dict(entry.report.tasks[self.task].get(metric, {}))

    def best(self, metric: str) -> int | None:
        """Number of the entry that is better than every other, or None."""
        return next(iter(self._winners_of_all.get(metric, ())), None)

    @cached_property
    def _winners_of_all(self) -> dict[str, set[int]]:
        return self.winners()

    def winners(self, pairs: Sequence[tuple[str, str]] = ()) -> dict[str, set[int]]:
        """Metric -> numbers of the entries that are better: than the other of a pair of names, or without pairs than all others.

        The p-values of all differences that are looked at here are corrected together.
        """
        places = {e.name: number for number, e in enumerate(self.entries)}
        groups = [[places[a], places[b]] for a, b in pairs if a in places and b in places]
        contests = [
            (metric, leader, others)
            for metric in self.shown
            for group in (groups if pairs else [list(places.values())])
            if (leader := self._leader(metric, group)) is not None and (others := [i for i in group if i != leader])
        ]
        p_values = iter(holm([self.p_value(leader, i, metric) for metric, leader, others in contests for i in others]))
        winners: dict[str, set[int]] = {metric: set() for metric in self.shown}
        for metric, leader, others in contests:
            corrected = [next(p_values) for _ in others]
            if all(p is not None and p <= LEVEL for p in corrected):
                winners[metric].add(leader)
        return winners

    def _leader(self, metric: str, among: Sequence[int]) -> int | None:
        """The entry with the best figure; None where they were not measured alike, or one has none."""
        figures = {i: self.figure(self.entries[i], metric) for i in among}
        values = {i: float(f["value"]) for i, f in figures.items() if f.get("value") is not None}
        if len(values) < max(2, len(figures)) or not self._comparable([self.entries[i] for i in among], metric):
            return None
        sign = 1.0 if figures[among[0]]["better"] == "lower" else -1.0
        return min(values, key=lambda i: sign * values[i])

    def p_value(self, left: int, right: int, metric: str) -> float | None:
        """Two-sided p of the difference of two entries over documents; None where its error is unknown."""
        error = self.difference_error(left, right, metric)
        if error is None:
            return None
        values = [float(self.figure(self.entries[i], metric)["value"]) for i in (left, right)]
        influences = [self._influence(i, metric) for i in (left, right)]
        counts = [documents_behind([np.array(u)]) for u in influences if u is not None]
        return difference_p(values[0] - values[1], error, min(counts) - 1.0 if len(counts) == 2 else math.inf)

    def _influence(self, number: int, metric: str) -> list[float] | None:
        influences = self.entries[number].report.documents.get(self.task, {}).get("influence", {})
        return None if influences.get(metric) is None else list(influences[metric])

    def difference_error(self, left: int, right: int, metric: str) -> float | None:
        """Standard error of the difference of two entries, in the metric's unit; None where it is unknown."""
        kept = [self.entries[i].report.documents.get(self.task, {}) for i in (left, right)]
        a, b = (self._influence(i, metric) for i in (left, right))
        if a is not None and b is not None and kept[0].get("digest") == kept[1].get("digest") and len(a) == len(b):
            return difference_stderr(np.array(a), np.array(b))
        errors = [e for i in (left, right) if (e := self.figure(self.entries[i], metric).get("stderr")) is not None]
        return math.hypot(*errors) if len(errors) == 2 else None

    def comparable_models(self, models: Sequence[str], metric: str) -> bool:
        """Whether these models were measured alike, so that one of two values may be better."""
        return self._comparable([e for e in self.entries if e.name in models], metric)

    def _comparable(self, entries: Sequence[Entry], metric: str) -> bool:
        first = self.figure(entries[0], metric)
        same_settings = all(e.report.settings[self.task] == entries[0].report.settings[self.task] for e in entries)
        same_tokenizer = len({e.report.tokenizer for e in entries}) == 1
        return first.get("better") in ARROWS and same_settings and (same_tokenizer or first["over"] != "token")

    def table(self, pairs: Sequence[tuple[str, str]] = ()) -> Table:
        """Models down, metrics across; the better of each pair of names is marked, or without pairs the best of all."""
        first = {m: next(f for e in self.entries if (f := self.figure(e, m))) for m in self.shown}
        headers = ["model", "parameters", *(f"{f['title']}{ARROWS.get(f['better'], '')}" for f in first.values())]
        rows = [
            [e.name, f"{e.report.parameters:,}", *(with_error(self.figure(e, m)) for m in self.shown)]
            for e in self.entries
        ]
        winners = self.winners(pairs)
        marks = {(row, column) for column, m in enumerate(self.shown, 2) for row in winners[m]}
        return Table(headers, rows, frozenset(marks))

    def note(self) -> str:
        """What was averaged over, in which units, under which settings; parts (`METRIC/TASK`) are left to the table."""
        lines = []
        for entry in self.entries:
            figures = [f for m in self.metrics if "/" not in m and (f := self.figure(entry, m))]
            counts = dict.fromkeys(f"{f['n']:,} {f['over']}s" for f in figures)
            documents = entry.report.documents.get(self.task, {}).get("count")
            settings = entry.report.settings[self.task]
            used = [
                f"{k.replace('_', ' ')} {json.dumps(v) if isinstance(v, str) else v}"
                for k, v in settings.items()
                if v is not None and not k.endswith(("_digest", "_fingerprint"))
            ]
            known = [] if documents is None else [f"{documents:,} document{'' if documents == 1 else 's'}"]
            lines.append(", ".join([*counts, *known, *used]))
        units = {
            f["title"]: f["unit"] for e in self.entries for m in self.shown if "/" not in m and (f := self.figure(e, m))
        }
        if len(set(lines)) == 1:
            over = f"Over {lines[0]}."
        else:
            over = "Not under equal conditions: " + "; ".join(
                f"{e.name} over {x}" for e, x in zip(self.entries, lines, strict=True)
            )
            over += "."
        return f"{over} Units: {', '.join(f'{title} [{unit}]' for title, unit in units.items() if title != unit)}."


def _wording(source: Mapping[str, Any]) -> list[str]:
    """How instruction tasks were asked, where it is not the usual way."""
    prompts = {"name": "prompts by name", "bare": "prompts without instruction"}
    options = {"no": "no options"}
    kinds = [prompts.get(str(source.get("task_prompt"))), options.get(str(source.get("options")))]
    return [words for words in kinds if words is not None]


def compare(entries: Sequence[Entry]) -> list[Comparison]:
    """Group entries by task, in the registry's order, and by the text or cache they were run on, as first met.

    A model that was scored again on the same (at another temperature, say) begins a further group.
    """
    known = list(TASKS)
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        for key in texts_read(entry.report):
            while any(entry.name == other.name for other in groups.get(key, ())):
                key += ("again",)
            groups.setdefault(key, []).append(entry)
    ordered = sorted(groups, key=lambda key: known.index(key[0]) if key[0] in known else len(known))
    return [Comparison(key[0], tuple(groups[key])) for key in ordered]


def texts_read(report: EvalReport) -> list[tuple[str, ...]]:
    """What each task of a report was measured on: the task, and the digests of its text or cache."""
    keys = []
    for task in report.tasks:
        settings = report.settings.get(task, {})
        keys.append((task, *(str(v) for k, v in sorted(settings.items()) if k.endswith(("_digest", "_fingerprint")))))
    return keys


def with_error(figure: dict[str, Any]) -> str:
    """`5.271 ± 0.083`: the error with two significant digits, the value with as many places; and whether the task is unseen."""
    if not figure:
        return "–"
    shown = "not finite" if figure["value"] is None else value_with_error(figure["value"], figure["stderr"])
    return with_mark(shown, figure.get(MARK))


def with_mark(shown: str, mark: object) -> str:
    """A figure in words with `seen` or `unseen` after it, where that is known."""
    return f"{shown} ({mark})" if mark in (SEEN, UNSEEN) else shown


def value_with_error(value: float, error: float | None, *, signed: bool = False) -> str:
    """The same for two numbers; `signed` puts a plus before a value that is not negative."""
    sign = "+" if signed else ""
    if not error:
        return f"{value:{sign}.5g}"
    places = min(max(0, 1 - math.floor(math.log10(error))), 8)
    return f"{value:{sign}.{places}f} ± {error:.{places}f}"


def short_name(name: str) -> str:
    """A path that only means something on one machine is shortened to its last part; other names stay."""
    is_path = name.startswith(("/", "~", ".")) or name.count("/") > 1  # hub ids have one at most
    return name.rstrip("/").rpartition("/")[2] if is_path else name
