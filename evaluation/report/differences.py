"""Figures of an arm and differences of a pair: their errors over seeds and documents, and what is said of them.

A figure of an arm is the mean over its seeds. Its error has two parts. More seeds shrink the first, and more text shrinks the
second, so they are kept apart:

    seeds      sd over seeds / √seeds                          another run would have given other weights
    documents  clustered by document, of the mean over seeds   another text would have been easier or harder

± is both together (root of the sum of squares). Differences are paired in both parts: within seeds, where the two students
began with the same weights, and over documents, where both saw the same ones. The mean over columns adds the influences
of documents, so that two metrics of the same examples do not count as independent. Where influences are missing, the
errors of columns and seeds are added up, which can only overstate; those of the two sides of a pair are added in squares.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd.evaluation.report.columns import Column
from kd.evaluation.report.pairs import Pair
from kd.evaluation.statistics.estimates import documents_behind, standard_error
from kd.evaluation.statistics.significance import (
    LEVEL,
    PairedTest,
    difference_p,
    pooled_freedom,
    quantile,
)

VERDICTS = ("better", "worse", "leans better", "leans worse", "within error", "no error known")
"""What is said of a difference."""


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

    def document(self) -> dict[str, Any]:
        """The figure as JSON."""
        return {
            "value": self.value,
            "error": self.error,
            "seed_error": self.seed_error,
            "document_error": self.document_error,
        }


@dataclass(frozen=True)
class Difference:
    """The distilled figure minus the fine-tuned one in one column, in the metric's unit."""

    column: Column
    pair: Pair
    test: PairedTest
    """Significance test over seeds; None where there are too few."""
    by_seed: tuple[float, ...]
    document_error: float | None
    document_freedom: float = math.inf
    """Degrees of freedom of the error over documents."""
    corrected_p: float | None = None
    """`p` after Holm's correction over the cells of the table; None where there is no error."""

    @property
    def error(self) -> float | None:
        """The standard error of the mean difference, over seeds and documents; None where the latter is unknown."""
        return None if self.document_error is None else math.hypot(self.document_error, self.test.stderr or 0.0)

    @property
    def freedom(self) -> float:
        """Degrees of freedom of the error over seeds and documents."""
        parts = [(self.document_error or 0.0, self.document_freedom)]
        return pooled_freedom(parts if self.test.stderr is None else [*parts, (self.test.stderr, self.test.n - 1)])

    @property
    def p(self) -> float | None:
        """Two-sided p of the mean difference, over seeds and documents; None where there is no error."""
        return None if self.error is None else difference_p(self.test.mean, self.error, self.freedom)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of 95 % of the mean difference, over seeds and documents, of this one cell; None where there is no error."""
        if self.error is None:
            return None
        reach = quantile(0.95, self.freedom) * self.error
        return (self.test.mean - reach, self.test.mean + reach)

    @property
    def gain(self) -> float:
        """The mean difference, positive where the distilled students are better."""
        return self.column.sign * self.test.mean

    @property
    def verdict(self) -> str:
        """`better` or `worse`, `leans better` or `leans worse`, `within error`, or `no error known`."""
        if self.error is None or self.corrected_p is None:
            return "no error known"
        side = "better" if self.gain > 0 else "worse"
        if self.corrected_p <= LEVEL:
            return side
        return f"leans {side}" if abs(self.gain) > self.error else "within error"

    @property
    def seeds_better(self) -> int:
        """The number of seeds in which the distilled student is better."""
        return sum(self.column.sign * d > 0 for d in self.by_seed)

    def document(self) -> dict[str, Any]:
        """The difference as JSON."""
        return {
            "column": self.column.title,
            "difference": self.test.mean,
            "by_seed": list(self.by_seed),
            "error": self.error,
            "seed_error": self.test.stderr,
            "document_error": self.document_error,
            "freedom": None if math.isinf(self.freedom) else self.freedom,
            "interval": None if self.interval is None else list(self.interval),
            "p": self.p,
            "p_corrected": self.corrected_p,
            "interval_over_seeds": None if self.test.interval is None else list(self.test.interval),
            "t": self.test.t,
            "p_t": self.test.p_t,
            "p_permutation": self.test.p_permutation,
            "verdict": self.verdict,
            "seeds_better": self.seeds_better,
        }


def documents_error(column: Column, weights: Sequence[tuple[str, float]]) -> tuple[float | None, float]:
    """Standard error over documents of a weighted sum of models' figures, paired where they saw the same; degrees of freedom.

    These are infinitely many where the number of documents is not known.
    """
    influences = [(column.influence(model), weight) for model, weight in weights]
    first = influences[0][0]
    shapes = [None if u is None else {k: len(v) for k, v in u.items()} for u, _ in influences]
    if first is not None and all(s == shapes[0] for s in shapes):
        total = {k: sum(w * u[k] for u, w in influences if u is not None) for k in first}
        counts = {k: documents_behind([u[k] for u, _ in influences if u is not None]) for k in first}
        errors = [(standard_error(np.asarray(u)), counts[k] - 1.0) for k, u in total.items()]
        known = [(e, freedom) for e, freedom in errors if e is not None]
        if len(known) < len(errors):
            return None, math.inf
        return math.hypot(*(e for e, _ in known)), pooled_freedom(known)
    each = [(column.stderr(model), weight) for model, weight in weights]
    if any(e is None for e, _ in each):
        return None, math.inf
    sides = [sum(abs(w) * e for e, w in each if e is not None and (w > 0) == positive) for positive in (True, False)]
    return math.hypot(*sides), math.inf  # seeds of one side saw the same documents: their errors add up
