"""What a training will take, from its first steps: steps, time and memory. Nothing is kept of them. And what it will write.

estimate = estimate_training(config)
estimate.seconds, estimate.memory_bytes
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import TrainerCallback

from kd.common.errors import DataError
from kd.common.settings import flat
from kd.models.loading import parameter_count
from kd.student_trainer.configuration.train_config import TrainConfig, config_from
from kd.student_trainer.faster.compiled_layers import clear_compile_errors
from kd.student_trainer.prepare import prepare
from kd.student_trainer.run_folder import resume_point
from kd.student_trainer.saving.checkpoints import KEPT
from kd.student_trainer.saving.rescue import RunPlace
from kd.student_trainer.saving.trained_weights import output_dtype
from kd.student_trainer.trainer_arguments import training_arguments
from kd.student_trainer.training import student_and_trainer

MEASURED_STEPS = 10
"""Optimizer steps that are made."""
ADAMW_STATES = 2
"""Numbers in float32 that AdamW keeps for each parameter that it trains; other optimizers keep fewer."""


WIDE = 4
"""Bytes of a number in a checkpoint: float32."""
STATES = {"adamw": 2.0, "adamw8bit": 0.5, "adafactor": 0.1}
"""Numbers in float32 that an optimizer keeps for each trained parameter; adafactor's rows and columns are fewer than a tenth."""


@dataclass(frozen=True)
class TrainEstimate:
    """What a training will take on this machine, judged by its first steps.

    >>> import kd
    >>> estimate = kd.estimate_training(cache="cache", student="demo", max_steps=2)
    >>> isinstance(estimate, kd.TrainEstimate), estimate.steps, estimate.weights_bytes
    (True, 2, 2227584)
    """

    steps: int
    """Optimizer steps of the whole run."""
    measured_steps: int
    """Steps that were made to find out."""
    seconds_per_step: float
    """Mean over the measured steps without the first, which warms up; with `compile` without the first half."""
    seconds: float
    """Time of all steps. Scores, checkpoints and loading are not in it."""
    tokens_per_second: float
    """Target positions per second in the measured steps."""
    memory_bytes: int
    """Most memory that was in use so far: of the GPU where there is one, else of the process."""
    device: str
    """Where that memory is: cuda or cpu."""
    weights_bytes: int
    """Size of the student as it will be written."""
    checkpoint_bytes: int
    """Size of a checkpoint, at most: weights and optimizer states in float32. The last two are kept."""


class _Stopwatch(TrainerCallback):  # type: ignore[misc]
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def estimate_training(
    config: TrainConfig | None = None,
    *,
    steps: int = MEASURED_STEPS,
    say: Callable[[str], object] = warnings.warn,
    **settings: Any,
) -> TrainEstimate:
    """Make the first steps of a training in a folder that is removed, and judge the whole run by them.

    config     settings as an object; None = they are given by name
    steps      number of steps that are made; the first warms up and is not counted
    say        receives what `kd.train` would say
    settings   those of `kd.train`; `out` is not needed and not written

    Raises KdError as `kd.train` does before its first step, and DataError where the run is too short to judge, or has several
    processes.

    >>> import kd
    >>> estimate = kd.estimate_training(cache="cache", student="demo", epochs=2, batch_size=1, steps=3)
    >>> estimate.steps > estimate.measured_steps, estimate.seconds > 0, estimate.device in ("cpu", "cuda")
    (True, True, True)
    """
    if config is None or settings:
        config = config_from({"out": "out", **({} if config is None else flat(config)), **settings})
    with tempfile.TemporaryDirectory(prefix="kd-estimate-") as folder:
        return _estimated(replace(config, out=folder), steps, say)


def _estimated(config: TrainConfig, steps: int, say: Callable[[str], object]) -> TrainEstimate:
    """The estimate of a run whose folder may be filled."""
    prepared = prepare(config, touch=True)
    arguments = training_arguments(config)
    if arguments.world_size > 1:
        raise DataError(
            "an estimate is made in one process", found=f"{arguments.world_size} processes", try_="without torchrun"
        )
    arguments.save_strategy = "no"
    run_place = RunPlace(config.folder, config.folder, say=say, moves=False)
    student, trainer = student_and_trainer(prepared, arguments, run_place=run_place, say=say, on_step=None)
    planned, measured = arguments.max_steps, min(steps, arguments.max_steps)
    if measured < 2:
        raise DataError("the run is too short to be estimated", found=f"{planned} steps", expected="at least 2")
    arguments.max_steps = measured
    watch = _Stopwatch()
    trainer.add_callback(watch)
    try:
        with clear_compile_errors():
            trainer.train()
    finally:
        trainer.close()
    ends = watch.ends[measured // 2 :] if config.model.compile and measured > 3 else watch.ends
    each = (ends[-1] - ends[0]) / (len(ends) - 1)
    on_gpu = arguments.device.type == "cuda"
    trained = sum(p.numel() for p in student.trained.parameters() if p.requires_grad)
    size = torch.empty(0, dtype=output_dtype(config.weights.save_dtype, prepared.request)).element_size()
    return TrainEstimate(
        steps=planned,
        measured_steps=measured,
        seconds_per_step=each,
        seconds=each * planned,
        tokens_per_second=trainer.tokens_this_run / measured / each,
        memory_bytes=torch.cuda.max_memory_allocated() if on_gpu else peak_memory(),
        device=arguments.device.type,
        weights_bytes=student.parameters * size,
        checkpoint_bytes=trained * (1 + ADAMW_STATES) * 4,
    )


def peak_memory() -> int:
    """Most bytes of memory that this process has used so far."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def plan_training(config: TrainConfig | None = None, **settings: Any) -> dict[str, Any]:
    """What `kd.train` with the same settings would write, and how large it is: the dry run of a training. Nothing is written.

    config     settings as an object; None = they are given by name
    settings   those of `kd.train`

    Returns examples, steps, parameters and bytes: what `kd train --dry-run --json` prints. No weights are loaded. Raises KdError
    where the training would refuse to start: cache and student do not belong together, or `out` is used.

    >>> import kd
    >>> plan = kd.plan_training(cache="cache", student="demo", out="planned", max_steps=2)
    >>> plan["steps"], plan["weights_bytes"]
    (2, 2227584)
    """
    if config is None or settings:
        config = config_from({**({} if config is None else flat(config)), **settings})
    resume_point(config.folder, {}, resume=False)
    prepared = prepare(config)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    steps = len(prepared.plan(config.batches.accumulate * processes)) // (config.batches.accumulate * processes)
    parameters = parameter_count(prepared.request)
    dtype = output_dtype(config.weights.save_dtype, prepared.request)
    adapters = config.adapters.lora is not None
    every = config.logging.save_every
    checkpoints = min(KEPT, -(-steps // every)) if every else 0
    return {
        "out": str(config.folder),
        "examples": len(prepared.sizes),
        "steps": steps,
        "parameters": parameters,
        "weights_dtype": str(dtype).removeprefix("torch."),
        "weights_bytes": None
        if adapters and config.adapters.lora_save == "adapter"
        else parameters * torch.empty(0, dtype=dtype).element_size(),
        "checkpoints_at_once": checkpoints,
        # of adapters, whose number is known when the student is loaded, this is far more than they take
        "checkpoint_bytes_at_most": round(parameters * WIDE * (1 + STATES[config.optimization.optimizer])),
        "pushed_to": config.weights.push_to_hub,
    }
