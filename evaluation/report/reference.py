"""The reference table: a row per model, a column per task, and what the teacher gained in each.

`columns` defines a column. A figure of an arm is the mean over its seeds. Its error has two parts. More seeds shrink the
first, and more text shrinks the second, so they are kept apart:

    seeds      sd over seeds / √seeds                          another run would have given other weights
    documents  clustered by document, of the mean over seeds   another text would have been easier or harder

± is both together (root of the sum of squares). Differences are paired in both parts: within seeds, where the two students
began with the same weights, and over documents, where both saw the same ones. The mean over columns adds the influences
of documents, so that two metrics of the same examples do not count as independent. Where influences are missing, the
errors of columns and seeds are added up, which can only overstate; those of the two sides of a pair are added in squares.

A student is marked in a column only when the difference of its pair exceeds its error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd.evaluation.report.columns import Column, columns_of
from kd.evaluation.report.comparison import ARROWS, Comparison, value_with_error
from kd.evaluation.report.page import Table
from kd.evaluation.report.pairs import Arm, Pair
from kd.evaluation.statistics.estimates import standard_error
from kd.evaluation.statistics.significance import PairedTest, paired_test


@dataclass(frozen=True)
class Figure:
    """The figure of an arm in one column."""

    value: float
    seeds: int
    seed_error: float | None
    """Standard error over seeds; None for one seed."""
    document_error: float | None
    """Standard error over documents; None where a text is a single document."""

    @property
    def error(self) -> float | None:
        """The standard error over seeds and documents; None where the latter is unknown."""
        return None if self.document_error is None else math.hypot(self.document_error, self.seed_error or 0.0)


@dataclass(frozen=True)
class Difference:
    """The distilled figure minus the fine-tuned one in one column, in the metric's unit."""

    column: Column
    pair: Pair
    test: PairedTest
    """Significance test over seeds; None where there are too few."""
    by_seed: tuple[float, ...]
    document_error: float | None

    @property
    def error(self) -> float | None:
        """The standard error of the mean difference, over seeds and documents; None where the latter is unknown."""
        return None if self.document_error is None else math.hypot(self.document_error, self.test.stderr or 0.0)

    @property
    def gain(self) -> float:
        """The mean difference, positive where the distilled students are better."""
        return self.column.sign * self.test.mean

    @property
    def verdict(self) -> str:
        """`better`, `worse`, or `within error`."""
        if self.error is None or abs(self.gain) <= self.error:
            return "within error" if self.error is not None else "no error known"
        return "better" if self.gain > 0 else "worse"

    @property
    def seeds_better(self) -> int:
        """The number of seeds in which the distilled student is better."""
        return sum(self.column.sign * d > 0 for d in self.by_seed)


