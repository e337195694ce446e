"""Means over rows that are not independent, and how sure they are.

A score is a ratio over documents d,

    R = Σ_d s_d / Σ_d c_d              s_d: summed nats (or hits) of a document, c_d: its tokens, bytes or rows

Tokens of one document share its topic and its style: counted as independent they make a standard error several
times too small. So documents are the unit that is drawn, and R is linearised around its value:

    u_d = (s_d - R c_d) / Σ c          se(R)² = G/(G-1) Σ_d u_d²              G documents; unknown for G = 1

Two models scored on the same documents mostly find the same ones hard; the error of their difference is

    se(A - B)² = G/(G-1) Σ_d (u_d^A - u_d^B)²

which is why an `Estimate` keeps its u and not only its standard error. A smooth function f of R has f'(R) u_d.

Cochran, Sampling Techniques (1977), chapter 6; clustered and paired errors for language models: Miller 2024,
Adding Error Bars to Evals, arXiv:2411.00640.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kd.common.errors import DataError
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.rows.example import Example, row_and_template


@dataclass(frozen=True)
class Estimate:
    """A number measured on documents, and how far each of them moves it."""

    value: float
    """The number, in the metric's own unit."""
    influence: np.ndarray
    """[G] float64: u_d of each document, in the same unit."""
    n: int
    """Number of tokens, bytes or rows that were averaged over."""
    resampled: float | None = None
    """Standard error from drawing documents anew, for an estimate that is no ratio; None for a ratio."""

    @property
    def stderr(self) -> float | None:
        """Standard error clustered by document; None for a single document."""
        return standard_error(self.influence) if self.resampled is None else self.resampled

    def exponential(self) -> Estimate:
        """exp(value) with the delta method's error; infinite where float64 overflows."""
        value = math.exp(self.value) if self.value < 709 else math.inf
        return Estimate(value, self.influence * value, self.n)


