"""Scores of the student while it learns: before the first step, every so many steps or epochs, and after the last.

The caller decides what is scored, and how (`Midway.score`): evaluation is not imported here. The training is bit-identical
with and without it: the states of all generators, each module's mode and the model's own `forward` are restored, and the
clock of speeds and of the run stands still. A student with LoRA adapters is scored as a merged copy: merging and
taking apart again would round its weights.

`evaluations.jsonl` in the run's folder gets one line each, {"step", "epoch", "seconds", …what `score` returns}; step 0 is the
baseline. Lines after the checkpoint of a resumed run are dropped, as in `metrics.jsonl`, and made again.
"""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback

from kd.common.errors import DataError
from kd.models.loading import Model
from kd.models.tokenizer import Tokenizer
from kd.student_trainer.batches.batch_plan import BatchPlan
from kd.student_trainer.faster.compiled_layers import uncompiled
from kd.student_trainer.run_folder import append_evaluation, read_evaluations
from kd.student_trainer.saving.best_weights import BestSoFar, ChosenFigure, drop_weights_after, keep_weights, take_back
from kd.student_trainer.saving.trained_weights import merged_without_warning
from kd.student_trainer.trainer import DistillationTrainer


@dataclass(frozen=True)
class Midway:
    """What to score in mid-training, and when."""

    score: Callable[[Model, Tokenizer], Mapping[str, Any]]
    """A model in evaluation mode -> what a line of the log holds, as JSON takes it."""
    every: int | None = None
    """Optimizer steps; None = after every pass over the cache."""
    on_record: Callable[[Mapping[str, Any]], None] | None = None
    """Called with every line, on the main process."""
    best: ChosenFigure | None = None
    """The figure by which the run chooses the weights that it ends with; None = the last ones."""
    patience: int | None = None
    """Number of scorings in a row without a better figure after which the run ends; None = never. It needs `best`."""

    def __post_init__(self) -> None:
        if self.patience is not None and self.best is None:
            raise DataError("nothing says which figure must get better", found="patience", expected="best as well")
        if self.every is not None and self.every < 1:
            raise DataError(
                "--eval-every must be at least 1 step",
                found=f"--eval-every {self.every}",
                expected="a number from 1, or epoch",
            )


def evaluation_steps(plan: BatchPlan, multiple: int, every: int | None) -> frozenset[int]:
    """Optimizer steps (of `multiple` micro-batches each) after which to score: 0, the last, and those between.

    A step that holds the end of an epoch counts as its end.
    """
    last = len(plan) // multiple
    if every is not None:
        return frozenset({0, *range(every, last, every), last})
    return frozenset({0, *(-(-end // multiple) for end in plan.epoch_ends()), last})


class MidwayEvaluations(TrainerCallback):  # type: ignore[misc]
    """Scores the student at its steps, on the main process; the others wait."""

    def __init__(self, trainer: DistillationTrainer, midway: Midway, model: Model, tokenizer: Tokenizer) -> None:
        """`model` is the student itself; where `trainer.model` is another, adapters are around it."""
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise DataError(
                "a student in parts cannot be scored in mid-training",
                found="FSDP or DeepSpeed",
                try_="--eval-tasks left out, and kd eval afterwards",
            )
        self.trainer, self.midway, self.model, self.tokenizer = trainer, midway, model, tokenizer
        multiple = trainer.args.gradient_accumulation_steps * trainer.args.world_size
        self.steps = evaluation_steps(trainer.plan, multiple, midway.every)
        self.multiple = multiple
        self.best = None if midway.best is None else BestSoFar(midway.best)

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == 0:
            self.score(0)
        elif self.midway.best is not None and self.trainer.is_world_process_zero():
            drop_weights_after(self.trainer.folder, state.global_step)
            self.best = BestSoFar.after(self.midway.best, read_evaluations(self.trainer.folder))

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step in self.steps:
            self.score(state.global_step)
            if state.global_step < state.max_steps and self._has_stopped_learning():
                control.should_training_stop = control.should_log = True

    def _has_stopped_learning(self) -> bool:
        """Whether the run ends here because no scoring of late was better; all processes agree."""
        if self.midway.patience is None or self.best is None:
            return False
        said = [self.best.since >= self.midway.patience]
        broadcast_object_list(said)
        return said[0]

    def take_best(self) -> int | None:
        """Give the student the weights of the best scoring, on the main process; returns its step.

        None where the last weights stay: no figure chooses, none was finite, or the weights are not there any more.
        """
        if self.best is None or not self.trainer.is_world_process_zero():
            return None
        step = self.best.step
        if take_back(self.trainer.folder, self.trainer.model, step):
            return step
        if step is not None:
            self.trainer.say(f"the weights of step {step:,} are not there any more: the last ones are kept")
        return None

    def score(self, step: int) -> None:
        """Score the student as it is now and write the line of `step`."""
        started = time.perf_counter()
        if self.trainer.is_world_process_zero():
            with undisturbed(self.model):
                scores = self.midway.score(self._whole(), self.tokenizer)
            epoch = self.trainer.plan.examples_before(step * self.multiple) / len(self.trainer.train_dataset)
            record = {"step": step, "epoch": epoch, "seconds": time.perf_counter() - started, **scores}
            self.trainer.run_place.write(partial(append_evaluation, record=record))
            if self.best is not None and self.best.add(record):
                document = {"step": step, "value": self.best.value}
                self.trainer.run_place.write(partial(keep_weights, model=self.trainer.model, document=document))
            if self.midway.on_record is not None:
                self.midway.on_record(record)
        PartialState().wait_for_everyone()
        self.trainer.stand_still(time.perf_counter() - started)

    def _whole(self) -> Model:
        """The student, adapters merged into a copy; one in 4 bits as it is, because its weights cannot take the sum."""
        adapted = self.trainer.model
        if adapted is self.model or getattr(self.model, "is_quantized", False):
            return self.model
        with merged_without_warning():
            return copy.deepcopy(adapted).merge_and_unload().eval()


@contextmanager
def undisturbed(model: Model) -> Iterator[None]:
    """The model with its own `forward`, in evaluation mode; afterwards everything is as it was, generators included."""
    modes = [(module, module.training) for module in model.modules()]
    forward = model.__dict__.pop("forward", None)
    use_cache = model.config.use_cache if hasattr(model.config, "use_cache") else None
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    model.eval()
    try:
        with torch.random.fork_rng(devices=devices), uncompiled(model):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        for module, training in modes:
            module.training = training
        if forward is not None:
            model.__dict__["forward"] = forward
        if use_cache is not None:
            model.config.use_cache = use_cache
