"""transformers' Trainer over a batch plan: read-ahead, per-position normalisation, one record per logged step.

Three overrides, no loop of our own: where batches come from, what a step's loss is divided by (all positions of
the step, over accumulation and devices, so that neither changes the result), and what a log line says.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from kd.data.errors import DataError
from kd.student_trainer.stream import BatchPlan, PlannedBatches, Prefetcher


@dataclass(frozen=True)
class StepRecord:
    """One line of `metrics.jsonl`; losses are means per position over the steps since the last line, in nats."""

    step: int
    steps_total: int
    epoch: float
    """Passes over the cache so far."""
    loss: float
    """alpha * T^2 * kd + (1 - alpha) * ce"""
    kd: float | None
    """distillation loss without T^2; None for --loss ce"""
    ce: float
    lr: float
    grad_norm: float
    tokens: int
    """target positions trained on so far, all devices"""
    tokens_per_second: float
    """since the last line"""
    wait_share: float
    """share of the time since the last line that training waited for data"""


class DistillationTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer over a batch plan, with per-position normalisation across accumulation and devices."""

    def __init__(self, *, plan: BatchPlan, epoch_rows: int, has_kd: bool, log_path: Path,
                 on_step: Callable[[StepRecord], None] | None, **rest: Any) -> None:  # fmt: skip
        super().__init__(**rest)
        self.model_accepts_loss_kwargs = True  # losses come normalised by the whole step's positions
        self.loss_is_scaled_for_ga = True
        self.plan = plan
        self.epoch_rows = epoch_rows
        self.has_kd = has_kd
        self.log_path = log_path
        self.on_step = on_step
        self.last_record: StepRecord | None = None
        self.tokens_this_run = 0
        self.waited = 0.0
        self._prefetcher: Prefetcher | None = None
        self._iterator: Iterator[Any] | None = None
        self._sums: list[Tensor] = []
        """`[3]` loss, kd and ce of each micro-batch since the last line, left on the device: no wait per step"""
        self._positions = 0
        self._mark = (0, time.perf_counter(), 0.0)
        self._tokens_before = 0
        self.remove_callback(transformers.PrinterCallback)
        self.remove_callback(transformers.trainer_callback.ProgressCallback)
        self.add_callback(_Bookkeeping(self))

    def get_train_dataloader(self) -> Any:
        """The plan's batches, each decoded as a whole."""
        loader = DataLoader(
            self.train_dataset, batch_sampler=PlannedBatches(self.plan), collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The next micro-batches of one step, read ahead on a thread, and the positions they hold over all devices."""
        if self._iterator is not epoch_iterator:
            self.close()
            self._iterator, self._prefetcher = epoch_iterator, Prefetcher(epoch_iterator)
        assert self._prefetcher is not None
        batches = [batch for _, batch in zip(range(num_batches), self._prefetcher, strict=False)]
        positions = torch.tensor(sum(len(batch["gold_ids"]) for batch in batches), device=device)
        if self.args.world_size > 1:
            positions = self.accelerator.gather(positions.unsqueeze(0)).sum()
        return batches, positions

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False,
                     num_items_in_batch: Any = None) -> Any:  # fmt: skip
        """Sum over this micro-batch's positions divided by the positions of the whole step."""
        outputs = model(**inputs)
        self._sums.append(torch.stack([outputs["loss"], outputs["kd"], outputs["ce"]]).detach())
        self._positions += len(inputs["gold_ids"])
        # DDP averages gradients over devices; the sum is wanted
        loss = outputs["loss"] * self.args.world_size / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    @property
    def tokens_seen(self) -> int:
        """Positions trained on since step 0, all devices."""
        return self._tokens_before + self.tokens_this_run

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Turn the Trainer's log into a `StepRecord`; pass both on."""
        if "loss" in logs:
            here = torch.stack(self._sums).double().sum(dim=0)
            sums = torch.cat([here, torch.tensor([self._positions], dtype=here.dtype, device=here.device)])
            if self.args.world_size > 1:
                sums = self.accelerator.reduce(sums, reduction="sum")
            sums = sums.cpu()
            self._sums, self._positions = [], 0
            count = int(sums[3])
            loss = float(sums[0] / count)
            if not math.isfinite(loss):
                raise DataError("training diverged", where=f"step {self.state.global_step}", found=f"loss {loss}",
                                try_="a smaller --lr, or --warmup")  # fmt: skip
            self.tokens_this_run += count
            now = time.perf_counter()
            waited = self.waited + (self._prefetcher.waited if self._prefetcher else 0.0)
            elapsed = now - self._mark[1]
            record = StepRecord(
                step=self.state.global_step,
                steps_total=self.state.max_steps,
                epoch=self.tokens_seen / self.epoch_rows,
                loss=loss,
                kd=float(sums[1] / count) if self.has_kd else None,
                ce=float(sums[2] / count),
                lr=float(logs["learning_rate"]),
                grad_norm=float(logs.get("grad_norm", 0.0)),
                tokens=self.tokens_seen,
                tokens_per_second=count / elapsed,
                wait_share=(waited - self._mark[2]) / elapsed,
            )
            self._mark = (self.state.global_step, now, waited)
            self.last_record = record
            logs |= {"loss": record.loss, "ce": record.ce} | ({"kd": record.kd} if record.kd is not None else {})
            if self.is_world_process_zero():
                with self.log_path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(record)) + "\n")
                if self.on_step is not None:
                    self.on_step(record)
        super().log(logs, start_time)

    def close(self) -> None:
        """Stop reading ahead."""
        if self._prefetcher is not None:
            self._prefetcher.close()
            self.waited += self._prefetcher.waited
            self._prefetcher = self._iterator = None


class _Bookkeeping(TrainerCallback):  # type: ignore[misc]
    """Counts what was trained before a checkpoint, starts the clock with the first step, and logs the last one."""

    def __init__(self, trainer: DistillationTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        done = state.global_step * args.gradient_accumulation_steps * args.world_size
        plan = self.trainer.plan
        _, rows = self.trainer.train_dataset.reader.lengths() if done else (None, None)
        if rows is not None:
            self.trainer._tokens_before = int(sum(rows[list(batch)].sum() for batch in plan.batches[:done]))
        self.trainer._mark = (state.global_step, time.perf_counter(), 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step >= state.max_steps or (control.should_save and args.save_strategy != "no"):
            # a checkpoint ends a line of the log, so that resuming loses no part of one, and divergence, which
            # logging notices, never gets into a checkpoint
            control.should_log = True
