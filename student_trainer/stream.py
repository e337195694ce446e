"""From a cache to batches: which examples, in which order, as which tensors.

All batches of a run are laid out before the first step: epoch after epoch in the reader's (seed, epoch) order,
cut by token budget or by count. So the number of steps is known, resuming means skipping, and neither batch size
nor world size changes the order. Reading and decoding run on a thread beside the training step.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kd.cache_builder.reader import CachedExample, CacheReader
from kd.student_trainer.losses import LossTargets, Objective

PREFETCHED_BATCHES = 4


@dataclass(frozen=True)
class BatchPlan:
    """Every micro-batch of a run, in order."""

    batches: tuple[tuple[int, ...], ...]
    """Example numbers."""
    epochs: tuple[int, ...]
    """Epoch of each batch."""

    def __len__(self) -> int:
        return len(self.batches)


def plan_batches(reader: CacheReader, lengths: np.ndarray, *, seed: int, epochs: float = 1.0,
                 count: int | None = None, tokens_per_batch: int | None = None, batch_size: int | None = None,
                 multiple_of: int = 1) -> BatchPlan:  # fmt: skip
    """Lay out `epochs` epochs (at least one example), or exactly `count` micro-batches.

    `lengths [E]` tokens per example. A batch holds `batch_size` examples, or as many as fit `tokens_per_batch`
    with their padding. The number of batches is rounded down to a multiple of `multiple_of` (accumulation steps
    times world size), so that every step is whole.
    """
    batches: list[tuple[int, ...]] = []
    numbers: list[int] = []
    epoch = 0
    while True:
        order = reader.epoch_order(seed, epoch)
        if count is None:
            remaining = epochs - epoch
            if remaining <= 0:
                break
            order = order[: max(round(len(order) * min(1.0, remaining)), 0 if batches else 1)]
        cut = list(_cut(order, lengths, tokens_per_batch, batch_size))
        batches += cut
        numbers += [epoch] * len(cut)
        epoch += 1
        if count is not None and len(batches) >= count:
            batches, numbers = batches[:count], numbers[:count]
            break
    whole = max(len(batches) // multiple_of, 1) * multiple_of
    missing = max(0, whole - len(batches))  # fewer batches than one step needs: repeat from the start
    batches += [batches[i % len(batches)] for i in range(missing)]
    numbers += [numbers[-1]] * missing
    return BatchPlan(tuple(batches[:whole]), tuple(numbers[:whole]))


def _cut(order: np.ndarray, lengths: np.ndarray, tokens: int | None, size: int | None) -> Iterator[tuple[int, ...]]:
    batch: list[int] = []
    longest = 0
    for example in order.tolist():
        longest = max(longest, int(lengths[example]))
        full = len(batch) == size if size is not None else bool(batch) and (len(batch) + 1) * longest > (tokens or 0)
        if full:
            yield tuple(batch)
            batch, longest = [], int(lengths[example])
        batch.append(example)
    if batch:
        yield tuple(batch)


class PlannedBatches:
    """A batch sampler for `torch.utils.data.DataLoader`: the plan, as it stands."""

    batch_size = None
    drop_last = False

    def __init__(self, plan: BatchPlan) -> None:
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(batch) for batch in self.plan.batches)


class CachedExamples(Dataset[CachedExample]):
    """The cache as a map-style data set that reads whole batches at once."""

    def __init__(self, reader: CacheReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, example: int) -> CachedExample:
        return self.reader[example]

    def __getitems__(self, examples: Sequence[int]) -> list[CachedExample]:
        return self.reader.read(examples)


@dataclass(frozen=True)
class Collator:
    """Examples -> tensors: padded `input_ids [B, T]`, `attention_mask [B, T]`, `positions [N]` and the targets.

    `positions` are flat indices into `[B * T]` of the tokens that *predict* the rows: the row for token t of an
    example sits at the position before it.
    """

    objective: Objective

    def __call__(self, examples: Sequence[CachedExample]) -> dict[str, Tensor]:
        ids = [e.input_ids for e in examples]
        width = max(len(i) for i in ids)
        padded = np.zeros((len(ids), width), dtype=np.int64)
        mask = np.zeros((len(ids), width), dtype=np.int64)
        positions = []
        for b, (example, row) in enumerate(zip(examples, ids, strict=True)):
            padded[b, : len(row)] = row
            mask[b, : len(row)] = 1
            positions.append(b * width + np.arange(len(example.context_ids) - 1, len(row) - 1))
        batch: dict[str, np.ndarray] = {
            "input_ids": padded,
            "attention_mask": mask,
            "positions": np.concatenate(positions),
            "gold_ids": np.concatenate([e.targets.gold_ids for e in examples]),
        }
        kind, temperature = self.objective.tail, self.objective.temperature
        if kind in ("ghost", "renorm"):
            batch["token_ids"] = np.concatenate([e.targets.token_ids for e in examples])
            logprobs = np.concatenate([e.targets.logprobs_at(temperature) for e in examples])
            batch["logprobs"] = logprobs.astype(np.float32)
            batch["tail_mass"] = np.maximum(0.0, 1.0 - np.exp(logprobs).sum(axis=1)).astype(np.float32)
        if kind == "sampled":
            batch["sample_ids"] = np.concatenate([e.targets.sample_ids for e in examples])
            batch["sample_counts"] = np.concatenate([e.targets.sample_counts for e in examples])
        return {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()}


TARGET_FIELDS = ("gold_ids", "token_ids", "logprobs", "tail_mass", "sample_ids", "sample_counts")


def loss_targets(batch: dict[str, Tensor]) -> LossTargets:
    """The target tensors of a collated batch."""
    return LossTargets(**{name: batch[name] for name in TARGET_FIELDS if name in batch})


class Prefetcher:
    """Pulls an iterator on a thread, at most `PREFETCHED_BATCHES` ahead; exceptions surface at `next`."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.waited = 0.0
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(PREFETCHED_BATCHES)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pull, name="kd-prefetch", daemon=True)
        self._thread.start()

    def _pull(self) -> None:
        try:
            for item in self.source:
                if not self._put(("item", item)):
                    return
            self._put(("end", None))
        except BaseException as error:
            self._put(("error", error))

    def _put(self, message: tuple[str, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(message, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        kind, value = self._queue.get()
        self.waited += time.perf_counter() - started
        if kind == "item":
            return value
        self._queue.put((kind, value))  # asked again, the same answer
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Stop the thread; what it had read ahead is dropped."""
        self._stop.set()
        self._thread.join(timeout=5.0)
