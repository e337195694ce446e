"""Settings of a run as transformers' `TrainingArguments`."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from kd.common.errors import DataError, unknown_name
from kd.common.extras import EXTRAS, MissingPackageError, require_package
from kd.models.model_request import resolve_device
from kd.student_trainer.batches.batch_plan import BatchPlan
from kd.student_trainer.configuration.step_settings import OPTIMIZERS, SCHEDULES, OptimizerSettings
from kd.student_trainer.configuration.train_config import TrainConfig

ASKED = (
    ("FSDP", "ACCELERATE_USE_FSDP", "is_fsdp_enabled"),
    ("DeepSpeed", "ACCELERATE_USE_DEEPSPEED", "is_deepspeed_enabled"),
)
"""Way of sharing a model, the variable that `accelerate launch` sets for it, and the Trainer's word on whether it happens."""

MANY_EXAMPLES = 50_000_000
"""Examples whose counting takes so long that it is said."""


def training_arguments(config: TrainConfig) -> TrainingArguments:
    """Arguments of the Trainer; under torchrun, making them joins the other processes. Raises DataError."""
    require_tracker(config.logging.report_to)
    device = config.model.device
    pinned = torch.cuda.is_available() and device != "cpu"
    arguments = TrainingArguments(
        output_dir=str(config.folder),
        learning_rate=config.optimization.lr,
        weight_decay=config.optimization.weight_decay,
        max_grad_norm=config.optimization.max_grad_norm,
        optim=OPTIMIZERS[config.optimization.optimizer],
        lr_scheduler_type=SCHEDULES[config.optimization.schedule],
        gradient_accumulation_steps=config.batches.accumulate,
        bf16=config.model.precision == "bf16",
        use_cpu=resolve_device(device) == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        logging_strategy="steps",
        logging_steps=config.logging.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.logging.save_every else "no",
        save_steps=config.logging.save_every or 500,
        report_to=config.logging.report_to,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=pinned,
        ddp_find_unused_parameters=False,  # every parameter takes part in the loss
        # batches go to a GPU between steps: reading ahead must not wait for the steps that were launched before
        accelerator_config={"even_batches": False, "dispatch_batches": False, "non_blocking": pinned},
    )
    if arguments.n_gpu > 1:  # one process uses one device: DataParallel would split positions apart from their rows
        arguments._n_gpu = 1
    return arguments


def count_steps(plan: BatchPlan, say: Callable[[str], object]) -> None:
    """Count the micro-batches of a run that no setting gives, on the main process for all: the learning rate needs it."""
    if not plan.to_count:
        return
    state = PartialState()
    if state.is_main_process and plan.to_count > MANY_EXAMPLES:
        say(f"counting the steps of {plan.to_count:,} examples, some 0.15 s a million; --max-steps begins at once")
    counts = [plan.count_batches() if state.is_main_process else {}]
    if state.num_processes > 1:
        broadcast_object_list(counts)
        plan.know_counts(counts[0])


def set_steps(arguments: TrainingArguments, settings: OptimizerSettings, steps: int) -> None:
    """Enter the number of optimizer steps, and the warm-up that follows from it."""
    warmup = settings.warmup
    arguments.max_steps = steps
    arguments.warmup_steps = int(warmup if warmup >= 1 else round(warmup * steps))


TRACKER_PACKAGES = {"azure_ml": "azureml", "flyte": "flytekit"}
"""Name of a tracker that transformers does not list as available although it is -> the package to look for."""


def require_tracker(name: str) -> None:
    """Raise DataError for a tracker that transformers does not know, MissingPackageError for one that is not installed."""
    from transformers.integrations import get_available_reporting_integrations, get_reporting_integration_callbacks
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    if name in EXTRAS["trackers"]:
        require_package(name, f"--report-to {name}")
    try:
        get_reporting_integration_callbacks([] if name == "none" else [name])
    except ValueError as error:
        raise unknown_name("tracker", name, (*INTEGRATION_TO_CALLBACK, "none"), where="--report-to") from error
    package = TRACKER_PACKAGES.get(name, name)
    if name != "none" and name not in get_available_reporting_integrations() and find_spec(package) is None:
        raise MissingPackageError(
            f"--report-to {name} needs its package",
            found="not installed",
            try_=f"pip install {package.replace('_', '-')}, or --report-to none",
        )


def refuse_other_wrapping(trainer: Any) -> None:
    """Raise DataError where several processes were to share a model and would each hold all of it.

    On CPUs accelerate falls back from FSDP to DDP. A student that fits into no single device fails much later then.
    """
    for name, variable, enabled in ASKED:
        asked = os.environ.get(variable, "false").lower() in ("true", "1")
        if asked and not getattr(trainer, enabled) and trainer.args.world_size > 1:
            raise DataError(
                f"accelerate does not share the model as {name} would",
                found=f"{trainer.accelerator.distributed_type.value}: every process holds the whole model",
                expected=f"{name}, as {variable}=true asks",
                try_=f"processes with a GPU each, or an accelerate configuration without {name}",
            )