@dataclass(frozen=True)
class Reference:
    """Arms, pairs and columns of a report."""

    arms: tuple[Arm, ...]
    pairs: tuple[Pair, ...]
    columns: tuple[Column, ...]
    """Columns in order; the mean is the last, where there is one."""

    @property
    def tasks(self) -> tuple[Column, ...]:
        """The columns that are not a mean."""
        return tuple(c for c in self.columns if len(c.parts) == 1)

    @property
    def rows(self) -> list[Arm]:
        """Models of no pair (teachers, models that were not trained here), then each baseline with the arms compared with it."""
        paired = list(dict.fromkeys(a.name for p in self.pairs for a in (p.baseline, p.other)))
        by_name = {a.name: a for a in self.arms}
        return [a for a in self.arms if a.name not in paired] + [by_name[name] for name in paired]

    def figure(self, arm: Arm, column: Column) -> Figure | None:
        """The mean over the seeds; None where a seed was not measured."""
        models = list(arm.models.values())
        values = [v for m in models if (v := column.value(m)) is not None]
        if len(values) < len(models):
            return None
        test = paired_test(values)
        return Figure(
            test.mean, len(values), test.stderr, _documents_error(column, [(m, 1 / len(models)) for m in models])
        )

    def difference(self, pair: Pair, column: Column) -> Difference | None:
        """The difference of a pair in one column; None where one side was not measured, or the two not alike."""
        values = [(column.value(a), column.value(b)) for a, b in pair.models]
        if any(a is None or b is None for a, b in values) or not column.comparable([m for p in pair.models for m in p]):
            return None
        each = tuple(b - a for a, b in values if a is not None and b is not None)
        weights = [
            (model, sign / len(each)) for pair_ in pair.models for model, sign in zip(pair_, (-1, 1), strict=True)
        ]
        return Difference(column, pair, paired_test(each), each, _documents_error(column, weights))

    def differences(self, pair: Pair) -> list[Difference]:
        """The differences of a pair in the order of the columns; columns that cannot be compared are left out."""
        return [d for c in self.columns if (d := self.difference(pair, c)) is not None]

    def wins(self, pair: Pair) -> dict[str, int]:
        """In how many tasks the distilled arm is better, worse, within the error; each counts once, and the mean is none."""
        verdicts = [d.verdict for d in self.differences(pair) if len(d.column.parts) == 1 and d.column.counts]
        return {name: verdicts.count(name) for name in ("better", "worse", "within error", "no error known")}

    def best(self, column: Column) -> set[str]:
        """Names of arms to mark: the better of each pair; a baseline only when it beats all it is compared with.

        Without pairs, the one that beats every other model by more than the error of their difference.
        """
        if not self.pairs:
            return self._best_of_all(column)
        verdicts: dict[str, list[str]] = {}
        marked = set()
        for pair in self.pairs:
            gain = self.difference(pair, column)
            verdict = "unknown" if gain is None else gain.verdict
            verdicts.setdefault(pair.baseline.name, []).append(verdict)
            if verdict == "better":
                marked.add(pair.other.name)
        return marked | {name for name, all_of in verdicts.items() if set(all_of) == {"worse"}}

    def _best_of_all(self, column: Column) -> set[str]:
        single = len(column.parts) == 1 and all(len(a.models) == 1 for a in self.arms)
        if not single:
            return set()
        comparison, metric = column.parts[0]
        winner = comparison.best(metric)
        name = None if winner is None else comparison.entries[winner].name
        return {a.name for a in self.arms if name in a.models.values()}

    def table(self) -> Table:
        """The table with a row per model and a column per metric."""
        headers = ["model", "parameters", *(f"{c.title}{ARROWS[c.better]}" for c in self.columns)]
        rows = []
        for arm in self.rows:
            seeds = f" ({len(arm.models)} seeds)" if len(arm.models) > 1 else ""
            rows.append(
                [f"{arm.name}{seeds}", f"{arm.parameters:,}", *(_cell(self.figure(arm, c)) for c in self.columns)]
            )
        best = {
            (r, i) for i, c in enumerate(self.columns, 2) for r, a in enumerate(self.rows) if a.name in self.best(c)
        }
        return Table(headers, rows, frozenset(best))

    def pair_table(self, pair: Pair) -> Table:
        """One line per column: both figures, their difference, and over several seeds the tests."""
        several = len(pair.seeds) > 1
        spread = f" ± sd of {len(pair.seeds)} seeds" if several else ""
        headers = ["", f"{pair.baseline.name}{spread}", f"{pair.other.name}{spread}", "difference", "verdict"]
        headers += ["95 % over seeds", "seeds better", "p (t / permutation)"] if several else []
        rows, best = [], set()
        for number, d in enumerate(self.differences(pair)):
            figures = [self._side(pair, side, d.column) for side in (0, 1)]
            row = [
                f"{d.column.title}{ARROWS[d.column.better]}",
                *figures,
                value_with_error(d.test.mean, d.error, signed=True),
                d.verdict,
            ]
            if several:
                low, high = d.test.interval or (math.nan, math.nan)
                row += [
                    f"{low:+.3g} to {high:+.3g}",
                    f"{d.seeds_better} of {d.test.n}",
                    f"{_p(d.test.p_t)} / {_p(d.test.p_permutation)}",
                ]
            rows.append(row)
            best |= {(number, 2 if d.verdict == "better" else 1)} if d.verdict in ("better", "worse") else set()
        return Table(headers, rows, frozenset(best))

    def _side(self, pair: Pair, side: int, column: Column) -> str:
        """Mean and spread (sd) over the seeds that both arms have; of a single seed the figure with its error."""
        values = [v for models in pair.models if (v := column.value(models[side])) is not None]
        if len(values) == 1:
            models = [models[side] for models in pair.models]
            return value_with_error(values[0], _documents_error(column, [(models[0], 1.0)]))
        test = paired_test(values)
        return value_with_error(test.mean, test.sd)

    def pair_note(self, pair: Pair) -> str:
        """How often each side won, and in which settings they differ."""
        wins = self.wins(pair)
        total = sum(wins.values())
        counted = (
            f"Of {total} task{'' if total == 1 else 's'}, {pair.other.name} is better than {pair.baseline.name} in "
        )
        counted += f"{wins['better']}, worse in {wins['worse']}, within the error in {wins['within error']}"
        counted += f"; {wins['no error known']} of a single document have no error." if wins["no error known"] else "."
        if pair.differs:
            differing = "; ".join(f"{k.replace('_', ' ')} {a} and {b}" for k, (a, b) in pair.differs.items())
            counted += f" The loss is not all that differs: {differing}."
        return counted

    def document(self) -> dict[str, Any]:
        """The table as JSON, for a program."""
        return {
            "columns": [
                {
                    "title": c.title,
                    "unit": c.unit,
                    "better": c.better,
                    "of": [{"task": p.task, "subject": p.title, "metric": m} for p, m in c.parts],
                }
                for c in self.columns
            ],
            "models": [
                {
                    "name": a.name,
                    "parameters": a.parameters,
                    "loss": a.loss,
                    "seeds": [s for s in a.models if s is not None],
                    "figures": [_as_dict(self.figure(a, c)) for c in self.columns],
                }
                for a in self.rows
            ],
            "pairs": [
                {
                    "baseline": p.baseline.name,
                    "other": p.other.name,
                    "seeds": p.seeds,
                    "wins": self.wins(p),
                    "differs": {k: list(v) for k, v in p.differs.items()},
                    "differences": [_difference_dict(d) for d in self.differences(p)],
                }
                for p in self.pairs
            ],
        }

    def csv_rows(self) -> list[list[Any]]:
        """Models down, two columns (value, error) per metric; header first."""
        header = ["model", "parameters", "seeds", *(x for c in self.columns for x in (c.title, f"{c.title} error"))]
        rows: list[list[Any]] = [header]
        for arm in self.rows:
            figures = [self.figure(arm, c) for c in self.columns]
            numbers = [
                x for f in figures for x in (("", "") if f is None else (f.value, "" if f.error is None else f.error))
            ]
            rows.append([arm.name, arm.parameters, len(arm.models), *numbers])
        return rows


