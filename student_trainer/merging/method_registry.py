"""The merge methods by name: what each must be given, and the function that merges part of a tensor.

To add a method, write one function `TensorPart -> Tensor` and one line in `MERGE_METHODS`, and put its name into
`merge_settings.MergeMethodName`. A method that must know something about whole models also names a generator of
`merge_statistics`; what that returns is handed to the function as `part.measured`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from kd.common.errors import DataError
from kd.common.progress import Progress
from kd.student_trainer.merging.merge_methods import (
    average,
    dare,
    fisher_average,
    regmean,
    task_arithmetic,
    ties,
)
from kd.student_trainer.merging.merge_settings import FISHER_ROWS, GRAM_ROWS, SCALING, MergeSettings, RowDefaults
from kd.student_trainer.merging.merge_statistics import (
    FisherStatistics,
    GramStatistics,
    MeasuredPool,
    TrimmedVectors,
    fisher_statistics,
    gram_statistics,
    trimmed_vectors,
)
from kd.student_trainer.merging.stored_weights import Block

Measured = TypeVar("Measured")


@dataclass(frozen=True)
class TensorPart(Generic[Measured]):
    """The same part of one tensor in every model, and what a method may use to merge it."""

    block: Block
    scaling: float
    """Factor of the task vectors; 0 where the method has none."""
    settings: MergeSettings
    measured: Measured
    """What the method's `measure` returned; None where it measures nothing."""

    @property
    def values(self) -> Tensor:
        """[M, ...] float64"""
        return self.block.values

    @property
    def base(self) -> Tensor:
        """[...] float64; only for methods that need a base"""
        assert self.block.base is not None
        return self.block.base


@dataclass(frozen=True)
class MergeMethod(Generic[Measured]):
    """A way to merge models."""

    merge: Callable[[TensorPart[Measured]], Tensor] | None
    """Merges part of a tensor; None = there are no merged weights, all models run."""
    needs_base: bool = False
    scaling: float | None = None
    """Default factor of the task vectors; None = the method has no such factor."""
    measure: Callable[[MeasuredPool], Generator[Progress[Any], None, Measured]] | None = None
    """Measures what concerns whole models, before the first tensor is merged."""
    rows: RowDefaults | None = None
    """The method measures each model's own training rows: how many, where the settings name no number."""
    by_example: bool = False
    """What is measured may be taken from each row alone: `--per-example` makes batches of one row."""
    counts_padding: bool = False
    """Padding counts in what is measured, so rows are padded to the full length as in the reference."""
    in_one_piece: Callable[[Measured], Collection[str]] = lambda measured: ()
    """Names of the tensors that `merge` must be given whole."""

    @property
    def live(self) -> bool:
        """Whether all models run instead of one with merged weights."""
        return self.merge is None

    def factor(self, scaling: float | None) -> float:
        """`scaling`, or the default; 0 where the method has no factor."""
        return scaling if scaling is not None else (self.scaling or 0.0)


def _average(part: TensorPart[None]) -> Tensor:
    return average(part.values)


def _task_arithmetic(part: TensorPart[None]) -> Tensor:
    return task_arithmetic(part.values, part.base, scaling=part.scaling)


def _ties(part: TensorPart[TrimmedVectors]) -> Tensor:
    return ties(
        part.values,
        part.base,
        thresholds=part.measured.thresholds,
        majority=part.measured.majority,
        elect=part.settings.ties.elect,
        scaling=part.scaling,
    )


def _fisher(part: TensorPart[FisherStatistics]) -> Tensor:
    """Parameters are weighted by their information; other tensors, such as buffers, are averaged."""
    information = part.measured.information(part.block)
    if information is None:
        return average(part.values)
    return fisher_average(part.values, information, weights=part.measured.weights, minimal=part.settings.fisher.minimal)


def _regmean(part: TensorPart[GramStatistics]) -> Tensor:
    """Linear layers are solved for, all other tensors averaged. A weight stored as [out, in] is transposed and back."""
    name, layers = part.block.name, part.measured.layers
    if name not in layers:
        return average(part.values)
    values = part.values if layers[name] else part.values.mT
    solved = regmean(values, part.measured.matrices(name), off_diagonal=part.settings.regmean.off_diagonal)
    return solved if layers[name] else solved.T


def _dare(part: TensorPart[None]) -> Tensor:
    """Every block draws with a seed of its own, so that blocks may be merged in any order."""
    seed = zlib.crc32(f"{part.settings.seed} {part.block.name} {part.block.rows.start}".encode())
    return dare(part.values, part.base, density=part.settings.dare.density, scaling=part.scaling, seed=seed)


MERGE_METHODS: dict[str, MergeMethod[Any]] = {
    "simple-average": MergeMethod(_average),
    "task-arithmetic": MergeMethod(_task_arithmetic, needs_base=True, scaling=SCALING),
    "ties": MergeMethod(_ties, needs_base=True, scaling=SCALING, measure=trimmed_vectors),
    "fisher": MergeMethod(_fisher, measure=fisher_statistics, rows=FISHER_ROWS, by_example=True),
    "regmean": MergeMethod(
        _regmean,
        measure=gram_statistics,
        rows=GRAM_ROWS,
        counts_padding=True,
        in_one_piece=lambda grams: grams.layers,
    ),
    "dare": MergeMethod(_dare, needs_base=True, scaling=SCALING),
    "ensemble": MergeMethod(None),
}
"""Name -> method; the names are those of `kd merge --method`."""


def scaled_methods() -> str:
    """The methods that have a factor of the task vectors, for messages."""
    return ", ".join(name for name, method in MERGE_METHODS.items() if method.scaling is not None)


def merge_method(settings: MergeSettings) -> MergeMethod[Any]:
    """The method that the settings name. Raises DataError for a scaling that it does not have."""
    method = MERGE_METHODS[settings.method]
    if settings.scaling is not None and method.scaling is None:
        raise DataError(
            f"{settings.method} has no scaling",
            found=f"--scaling {settings.scaling:g}",
            expected=f"with {scaled_methods()}",
        )
    return method
