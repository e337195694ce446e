"""The reference table: a row per model, a column per task, and what the teacher gained in each.

`columns` defines a column, `differences` a figure, its error and a difference.

A difference is called better or worse where its 95 % interval leaves zero after Holm's correction over all cells of the table:
all pairs and all columns. One that only exceeds its standard error leans to one side. Only the first kind is marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from kd.evaluation.report.columns import Column, columns_of
from kd.evaluation.report.comparison import ARROWS, Comparison, value_with_error, with_mark
from kd.evaluation.report.differences import VERDICTS, Difference, Figure, documents_error
from kd.evaluation.report.page import Table
from kd.evaluation.report.pairs import Arm, Pair
from kd.evaluation.statistics.significance import (
    holm,
    paired_test,
)


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
            test.mean, len(values), test.stderr, documents_error(column, [(m, 1 / len(models)) for m in models])[0]
        )

    def difference(self, pair: Pair, column: Column) -> Difference | None:
        """The difference of a pair in one column; None where one side was not measured, or the two not alike."""
        return self._cells.get((id(pair), id(column)))

    @cached_property
    def _cells(self) -> dict[tuple[int, int], Difference]:
        """The differences by pair and column, their p-values corrected over all of them."""
        cells = [
            d for pair in self.pairs for column in self.columns if (d := self._difference(pair, column)) is not None
        ]
        corrected = holm([d.p for d in cells])
        return {(id(d.pair), id(d.column)): replace(d, corrected_p=p) for d, p in zip(cells, corrected, strict=True)}

    def _difference(self, pair: Pair, column: Column) -> Difference | None:
        values = [(column.value(a), column.value(b)) for a, b in pair.models]
        if any(a is None or b is None for a, b in values) or not column.comparable([m for p in pair.models for m in p]):
            return None
        each = tuple(b - a for a, b in values if a is not None and b is not None)
        weights = [
            (model, sign / len(each)) for pair_ in pair.models for model, sign in zip(pair_, (-1, 1), strict=True)
        ]
        return Difference(column, pair, paired_test(each), each, *documents_error(column, weights))

    def differences(self, pair: Pair) -> list[Difference]:
        """The differences of a pair in the order of the columns; columns that cannot be compared are left out."""
        return [d for c in self.columns if (d := self.difference(pair, c)) is not None]

    def wins(self, pair: Pair) -> dict[str, int]:
        """Verdict -> the number of tasks in which the distilled arm has it; each task counts once, and the mean is none."""
        verdicts = [d.verdict for d in self.differences(pair) if len(d.column.parts) == 1 and d.column.counts]
        return {name: verdicts.count(name) for name in VERDICTS}

    def best(self, column: Column) -> set[str]:
        """Names of arms to mark: the better of each pair; a baseline only when it beats all it is compared with.

        Without pairs, the one that is better than every other model; see `Comparison.best`.
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
            rows.append([f"{arm.name}{seeds}", f"{arm.parameters:,}", *(self._cell(arm, c) for c in self.columns)])
        best = {
            (r, i) for i, c in enumerate(self.columns, 2) for r, a in enumerate(self.rows) if a.name in self.best(c)
        }
        return Table(headers, rows, frozenset(best))

    def _cell(self, arm: Arm, column: Column) -> str:
        """The figure in words, and whether the task is one that none of the arm's students were trained on."""
        figure, marks = self.figure(arm, column), {column.mark(model) for model in arm.models.values()}
        if figure is None:
            return "–"
        return with_mark(value_with_error(figure.value, figure.error), marks.pop() if len(marks) == 1 else None)

    def pair_table(self, pair: Pair) -> Table:
        """One line per column: both figures, their difference, and over several seeds the tests."""
        several = len(pair.seeds) > 1
        spread = f" ± sd of {len(pair.seeds)} seeds" if several else ""
        headers = ["", f"{pair.baseline.name}{spread}", f"{pair.other.name}{spread}", "difference", "verdict"]
        headers += ["95 % interval", "p (corrected)"]
        headers += ["seeds better", "p over seeds (t / permutation)"] if several else []
        rows, best = [], set()
        for number, d in enumerate(self.differences(pair)):
            figures = [self._side(pair, side, d.column) for side in (0, 1)]
            row = [
                f"{d.column.title}{ARROWS[d.column.better]}",
                *figures,
                value_with_error(d.test.mean, d.error, signed=True),
                d.verdict,
            ]
            row += [_interval(d.interval), _p(d.corrected_p)]
            if several:
                row += [f"{d.seeds_better} of {d.test.n}", f"{_p(d.test.p_t)} / {_p(d.test.p_permutation)}"]
            rows.append(row)
            best |= {(number, 2 if d.verdict == "better" else 1)} if d.verdict in ("better", "worse") else set()
        return Table(headers, rows, frozenset(best))

    def _side(self, pair: Pair, side: int, column: Column) -> str:
        """Mean and spread (sd) over the seeds that both arms have; of a single seed the figure with its error."""
        values = [v for models in pair.models if (v := column.value(models[side])) is not None]
        if len(values) == 1:
            models = [models[side] for models in pair.models]
            return value_with_error(values[0], documents_error(column, [(models[0], 1.0)])[0])
        test = paired_test(values)
        return value_with_error(test.mean, test.sd)

    def pair_note(self, pair: Pair) -> str:
        """One line on the pair: the mean over tasks with its interval, and how often each side won; then how they differ."""
        wins = self.wins(pair)
        total = sum(wins.values())
        counted = self._mean_line(pair)
        counted += (
            f"Of {total} task{'' if total == 1 else 's'}, {pair.other.name} is better than {pair.baseline.name} in "
        )
        counted += (
            f"{wins['better']} and worse in {wins['worse']}. It leans to better in {wins['leans better']}, to worse in "
        )
        counted += f"{wins['leans worse']}, and is within the error in {wins['within error']}."
        counted += f" {wins['no error known']} of a single document have no error." if wins["no error known"] else ""
        if pair.differs:
            differing = "; ".join(f"{k.replace('_', ' ')} {a} and {b}" for k, (a, b) in pair.differs.items())
            counted += f" The loss is not all that differs: {differing}."
        return counted

    def _mean_line(self, pair: Pair) -> str:
        """The mean over tasks in a sentence; empty where the table has none."""
        mean = next((d for d in self.differences(pair) if len(d.column.parts) > 1), None)
        if mean is None or mean.error is None:
            return ""
        difference = value_with_error(mean.test.mean, mean.error, signed=True)
        return f"The {mean.column.title} differs by {difference} (95 %: {_interval(mean.interval)}): {mean.verdict}. "

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
                    "figures": [None if (f := self.figure(a, c)) is None else f.document() for c in self.columns],
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
                    "differences": [d.document() for d in self.differences(p)],
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


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _interval(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{interval[0]:+.3g} to {interval[1]:+.3g}"
