"""transformers' Trainer over a batch plan: read-ahead, per-position normalisation, one record per logged step.

There are four overrides and no loop of our own: where batches come from, what a step's loss is divided by (all positions
of the step, over accumulation and devices, so that neither changes the result), what a log line says, and when a checkpoint
counts.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from kd.common.disk.disk_errors import WriteError, write_failure
from kd.common.errors import DataError
from kd.common.files import canonical_json, write_atomic
from kd.models.batching.padded_batches import on_device
from kd.student_trainer.batches.batch_plan import BatchPlan, PlannedBatches
from kd.student_trainer.batches.read_ahead import Prefetcher
from kd.student_trainer.head import forward_arguments
from kd.student_trainer.prepare import Prepared
from kd.student_trainer.run_folder import RECORDS, StepRecord, append_step, read_steps
from kd.student_trainer.saving.checkpoints import (
    BATCHES,
    KEPT,
    checkpoints_of,
    remove_checkpoint,
    remove_old_checkpoints,
    seal_checkpoint,
)
from kd.student_trainer.saving.rescue import RunPlace


def _units(batch: Mapping[str, Any]) -> int:
    """Number that a distillation loss is a mean over: examples with groups, or positions."""
    return batch["units"] if "units" in batch else len(batch["gold_ids"])


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer over a batch plan, with per-position normalisation across accumulation and devices."""

    def __init__(
        self,
        *,
        plan: BatchPlan,
        done: int,
        prepared: Prepared,
        has_kd: bool,
        run_place: RunPlace,
        say: Callable[[str], object],
        on_step: Callable[[StepRecord], None] | None,
        **rest: Any,
    ) -> None:
        super().__init__(**rest)
        self.model_accepts_loss_kwargs = True  # losses come normalised by the whole step's positions
        self.loss_is_scaled_for_ga = True
        self.plan = plan
        self.done = done
        """Micro-batches before the checkpoint that the run continues from."""
        self.prepared = prepared
        self.rows = prepared.all_scored
        """Scored positions of all examples."""
        self.has_kd = has_kd
        self.run_place = run_place
        """Where the run writes."""
        self.say = say
        self.on_step = on_step
        self.last_record: StepRecord | None = None
        self.tokens_this_run = 0
        self.waited = self.paused = 0.0
        self._prefetcher: Prefetcher | None = None
        self._iterator: Iterator[Any] | None = None
        self._sums: list[Tensor] = []
        """`[3]` loss, kd and ce of each micro-batch since the last line, left on the device: no wait per step"""
        self._positions = self._units = 0
        self._aligned = torch.zeros(2, dtype=torch.int64)
        self._kd_scale: Tensor | None = None
        self._mark = (0, time.perf_counter(), 0.0)
        self._tokens_before = 0
        self.remove_callback(transformers.PrinterCallback)
        self.remove_callback(transformers.trainer_callback.ProgressCallback)
        self.add_callback(_Bookkeeping(self))

    def get_train_dataloader(self) -> Any:
        """The plan's batches, each decoded as a whole."""
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=PlannedBatches(self.plan, self.done),
            collate_fn=self._collated,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def _collated(self, examples: Sequence[Any]) -> dict[str, Any]:
        """A batch; `units` stays a number on the host, because reading a tensor back from a GPU would wait for it."""
        batch: dict[str, Any] = self.data_collator(examples)
        return batch | {"units": int(batch["units"])} if "units" in batch else batch

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The next micro-batches of one step, read ahead on a thread, and the positions they hold over all devices."""
        if self._iterator is not epoch_iterator:
            self.close()
            self._iterator, self._prefetcher = epoch_iterator, Prefetcher(epoch_iterator)
        assert self._prefetcher is not None
        batches = [batch for _, batch in zip(range(num_batches), self._prefetcher, strict=False)]
        counted = torch.tensor([sum(len(batch["gold_ids"]) for batch in batches), sum(map(_units, batches))])
        counts = on_device(counted, device)
        if self.args.world_size > 1:
            counts = self.accelerator.gather(counts.unsqueeze(0)).sum(dim=0)
        # a batch without any group must not divide by zero
        self._kd_scale = counts[0] / counts[1].clamp(min=1) if any("units" in batch for batch in batches) else None
        return batches, counts[0]

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum over this micro-batch's positions divided by the positions of the whole step."""
        self._units += _units(inputs)
        inputs.pop("units", None)
        if (aligned := inputs.pop("aligned_bytes", None)) is not None:
            self._aligned = self._aligned.to(aligned.device) + aligned  # moved once, then no wait per step
        if self._kd_scale is not None:
            inputs["kd_scale"] = self._kd_scale
        outputs = model(**forward_arguments(inputs))
        self._sums.append(torch.stack([outputs["loss"], outputs["kd"], outputs["ce"]]).detach())
        self._positions += len(inputs["gold_ids"])
        # DDP averages gradients over devices; the sum is wanted
        loss = outputs["loss"] * self.args.world_size / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    @property
    def tokens_seen(self) -> int:
        """Positions trained on since step 0, all devices."""
        return self._tokens_before + self.tokens_this_run

    @property
    def aligned_share(self) -> float | None:
        """Share of the targets' bytes that this process trained on in aligned groups; None where nothing was aligned."""
        aligned, total = self._aligned.tolist()
        return aligned / total if total else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Turn the Trainer's log into a `StepRecord`; pass both on."""
        if "loss" in logs:
            record = self._record(logs)
            self.last_record = record
            logs |= {"loss": record.loss, "ce": record.ce} | ({"kd": record.kd} if record.kd is not None else {})
            if self.is_world_process_zero():
                self.run_place.write(partial(append_step, record=record))
                if self.on_step is not None:
                    self.on_step(record)
        super().log(logs, start_time)

    def _record(self, logs: Mapping[str, float]) -> StepRecord:
        """What happened since the last line, over all devices. Raises DataError for a loss that is not finite."""
        total, kd, ce, positions, units = self._take_sums()
        count = int(positions)
        loss = total / count
        if not math.isfinite(loss):
            raise DataError(
                "training diverged",
                where=f"step {self.state.global_step}",
                found=f"loss {loss}",
                try_="a smaller --lr, or --warmup",
            )
        self.tokens_this_run += count
        now = time.perf_counter()
        waited = self.waited + (self._prefetcher.waited if self._prefetcher else 0.0)
        elapsed = now - self._mark[1]
        wait_share = (waited - self._mark[2]) / elapsed
        self._mark = (self.state.global_step, now, waited)
        return StepRecord(
            step=self.state.global_step,
            steps_total=self.state.max_steps,
            epoch=self.tokens_seen / self.rows,
            loss=loss,
            kd=kd / max(units, 1.0) if self.has_kd else None,
            ce=ce / count,
            lr=float(logs["learning_rate"]),
            grad_norm=float(logs.get("grad_norm", 0.0)),
            tokens=self.tokens_seen,
            tokens_per_second=count / elapsed,
            wait_share=wait_share,
        )

    def _take_sums(self) -> list[float]:
        """Loss, kd, ce, positions and units since the last line, over all devices; counting starts again."""
        losses = torch.stack(self._sums).double().sum(dim=0)
        counts = torch.tensor([self._positions, self._units], dtype=losses.dtype, device=losses.device)
        sums = torch.cat([losses, counts])
        if self.args.world_size > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        self._sums, self._positions, self._units = [], 0, 0
        values: list[float] = sums.tolist()
        return values

    @property
    def folder(self) -> Path:
        """Folder that the run writes into now."""
        return self.run_place.folder

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a checkpoint; one for which there is no room anywhere is left out, unless the run ends with it."""
        ends = self.control.should_training_stop and self.state.global_step < self.state.max_steps
        try:
            self.run_place.write(lambda folder: self._checkpoint_in(folder, model, trial), patient=ends)
        except WriteError as error:
            if ends or self.args.world_size > 1:
                raise
            reason = error.details["found"]
            self.say(f"no checkpoint after step {self.state.global_step} ({reason}): training goes on")

    def _checkpoint_in(self, folder: Path, model: Any, trial: Any) -> None:
        """Write a checkpoint, seal it when every process has written its part, and remove the one before the last.

        Where room is short, the older of two whole checkpoints makes room.
        """
        checkpoint = folder / f"checkpoint-{self.state.global_step}"
        self.args.output_dir = str(folder)
        try:
            self._sealed_checkpoint(checkpoint, model, trial)
        except Exception as error:
            if write_failure(error, folder) is None or self.args.world_size > 1:
                raise
            remove_checkpoint(checkpoint)
            if len(checkpoints_of(folder)) < KEPT:
                raise
            remove_old_checkpoints(folder, kept=KEPT - 1)
            self._try_again(checkpoint, model, trial)

    def _try_again(self, checkpoint: Path, model: Any, trial: Any) -> None:
        try:
            self._sealed_checkpoint(checkpoint, model, trial)
        except Exception:
            remove_checkpoint(checkpoint)
            raise

    def _sealed_checkpoint(self, checkpoint: Path, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            known = self.plan.known(self.state.global_step * self.plan.multiple_of)
            if known is not None:
                write_atomic(checkpoint / BATCHES, canonical_json(known))
            seal_checkpoint(checkpoint, RECORDS)
            remove_old_checkpoints(checkpoint.parent)

    def stand_still(self, seconds: float) -> None:
        """Leave time that was not spent on training out of every speed."""
        self.paused += seconds
        self._mark = (self._mark[0], self._mark[1] + seconds, self._mark[2])

    def close(self) -> None:
        """Stop reading ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self.waited += self._prefetcher.waited
            self._prefetcher = self._iterator = None


class StopWithCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Ends the training after the step in which `event` was set, with a checkpoint."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Called by the Trainer."""
        if self.event.is_set():
            control.should_save = control.should_training_stop = True


class _Bookkeeping(TrainerCallback):  # type: ignore[misc]
    """Counts what was trained before a checkpoint, starts the clock with the first step, and logs the last one."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        done = state.global_step * args.gradient_accumulation_steps * args.world_size
        assert done == self.trainer.done  # or the loader would hand out empty batches, or the same ones again
        self.trainer._tokens_before = self._rows_of(done)
        self.trainer._mark = (state.global_step, time.perf_counter(), 0.0)

    def _rows_of(self, done: int) -> int:
        """Scored positions of the first `done` micro-batches: from the line of the log at the checkpoint, or else counted."""
        if not done:
            return 0
        lines = read_steps(self.trainer.folder)
        if lines and lines[-1].step == self.trainer.state.global_step:
            return lines[-1].tokens
        return sum(self.trainer.prepared.scored(batch.examples) for batch in islice(self.trainer.plan, done))

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step >= state.max_steps or (control.should_save and args.save_strategy != "no"):
            # a checkpoint ends a line of the log, so that resuming loses no part of one, and divergence, which
            # logging notices, never gets into a checkpoint
            control.should_log = True
