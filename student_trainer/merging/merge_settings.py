"""Settings of a merge: the method, what it may be told, and the training rows it may measure.

Nothing here imports torch, so that the command line answers at once. The names in the Literals are the keys of the registries
that hold the functions (`merge_methods.ELECTIONS`, `method_registry.MERGE_METHODS`).
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Literal

from kd.common.errors import DataError
from kd.common.settings import check, setting

MergeMethodName = Literal["simple-average", "task-arithmetic", "ties", "fisher", "regmean", "dare", "ensemble"]
ElectionName = Literal["sum", "mean", "max"]
SCALING = 0.3
"""Default factor of the task vectors, of every method that has one."""


@dataclass(frozen=True)
class RowDefaults:
    """How many training rows a statistic is measured on, where the settings name no number."""

    examples: int
    """Rows per model."""
    batch_size: int
    """Rows per batch."""


FISHER_ROWS = RowDefaults(examples=512, batch_size=8)
GRAM_ROWS = RowDefaults(examples=256, batch_size=32)


@dataclass(frozen=True)
class TiesSettings:
    """How `ties` trims task vectors and combines them."""

    threshold: float = 20.0
    """With ties: percent of each task vector that is kept. A value of 1 or less is a fraction, as in the reference."""
    elect: ElectionName = "sum"
    """With ties: how entries that agree in sign are combined: sum (the reference), mean (the paper) or max."""

    def __post_init__(self) -> None:
        check(self)
        if not 0 < self.kept_share <= 1:
            raise DataError(
                "the share of a task vector to keep is out of bounds",
                found=f"--threshold {self.threshold:g}",
                expected="above 0, at most 100 percent",
            )

    @property
    def kept_share(self) -> float:
        """Share of a task vector that is kept, above 0 and at most 1."""
        return self.threshold / 100 if self.threshold > 1 else self.threshold


@dataclass(frozen=True)
class DareSettings:
    """How `dare` thins task vectors out."""

    density: float = 0.5
    """With dare: share of each task vector that is drawn at random, above 0 and at most 1."""

    def __post_init__(self) -> None:
        check(self)
        if not 0 < self.density <= 1:
            raise DataError(
                "the share to draw is out of bounds", found=f"--density {self.density:g}", expected="in (0, 1]"
            )


@dataclass(frozen=True)
class FisherSettings:
    """How `fisher` weighs the models."""

    normalize: bool = True
    """With fisher: weigh each model by the inverse of the norm of its Fisher information."""
    minimal: float = 1e-6
    """With fisher: small number that is added to every entry of the Fisher information."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class RegmeanSettings:
    """How `regmean` treats the Gram matrices."""

    off_diagonal: float = 0.6
    """With regmean: factor of the off-diagonal entries of the Gram matrices, 0 to 1."""
    mask_pads: bool = False
    """With regmean: leave padding out of the Gram matrices. The reference pads to 512 tokens and counts the padding."""

    def __post_init__(self) -> None:
        check(self)
        if not 0 <= self.off_diagonal <= 1:
            raise DataError(
                "the off-diagonal factor is out of bounds", found=f"{self.off_diagonal:g}", expected="0 to 1"
            )


@dataclass(frozen=True)
class MergeSettings:
    """How to merge. Each method reads its own group; `merge.json` holds all of them."""

    method: MergeMethodName
    """Method: simple-average, task-arithmetic, ties, fisher, regmean, dare, or ensemble (all models run; there are no
    merged weights)."""
    scaling: float | None = setting(None, shown=f"{SCALING:g}")
    """Factor of the task vectors in task-arithmetic, ties and dare."""
    exclude: tuple[str, ...] = setting((), metavar="REGEX", multiple=True)
    """Regular expression: a tensor whose name begins with a match keeps the base's values. May be repeated."""
    seed: int = 0
    """Seed of the drawn training rows and of the entries that dare draws."""
    ties: TiesSettings = field(default_factory=TiesSettings)
    dare: DareSettings = field(default_factory=DareSettings)
    fisher: FisherSettings = field(default_factory=FisherSettings)
    regmean: RegmeanSettings = field(default_factory=RegmeanSettings)

    def __post_init__(self) -> None:
        check(self)
        if self.scaling is not None and not math.isfinite(self.scaling):
            raise DataError("the scaling is not a finite number", found=self.scaling)
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except re.error as error:
                raise DataError("not a regular expression", found=pattern, reason=error) from error

    def excludes(self, name: str) -> bool:
        """Whether the tensor of this name keeps the base's values."""
        return any(re.match(pattern, name) for pattern in self.exclude)


@dataclass(frozen=True)
class MeasuredRowSettings:
    """How many of each model's own training rows `fisher` and `regmean` read, and in what batches."""

    examples: int | None = setting(
        None, shown=f"{FISHER_ROWS.examples} for fisher, {GRAM_ROWS.examples} for regmean", minimum=1
    )
    """Training rows that are measured per model."""
    batch_size: int | None = setting(
        None, shown=f"{FISHER_ROWS.batch_size} for fisher, {GRAM_ROWS.batch_size} for regmean", minimum=1
    )
    """Measured rows per batch."""
    per_example: bool = False
    """With fisher: square the gradient of each row. The reference squares the gradient of a batch."""

    def __post_init__(self) -> None:
        check(self)
