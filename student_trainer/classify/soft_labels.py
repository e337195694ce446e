"""Class distributions of a cache: its rows with the teacher's answers, and a Trainer that learns from both.

The losses are the row losses of `kd train` (`LOSSES`). The vocabulary is the classes, and the cache keeps all of them, so
divergences are exact at every temperature that it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer

from kd.cache_builder.store.readers.reading import Reader
from kd.common.errors import CacheMismatchError
from kd.data.instruction_tasks.glue import PAIR, GlueTask, LabelledRow, LabelledRows, glue_task
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_targets import LossTargets

BATCH = 4096
"""Rows that are read at once."""


def read_classes(
    reader: Reader, *, task: str | None = None, limit: int | None = None, temperature: float = 1.0
) -> tuple[LabelledRows, np.ndarray]:
    """The texts of a cache with their labels, and the teacher's log-probabilities `[n, C]` float32 in nats at `temperature`.

    Raises CacheMismatchError for a cache of tokens, of several tasks, or of another task than `task`.
    """
    glue = _task_of(reader, task)
    _refuse_missing_classes(reader)
    numbers = [i for shard in reader.shards for i in range(*reader.manifest.shards[shard][:2])][:limit]
    rows: list[LabelledRow] = []
    log_probs = np.empty((len(numbers), len(glue.labels)), dtype=np.float32)
    for first in range(0, len(numbers), BATCH):
        for row, example in enumerate(reader.read(numbers[first : first + BATCH]), first):
            assert example.targets.token_ids is not None
            rows.append(LabelledRow(example.id, tuple(example.prompt.split(PAIR)), int(example.targets.gold_ids[0])))
            log_probs[row, example.targets.token_ids[0]] = example.targets.logprobs_at(temperature)[0]
    source = {
        "source": "cache",
        "fingerprint": reader.manifest.fingerprint,
        "teacher": str(reader.manifest.provenance.get("teacher")),
    }
    return LabelledRows(glue, str(reader.manifest.provenance.get("split")), tuple(rows), source), log_probs


def _refuse_missing_classes(reader: Reader) -> None:
    """Raise CacheMismatchError where rows do not hold every class: what is missing would be read as anything."""
    classes, stored = len(reader.manifest.labels or ()), reader.config.top_k
    held = stored if reader.top_k is None else reader.top_k
    if reader.config.ragged or held != classes:
        raise CacheMismatchError(
            "rows of this cache do not hold every class",
            cache=reader.root,
            found=f"profile {reader.config.profile}, top-k {held}",
            expected=f"all {classes} classes",
            try_="the cache from which this one was sliced",
        )


def _task_of(reader: Reader, task: str | None) -> GlueTask:
    """The one task of a cache of classes. Raises CacheMismatchError for any other cache, or where it is not `task`."""
    labels = reader.manifest.labels
    if not labels:
        raise CacheMismatchError(
            "this cache holds distributions over tokens, and a classifier learns from classes",
            cache=reader.root,
            expected="a classifier as its teacher",
            try_="kd cache build --teacher CLASSIFIER --data glue/TASK, or kd train",
        )
    tasks = {name for shard in reader.shards for name in reader.example_table(shard, ["task"])["task"]}
    if len(tasks) > 1 or task not in (None, *tasks):
        raise CacheMismatchError(
            "the cache holds rows of another task",
            cache=reader.root,
            found=", ".join(sorted(tasks)),
            expected=task or "one task",
            try_="kd cache build --data glue/TASK",
        )
    glue = glue_task(tasks.pop())
    if glue.labels != labels:
        raise CacheMismatchError(
            "the cache numbers the classes in another order than the task",
            cache=reader.root,
            found=", ".join(labels),
            expected=", ".join(glue.labels),
        )
    return glue


class SoftLabelTrainer(Trainer):  # type: ignore[misc]
    """transformers' Trainer that minimises `alpha * kd + ce_weight * CE`, the mean over the rows of a batch, in nats per row."""

    def __init__(self, *, objective: Objective, **rest: Any) -> None:
        super().__init__(**rest)
        self.objective = objective
        self.model_accepts_loss_kwargs = False  # a mean over micro-batches, as without a teacher
        self._parts: list[Tensor] = []
        """`[3]` kd, ce and number of rows of each micro-batch since the last line; on the device, so that no step waits"""

    def compute_loss(
        self, model: Any, inputs: Mapping[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of the batch; `inputs` hold `labels [B]` and `teacher [B, C]` beside the token ids."""
        model_inputs = dict(inputs)
        labels, teacher = model_inputs.pop("labels"), model_inputs.pop("teacher")
        outputs = model(**model_inputs)
        logits = outputs.logits.float()
        classes = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
        targets = LossTargets(labels, classes, teacher, torch.zeros_like(teacher[:, 0]))
        total, kd, ce = self.objective(logits, targets)
        self._parts.append(torch.stack([kd.detach().sum(), ce.detach().sum(), ce.detach().new_tensor(len(labels))]))
        return (total.mean(), outputs) if return_outputs else total.mean()

    def log(self, logs: dict[str, float], *rest: Any, **options: Any) -> None:
        """Add both parts of the loss to the log."""
        if "loss" in logs and self._parts:
            kd, ce, rows = torch.stack(self._parts).sum(dim=0).tolist()
            logs = logs | {"ce": ce / rows} | ({} if self.objective.loss == "ce" else {"kd": kd / rows})
            self._parts = []
        super().log(logs, *rest, **options)
