"""Which examples make which batch, in which order.

All batches of a run are laid out before the first step: epoch after epoch in the reader's (seed, epoch) order,
cut by token budget or by count. The number of steps is therefore known, a resumed run skips batches, and the order does not
depend on batch size, packing or world size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kd.models.batching.packing import Packer, Size


class Ordered(Protocol):
    """As much of a reader as a plan needs."""

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        """Every example once, in the order of this epoch."""


@dataclass(frozen=True)
class BatchPlan:
    """Every micro-batch of a run, in order."""

    batches: tuple[tuple[int, ...], ...]
    """Example numbers of each batch."""
    epochs: tuple[int, ...]
    """Epoch of each batch."""
    tokens: tuple[int, ...]
    """Tokens of each batch, without padding."""
    padded: tuple[int, ...]
    """Tokens of each batch, with padding."""

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def padding_share(self) -> float:
        """Share of the tokens a model reads that are padding."""
        return 1 - sum(self.tokens) / sum(self.padded)


def plan_batches(
    reader: Ordered,
    lengths: np.ndarray,
    *,
    seed: int,
    first_epoch: int = 0,
    epochs: float = 1.0,
    count: int | None = None,
    tokens_per_batch: int | None = None,
    batch_size: int | None = None,
    capacity: Size | None = None,
    multiple_of: int = 1,
) -> BatchPlan:
    """Lay out `epochs` epochs from `first_epoch` on (at least one example), or exactly `count` micro-batches.

    `lengths [E, sides]` tokens per example, `[E]` where there is one side. A batch holds `batch_size` sequences, or as
    many as fit `tokens_per_batch` with their padding; a sequence is one example, or, with a `capacity`, what
    `kd.models.batching.packing` puts into so many tokens. The number of batches is rounded down to a multiple of `multiple_of`
    (accumulation steps times world size), so that every step is whole.
    """
    sizes = [tuple(size) for size in lengths.reshape(len(lengths), -1).tolist()]
    batches: list[Packer] = []
    numbers: list[int] = []
    epoch = 0
    while True:
        order = reader.epoch_order(seed, first_epoch + epoch)
        if count is None:
            remaining = epochs - epoch
            if remaining <= 0:
                break
            order = order[: max(round(len(order) * min(1.0, remaining)), 0 if batches else 1)]
        cut = list(_cut(order, sizes, tokens_per_batch, batch_size, capacity))
        batches += cut
        numbers += [first_epoch + epoch] * len(cut)
        epoch += 1
        if count is not None and len(batches) >= count:
            batches, numbers = batches[:count], numbers[:count]
            break
    whole = max(len(batches) // multiple_of, 1) * multiple_of
    missing = max(0, whole - len(batches))  # fewer batches than one step needs: repeat from the start
    batches += [batches[i % len(batches)] for i in range(missing)]
    numbers += [numbers[-1]] * missing
    kept = batches[:whole]
    return BatchPlan(
        tuple(tuple(b.examples) for b in kept),
        tuple(numbers[:whole]),
        tuple(b.tokens for b in kept),
        tuple(b.padded for b in kept),
    )


def _cut(
    order: np.ndarray, sizes: Sequence[Size], tokens: int | None, count: int | None, capacity: Size | None
) -> Iterator[Packer]:
    batch = Packer(capacity)
    for example in order.tolist():
        sequences, padded = batch.with_one_more(sizes[example])
        full = sequences > count if count is not None else bool(batch.examples) and padded > (tokens or 0)
        if full:
            yield batch
            batch = Packer(capacity)
        batch.add(example, sizes[example])
    if batch.examples:
        yield batch


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
