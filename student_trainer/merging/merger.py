"""Merge a pool of models tensor by tensor, in bounded memory.

    prepared_merger   measures what concerns whole models (`merge_statistics`), on disk where it is large
    Merger.apply      writes every tensor of the merged model, block by block, from the files

The model that is written and a block of one tensor of every model (of a linear layer in RegMean, the whole tensor) are in
memory at once; before that, one task vector (the threshold of Ties), or one model with its statistics. The memory of seven models
in GPT-2's layout is measured in `tests/student_trainer/merging/test_merge_memory.py`. Another `apply` with another scaling makes
a sweep: it reads the files again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.common.errors import DataError
from kd.common.progress import Progress
from kd.student_trainer.merging.merge_settings import MergeSettings
from kd.student_trainer.merging.merge_statistics import LoadRows, MeasuredPool
from kd.student_trainer.merging.method_registry import MergeMethod, TensorPart, merge_method
from kd.student_trainer.merging.pool import ModelPool
from kd.student_trainer.merging.stored_weights import Block, StoredPool, skeleton


@dataclass(frozen=True)
class Merger:
    """A pool of models, and everything its method had to measure."""

    settings: MergeSettings
    stored: StoredPool
    measured: Any
    """What the method's `measure` returned; None where it measures nothing."""

    @property
    def method(self) -> MergeMethod[Any]:
        """The method that the settings name."""
        return merge_method(self.settings)

    @torch.no_grad()
    def apply(self, model: Any, scaling: float | None = None) -> None:
        """Write the merged weights into `model` (see `skeleton`); `scaling` replaces that of the settings."""
        method = self.method
        factor = method.factor(self.settings.scaling if scaling is None else scaling)
        in_one_piece = method.in_one_piece(self.measured)
        tensors = model.state_dict()
        for name in self.stored.names:
            tensor = tensors[name]
            whole = name in in_one_piece and not self.settings.excludes(name)
            for block in [self.stored.whole(name)] if whole else self.stored.blocks(name):
                target = tensor[block.rows] if tensor.dim() else tensor
                target.copy_(self._merged(method, block, factor))

    def _merged(self, method: MergeMethod[Any], block: Block, factor: float) -> Tensor:
        if self.settings.excludes(block.name):
            assert block.base is not None
            return block.base
        assert method.merge is not None
        return method.merge(TensorPart(block, factor, self.settings, self.measured))


def prepared_merger(
    pool: ModelPool, settings: MergeSettings, *, folder: Path, load_rows: LoadRows | None = None
) -> Iterator[Progress[Merger]]:
    """Measure what the method needs; the last record carries the `Merger`. Statistics are written to `folder`.

    load_rows   loads a model with batches of its training rows, for fisher and regmean

    Raises DataError where the models do not fit together, the base is missing, or the method is `ensemble`, which has no
    merged weights.
    """
    method = merge_method(settings)
    if method.live:
        raise DataError(f"{settings.method} has no merged weights", expected="it is evaluated live")
    shape = skeleton(pool)
    stored = StoredPool.of(pool, shape, with_base=method.needs_base or bool(settings.exclude))
    measured, total = None, 0
    if method.measure is not None:
        total = len(pool.models)
        measured = yield from method.measure(MeasuredPool(pool, settings, stored, shape, folder, load_rows))
    yield Progress(total, total, Merger(settings, stored, measured), "prepared")