def reference_of(comparisons: Sequence[Comparison], arms: Sequence[Arm], pairs: Sequence[Pair]) -> Reference:
    """The columns of all comparisons, and their mean where at least two are shares."""
    return Reference(tuple(arms), tuple(pairs), columns_of(comparisons))


def _documents_error(column: Column, weights: Sequence[tuple[str, float]]) -> float | None:
    """Standard error over documents of a weighted sum of models' figures; paired where they saw the same documents."""
    influences = [(column.influence(model), weight) for model, weight in weights]
    first = influences[0][0]
    shapes = [None if u is None else {k: len(v) for k, v in u.items()} for u, _ in influences]
    if first is not None and all(s == shapes[0] for s in shapes):
        total = {k: sum(w * u[k] for u, w in influences if u is not None) for k in first}
        errors = [standard_error(np.asarray(u)) for u in total.values()]
        return None if any(e is None for e in errors) else math.hypot(*(e for e in errors if e is not None))
    each = [(column.stderr(model), weight) for model, weight in weights]
    if any(e is None for e, _ in each):
        return None
    sides = [sum(abs(w) * e for e, w in each if e is not None and (w > 0) == positive) for positive in (True, False)]
    return math.hypot(*sides)  # seeds of one side saw the same documents: their errors add up


def _cell(figure: Figure | None) -> str:
    return "–" if figure is None else value_with_error(figure.value, figure.error)


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _as_dict(figure: Figure | None) -> dict[str, Any] | None:
    if figure is None:
        return None
    return {
        "value": figure.value,
        "error": figure.error,
        "seed_error": figure.seed_error,
        "document_error": figure.document_error,
    }


def _difference_dict(d: Difference) -> dict[str, Any]:
    keys: Mapping[str, Any] = {
        "column": d.column.title,
        "difference": d.test.mean,
        "by_seed": list(d.by_seed),
        "error": d.error,
        "seed_error": d.test.stderr,
        "document_error": d.document_error,
        "interval": d.test.interval,
        "t": d.test.t,
        "p_t": d.test.p_t,
        "p_permutation": d.test.p_permutation,
        "verdict": d.verdict,
        "seeds_better": d.seeds_better,
    }
    return {**keys, "interval": None if d.test.interval is None else list(d.test.interval)}
