"""How a run goes: its batches, its optimizer, and what is written meanwhile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kd.common.disk.home import kd_home
from kd.common.errors import DataError
from kd.common.settings import check, setting

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adafactor": "adafactor", "adamw8bit": "adamw_bnb_8bit"}
"""Our name -> transformers' name."""
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}
"""Our name -> transformers' name."""

OptimizerName = Literal["adamw", "adafactor", "adamw8bit"]
ScheduleName = Literal["linear", "cosine", "constant"]
# tests compare each with its registry


@dataclass(frozen=True)
class BatchSettings:
    """How many examples a step and the run see."""

    epochs: float = setting(1.0, above=0)
    """Passes over the cache."""
    max_steps: int | None = setting(None, minimum=1)
    """Number of optimizer steps; overrides --epochs."""
    tokens_per_batch: int | None = setting(None, minimum=1, shown="4096")
    """Most tokens per micro-batch and device, padding included."""
    batch_size: int | None = setting(None, minimum=1)
    """Number of examples or packed sequences per micro-batch and device, instead of a token budget."""
    packing: bool = False
    """Put several examples into one sequence of at most --seq-len tokens; none of them sees another."""
    accumulate: int = setting(1, minimum=1)
    """Number of micro-batches per optimizer step."""

    def __post_init__(self) -> None:
        check(self)
        if self.tokens_per_batch is not None and self.batch_size is not None:
            raise DataError("two batch sizes were given", found="--tokens-per-batch and --batch-size", expected="one")

    @property
    def token_budget(self) -> int | None:
        """Tokens per micro-batch; None where examples are counted."""
        return self.tokens_per_batch or (None if self.batch_size else 4096)


@dataclass(frozen=True)
class OptimizerSettings:
    """How a step changes the weights."""

    lr: float = setting(5e-4, above=0)
    """Peak learning rate."""
    weight_decay: float = setting(0.01, minimum=0)
    """Weight decay."""
    max_grad_norm: float = setting(1.0, minimum=0)
    """Largest norm of the gradient; larger ones are scaled down to it."""
    optimizer: OptimizerName = "adamw"
    """Optimizer: adamw, adafactor or adamw8bit (bitsandbytes)."""
    schedule: ScheduleName = "linear"
    """Course of the learning rate after the warm-up: linear or cosine decay, or constant."""
    warmup: float = setting(0.0, minimum=0)
    """Warm-up in steps, or as a share of all steps when below 1."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class LogSettings:
    """What is written while the run goes on. None of it changes the weights."""

    save_every: int = setting(0, minimum=0)
    """Number of steps between checkpoints; 0 saves at the end only."""
    log_every: int = setting(10, minimum=1)
    """Number of steps between lines of metrics.jsonl."""
    rescue_dir: str | None = setting(None, metavar="DIR", folder=True, shown="KD_HOME/rescue")
    """Folder in which the run goes on when --out can no longer be written: a full or read-only disk, no inodes."""
    report_to: str = "none"
    """Tracker that transformers reports to: tensorboard, wandb, trackio, …, or none."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def rescue_folder(self) -> Path:
        """`rescue_dir` as a path, with the default filled in."""
        return kd_home() / "rescue" if self.rescue_dir is None else Path(self.rescue_dir)
