"""Settings of `kd merge`, `kd classify eval` and `kd classify matrix`. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Literal

from kd.common.settings import check, setting
from kd.student_trainer.classify.classify_settings import MAX_LENGTH
from kd.student_trainer.merging.merge_settings import MeasuredRowSettings, MergeSettings

Selection = Literal["dev", "dev-half"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class GlueRowSettings:
    """Which rows classifiers are scored on, and how."""

    task_root: Path | None = None
    """Folder of local rows, DIR/TASK/SPLIT.jsonl. By default the hub's rows."""
    limit: int | None = setting(None, minimum=1)
    """Score only this many rows of each task, from the first on."""
    max_length: int = setting(MAX_LENGTH, minimum=1)
    """Tokens of a row; longer rows are cut."""
    tokens_per_batch: int = setting(4096, minimum=1)
    """Tokens of a batch when rows are scored, padding included."""
    device: str = "auto"
    """Device: auto, cpu or cuda."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ClassifierEvaluation:
    """Settings of `kd classify eval`."""

    task: str | None = None
    """GLUE task of all models. By default the last part of --data, or the task in each model's classify.json."""
    data: str | None = None
    """Rows: glue/TASK (from the hub, or a folder), or a folder of rows with --task."""
    split: str = "dev"
    """Rows to score: dev (GLUE's validation rows) or train."""
    rows: GlueRowSettings = field(default_factory=GlueRowSettings)
    dtype: DtypeName = "auto"
    """Data type of the weights: auto (as stored, float32 on a CPU), float32, bfloat16 or float16."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class MatrixSettings:
    """Settings of `kd classify matrix`."""

    pool: Path
    """YAML file of models named by their GLUE tasks (docs/merging.md), or a folder of classifiers."""
    out: Path | None = setting(None, folder=True)
    """Folder for matrix.json and matrix.md. By default nothing is written."""
    rows: GlueRowSettings = field(default_factory=GlueRowSettings)

    def __post_init__(self) -> None:
        check(self)


def parse_sweep(text: str) -> tuple[float, ...]:
    """`0:1:0.1` -> 0, 0.1, … 1 without rounding errors, or numbers separated by commas. Raises ValueError."""
    try:
        numbers = [Decimal(part) for part in text.replace(":", ",").split(",")]
        return tuple(float(number) for number in (_steps(numbers) if ":" in text else numbers))
    except (ValueError, InvalidOperation) as error:
        raise ValueError("FIRST:LAST:STEP, e.g. 0:1:0.1, or numbers separated by commas") from error


def _steps(numbers: Sequence[Decimal]) -> list[Decimal]:
    first, last, step = numbers
    if step <= 0 or last < first:
        raise ValueError
    return [first + step * i for i in range(int((last - first) / step) + 1)]


@dataclass(frozen=True)
class SweepSettings:
    """Which scalings of the task vectors are tried, and how one of them is chosen."""

    sweep: tuple[float, ...] = setting((), metavar="A:B:STEP", parse=parse_sweep)
    """Scalings to try, e.g. 0:1:0.1; the model of the best average accuracy is written. By default only --scaling."""
    select_on: Selection = "dev"
    """Rows that a scaling of --sweep is chosen on: dev (the rows it is scored on), or dev-half (the even rows of each
    task, and the odd rows score it)."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def halves(self) -> bool:
        """Whether the rows are split into those that choose and those that score."""
        return self.select_on == "dev-half"


@dataclass(frozen=True, kw_only=True)
class MergeRun:
    """Settings of `kd merge`."""

    pool: Path
    """YAML file of the models (docs/merging.md), or a folder of classifiers."""
    merge: MergeSettings
    out: Path = setting(folder=True)
    """Folder of the merged model, its tables and its figure."""
    scalings: SweepSettings = field(default_factory=SweepSettings)
    score: bool = True
    """Score classifiers on GLUE's dev rows."""
    classifiers: bool = False
    """Also write a whole classifier for each task, to OUT/classifiers/TASK."""
    rows: GlueRowSettings = field(default_factory=GlueRowSettings)
    measured_rows: MeasuredRowSettings = field(default_factory=MeasuredRowSettings)

    def __post_init__(self) -> None:
        check(self)
