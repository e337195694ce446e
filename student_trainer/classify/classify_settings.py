"""Settings of `kd classify train`. Nothing here imports torch, so that the command line answers at once.

Optimizers, schedules, precisions and adapters are those of `kd train` (`student_trainer.configuration`); the losses are its row
losses.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from kd.common.errors import DataError
from kd.common.settings import check, setting
from kd.student_trainer.configuration.learning_settings import LossSettings
from kd.student_trainer.configuration.model_settings import LoraSettings, PrecisionName
from kd.student_trainer.configuration.step_settings import OptimizerName, ScheduleName

ClassLoss = Literal["kl", "reverse-kl", "jsd", "ce"]
MAX_LENGTH = 512
"""Tokens of a row, as in the reference."""


@dataclass(frozen=True)
class ClassRows:
    """Which labelled rows a classifier learns from."""

    task: str | None = None
    """GLUE task: cola, mnli, mrpc, qnli, qqp, rte or sst2. By default the last part of --data."""
    data: str | None = None
    """Rows: glue/TASK (from the hub, or a folder), or a folder of rows with --task. By default the hub's rows."""
    cache: str | None = None
    """Cache of a classifier's answers, which holds the rows too: path, URL or fingerprint. Replaces --data."""
    task_root: Path | None = None
    """Folder of local rows, DIR/TASK/SPLIT.jsonl. By default the hub's rows."""
    split: str = "train"
    """Rows to train on: train or dev."""
    limit: int | None = setting(None, minimum=1)
    """Use only this many rows, from the first on."""

    def __post_init__(self) -> None:
        check(self)
        if self.task is None and self.data is None and self.cache is None:
            raise DataError("no task was named", try_="--task sst2, --data glue/sst2, or --cache PATH")


@dataclass(frozen=True)
class ClassObjective:
    """How to learn from the answers in a cache."""

    loss: ClassLoss | None = setting(None, shown="kl")
    """With --cache: distillation loss kl, reverse-kl or jsd, or ce, which uses only the labels of the same rows."""
    alpha: float | None = setting(None, shown="1")
    """With --cache: weight of the distillation loss."""
    ce_weight: float | None = setting(None, shown="1 - alpha")
    """With --cache: weight of the cross-entropy with the labels."""
    temperature: float = setting(1.0, above=0)
    """With --cache: temperature of the softmaxes, one that the cache holds. Divergences are multiplied by its square."""
    beta: float = 0.5
    """With --loss jsd: weight of KL(teacher || mixture), between 0 and 1."""

    def __post_init__(self) -> None:
        check(self)
        if not 0 < self.beta < 1:
            raise DataError("beta is out of bounds", found=f"--beta {self.beta:g}", expected="between 0 and 1")

    @property
    def loss_settings(self) -> LossSettings:
        """The same settings as `kd train` has them."""
        return LossSettings(
            loss=self.loss or "kl",
            alpha=self.alpha,
            ce_weight=self.ce_weight,
            temperature=self.temperature,
            beta=self.beta,
        )


@dataclass(frozen=True)
class ClassSteps:
    """The optimizer and its steps. The defaults are those of transformers' Trainer, as in the reference."""

    epochs: float = setting(3.0, above=0)
    """Passes over the rows."""
    max_steps: int | None = setting(None, minimum=1)
    """Optimizer steps; overrides --epochs."""
    batch_size: int = setting(8, minimum=1)
    """Rows per micro-batch and device."""
    accumulate: int = setting(1, minimum=1)
    """Micro-batches per optimizer step."""
    lr: float = setting(5e-5, above=0)
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay of AdamW."""
    warmup: float = 0.0
    """Warm-up in steps, or as a share of all steps when below 1."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient; a larger one is scaled down."""
    optimizer: OptimizerName = "adamw"
    """Optimizer: adamw, adafactor or adamw8bit."""
    schedule: ScheduleName = "linear"
    """Learning rate after the warm-up: linear or cosine decay to 0, or constant."""
    precision: PrecisionName = "fp32"
    """Precision of the forward and backward pass: fp32, or bf16 (autocast)."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class ClassInputs:
    """How rows become batches of tokens."""

    max_length: int = setting(MAX_LENGTH, minimum=1)
    """Tokens of a row. Of a pair that is too long, the longer text is cut first."""
    pad_to_max: bool = False
    """Pad every row to --max-length, as the reference does. The logits are the same."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """Settings of one training run. Equal settings, rows and library versions give equal weights on one machine."""

    model: str
    """Language model to train: hub id, folder, or random:NAME. It gets a new head."""
    rows: ClassRows
    out: str = setting(folder=True)
    """Folder of the run."""
    objective: ClassObjective = field(default_factory=ClassObjective)
    steps: ClassSteps = field(default_factory=ClassSteps)
    inputs: ClassInputs = field(default_factory=ClassInputs)
    adapters: LoraSettings = field(default_factory=LoraSettings)
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    tokenizer: str | None = None
    """Tokenizer of a random model: folder or hub id."""
    device: str = "auto"
    """Device: auto, cpu or cuda."""
    seed: int = 0
    """Seed of the new head, of the order of the rows and of dropout."""
    log_every: int = setting(50, minimum=1)
    """Optimizer steps between two lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        check(self)
        rows = self.rows
        if rows.cache is None:
            unused = [f"--{name.replace('_', '-')}" for name in _changed(self.objective)]
            headline = "labels alone have no teacher"
        else:
            unused = [
                f"--{name.replace('_', '-')}" for name in ("data", "task_root", "split") if name in _changed(rows)
            ]
            headline = "a cache holds its own rows"
        if unused:
            raise DataError(headline, found=", ".join(unused), try_="leave it out, or --cache PATH with a loss")


def _changed(settings: Any) -> list[str]:
    """Fields of a settings group whose values are not the defaults."""
    return [f.name for f in fields(settings) if getattr(settings, f.name) != f.default]