@dataclass(frozen=True)
class Documents:
    """Which document each example belongs to."""

    names: tuple[str, ...]
    """[G] names of the documents, in order of first appearance."""
    numbers: np.ndarray
    """[examples] int64: index into `names` of each example's document."""

    @classmethod
    def of_examples(cls, ids: Sequence[str], kind: str) -> Documents:
        """Group example ids: blocks `name#3` of documents, and renderings of a conversation, by name; a pair for itself, or with
        the same row in other templates.
        """
        blocks = kind in ("documents", CONVERSATIONS)
        keys = [i.rpartition("#")[0] or i for i in ids] if blocks else [row_and_template(i)[0] for i in ids]
        places = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        return cls(tuple(places), np.array([places[key] for key in keys], dtype=np.int64))

    @classmethod
    def of_prompts(cls, examples: Sequence[Example]) -> Documents:
        """Examples of one task with one prompt are one document: they were asked, and answered, once. So are those of one row in
        several templates: rows whose prompts in the first template are the same.
        """
        rows = [row_and_template(e.id) for e in examples]
        firsts_of_rows: dict[str, tuple[int, str, str]] = {}
        for (row, template), e in zip(rows, examples, strict=True):
            first = (template or 0, e.task, e.prompt)
            firsts_of_rows[row] = min(firsts_of_rows.get(row, first), first)
        places: dict[tuple[int, str, str], int] = {}
        numbers = [places.setdefault(firsts_of_rows[row], len(places)) for row, _ in rows]
        firsts = dict(zip(reversed(numbers), reversed([e.id for e in examples]), strict=True))
        return cls(tuple(firsts[d] for d in range(len(places))), np.array(numbers, dtype=np.int64))

    def part(self, inside: np.ndarray) -> Documents:
        """The documents of some examples, `inside [examples]` bool, numbered anew."""
        kept, numbers = np.unique(self.numbers[inside], return_inverse=True)
        return Documents(tuple(self.names[d] for d in kept.tolist()), numbers.astype(np.int64))

    def spread(self, estimate: Estimate, part: Documents) -> Estimate:
        """An estimate over `part` with one influence for each of these documents, and the same standard error."""
        count, size = len(part.names), len(self.names)
        scale = math.sqrt(count / (count - 1) * (size - 1) / size) if count > 1 else math.nan
        influence = np.zeros(size)
        places = {name: d for d, name in enumerate(self.names)}
        influence[[places[name] for name in part.names]] = estimate.influence * (scale if count < size else 1.0)
        if count < 2:
            influence[:] = math.nan
        return replace(estimate, influence=influence)

    @property
    def digest(self) -> str:
        """Hex digest of the names in order: equal for two evaluations of the same documents."""
        return hashlib.blake2b("\0".join(self.names).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    def ratio(self, sums: np.ndarray, counts: np.ndarray) -> Estimate:
        """Σ sums / Σ counts with its influences.

        sums    [examples] float64, in the metric's unit times count
        counts  [examples] tokens, bytes or rows; raises DataError when they add up to 0
        """
        size = len(self.names)
        s_G = np.bincount(self.numbers, weights=sums, minlength=size)
        c_G = np.bincount(self.numbers, weights=counts, minlength=size)
        total = float(c_G.sum())
        if total == 0:
            raise DataError("there is nothing to average over", found=f"{len(self.numbers)} examples, a count of 0")
        value = float(s_G.sum()) / total
        return Estimate(value, (s_G - value * c_G) / total, round(total))


def standard_error(influence: np.ndarray) -> float | None:
    """`[G]` influences -> their standard error; None for fewer than two documents or an infinite estimate."""
    size = len(influence)
    if size < 2 or not bool(np.isfinite(influence).all()):
        return None
    return math.sqrt(size / (size - 1) * float(np.square(influence).sum()))


def documents_behind(influences: Sequence[np.ndarray]) -> int:
    """Number of documents that move any of these figures: one task's, where a text has several. At least 2."""
    moved = np.any([np.asarray(u) != 0 for u in influences], axis=0)
    return max(int(np.count_nonzero(moved)) or len(moved), 2)


def difference_stderr(left: np.ndarray, right: np.ndarray) -> float | None:
    """Standard error of the difference of two estimates over the same documents, `[G]` and `[G]`; None as above."""
    return standard_error(np.asarray(left) - np.asarray(right))


def per_example(values: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Sum `values [rows]` over consecutive examples of `lengths` rows (each at least 1): `[examples]` float64."""
    starts = np.cumsum([0, *lengths[:-1]])
    return np.asarray(np.add.reduceat(values.astype(np.float64), starts))


def figures_by_task(metric: str, documents: Documents, values: np.ndarray, tasks: Sequence[str]) -> dict[str, Estimate]:
    """`metric_mean_of_tasks`, and `metric/TASK` for every task, by name.

    values  [examples] float64, of examples that are documents of their own
    tasks   [examples] task of each
    """
    by_task = means_by_task(documents, values, tasks)
    return {f"{metric}_mean_of_tasks": mean_of(by_task), **{f"{metric}/{task}": e for task, e in by_task.items()}}


def means_by_task(documents: Documents, values: np.ndarray, tasks: Sequence[str]) -> dict[str, Estimate]:
    """The mean of `values [examples]` within each task, sorted by name.

    Other tasks' documents have no influence on it, so the G of the standard error is the task's own G_t: influences
    are scaled by the root of [G_t/(G_t-1)] / [G/(G-1)]. A task of one document has no known error.
    """
    size = len(documents.names)
    by_task: dict[str, Estimate] = {}
    for task in sorted(set(tasks)):
        inside = np.array([name == task for name in tasks], dtype=np.float64)
        mean = documents.ratio(values * inside, inside)
        count = len(np.unique(documents.numbers[inside > 0]))
        scale = math.sqrt(count / (count - 1) * (size - 1) / size) if count > 1 else math.nan
        by_task[task] = Estimate(mean.value, mean.influence * scale, mean.n)
    return by_task


def mean_of(estimates: Mapping[str, Estimate]) -> Estimate:
    """The unweighted mean: every task counts alike, however many examples it has. Errors add in squares."""
    parts = list(estimates.values())
    influence = np.mean([e.influence for e in parts], axis=0)
    return Estimate(sum(e.value for e in parts) / len(parts), influence, sum(e.n for e in parts))


def with_tasks(
    metric: str,
    documents: Documents,
    statistics: np.ndarray,
    tasks: Sequence[str],
    score: Callable[[np.ndarray], float],
    *,
    seed: int,
) -> dict[str, Estimate]:
    """As `figures_by_task`, and `metric` over all, of a score that is no mean: see `from_statistics`."""
    means: dict[str, Estimate] = {}
    for task in sorted(set(tasks)):
        inside = np.array([name == task for name in tasks])
        part = documents.part(inside)
        means[task] = documents.spread(from_statistics(part, statistics[inside], score, seed=seed), part)
    by_task = {f"{metric}/{task}": estimate for task, estimate in means.items()}
    return {
        metric: from_statistics(documents, statistics, score, seed=seed),
        f"{metric}_mean_of_tasks": mean_of(means),
        **by_task,
    }


DRAWS = 1000
"""Number of draws of the bootstrap: its own error is then about 2 % of the standard error."""


def from_statistics(
    documents: Documents, statistics: np.ndarray, score: Callable[[np.ndarray], float], *, seed: int
) -> Estimate:
    """A score of summed statistics, such as BLEU, with the standard error of the bootstrap over documents.

    Influences are the jackknife's, u_d = (G-1)/G (mean of the θ without one document - θ without d): through them two
    models are compared in pairs. For a ratio both errors tend to the linearised one. Efron and Tibshirani, An
    Introduction to the Bootstrap (1993), chapters 6 and 11.

    statistics   [examples, S] float64
    score        sums [S] -> the score
    """
    size = len(documents.names)
    sums_GS = np.zeros((size, statistics.shape[1]))
    np.add.at(sums_GS, documents.numbers, statistics)
    total = sums_GS.sum(axis=0)
    if size < 2:
        return Estimate(score(total), np.full(size, math.nan), len(statistics))
    without = np.array([score(total - one) for one in sums_GS])
    generator = np.random.default_rng(seed)
    draws = np.array(
        [score(np.bincount(generator.integers(size, size=size), minlength=size) @ sums_GS) for _ in range(DRAWS)]
    )
    influence = (size - 1) / size * (without.mean() - without)
    return Estimate(score(total), influence, len(statistics), float(draws.std(ddof=1)))
