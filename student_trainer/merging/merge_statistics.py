"""What a merge method must know about whole models before the first tensor is merged.

    trimmed_vectors      ties: the threshold of each task vector and the majority sign, from the stored weights
    fisher_statistics    fisher: diagonal Fisher information of each model, from its own training rows
    gram_statistics      regmean: Gram matrices of the inputs of every linear layer, from the same rows

Each is a generator of `Progress` that returns its measurements. Statistics of rows lie on disk, a folder per model: only one
model and its statistics are in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.common.errors import DataError
from kd.common.progress import Progress
from kd.student_trainer.merging.measurements import Batches, Logits, fisher_information, gram_matrices, linear_layers
from kd.student_trainer.merging.merge_methods import fisher_weights, trimmed
from kd.student_trainer.merging.merge_settings import MergeSettings
from kd.student_trainer.merging.pool import ModelPool, PoolModel
from kd.student_trainer.merging.stored_weights import Block, StoredModel, StoredPool, read_rows, read_whole


@dataclass(frozen=True)
class RowModel:
    """A model of the pool, ready to be measured on its own training rows."""

    part: Any
    """The module that is merged: the backbone of a classifier, or a whole language model."""
    logits: Logits
    """A batch -> predictions of the model."""
    batches: Batches
    """Training rows, the same at every pass."""


LoadRows = Callable[[PoolModel], RowModel]


@dataclass(frozen=True)
class MeasuredPool:
    """A pool before it is merged: what a measurement may read."""

    pool: ModelPool
    settings: MergeSettings
    stored: StoredPool
    skeleton: Any
    """The model to be written, without memory for its weights."""
    folder: Path
    """Where statistics are written."""
    load_rows: LoadRows | None
    """Loads a model with batches of its training rows; None = there are no rows."""


@dataclass(frozen=True)
class TrimmedVectors:
    """Measurements of `ties`."""

    thresholds: Tensor
    """[M] float32: smallest size of an entry that is kept"""
    majority: float
    """Sign of the sum of the signs of all entries of the summed task vectors."""


def trimmed_vectors(measured: MeasuredPool) -> Generator[Progress[Any], None, TrimmedVectors]:
    """Measure the task vectors one after the other, then their sum."""
    models, kept_share = measured.pool.models, measured.settings.ties.kept_share
    thresholds = []
    for number, model in enumerate(models):
        yield Progress(number, len(models), note=f"threshold of {model.name}")
        thresholds.append(kth_magnitude(measured.stored, number, kept_share))
    threshold_M = torch.tensor(thresholds, dtype=torch.float32)
    return TrimmedVectors(threshold_M, majority_sign(measured.stored, threshold_M))


def kth_magnitude(stored: StoredPool, number: int, kept_share: float) -> float:
    """The smallest size, in float32, of an entry of one model's task vector that is kept.

    It is the k-th smallest of d sizes, k = d - int(d kept_share): where sizes differ, int(d kept_share) + 1 entries are at
    least that large. 0 where everything is kept. Holds one task vector.
    """
    size = sum(math.prod(stored.models[number].shapes[name]) for name in stored.names)
    k = size - int(size * kept_share)
    if k == 0:
        return 0.0
    sizes = np.empty(size, dtype=np.float32)
    alone = replace(stored, models=(stored.models[number],))
    start = 0
    for name in stored.names:
        for block in alone.blocks(name):
            assert block.base is not None
            part = (block.values[0] - block.base).float().abs().flatten().numpy()
            sizes[start : start + len(part)] = part
            start += len(part)
    sizes.partition(k - 1)
    return float(sizes[k - 1])


def majority_sign(stored: StoredPool, thresholds: Tensor) -> float:
    """Sign of the sum of the signs of all entries of the trimmed task vectors' sum."""
    count = 0.0
    for name in stored.names:
        for block in stored.blocks(name):
            assert block.base is not None
            count += float(trimmed(block.values, block.base, thresholds).sum(dim=0).sign().sum())
    return float(np.sign(count))


@dataclass(frozen=True)
class FisherStatistics:
    """Measurements of `fisher`."""

    files: tuple[StoredModel, ...]
    """M models: Fisher information by tensor"""
    weights: Tensor
    """[M] float64 weights of the models"""

    def information(self, block: Block) -> Tensor | None:
        """`[M, ...]` float64 Fisher information of a block's entries; None for a tensor that is no parameter."""
        if block.name not in self.files[0].places:
            return None
        return torch.stack([read_rows(file.places[block.name], block.rows) for file in self.files])


def fisher_statistics(measured: MeasuredPool) -> Generator[Progress[Any], None, FisherStatistics]:
    """Measure the Fisher information of every model. Raises DataError where there are no training rows."""

    def information(model: RowModel) -> list[dict[str, Tensor]]:
        return [fisher_information(model.part, model.logits, model.batches)]

    files = yield from _measured_models(measured, "fisher", information)
    settings = measured.settings.fisher
    weights = fisher_weights([file.norm for file in files], normalize=settings.normalize, minimal=settings.minimal)
    return FisherStatistics(tuple(file.stored for file in files), weights)


@dataclass(frozen=True)
class GramStatistics:
    """Measurements of `regmean`."""

    files: tuple[StoredModel, ...]
    """M models: Gram matrices by the name of the layer's weight"""
    layers: dict[str, bool]
    """Weight of each linear layer -> is it stored as [in, out] (GPT-2's Conv1D)?"""

    def matrices(self, name: str) -> Iterator[Tensor]:
        """M Gram matrices `[in, in]` float64 of one layer, read one at a time."""
        return (read_whole(file.places[name]).double() for file in self.files)


def gram_statistics(measured: MeasuredPool) -> Generator[Progress[Any], None, GramStatistics]:
    """Measure the Gram matrices of every model. Raises DataError where there are no training rows."""
    names, masked = measured.stored.names, measured.settings.regmean.mask_pads

    def grams(model: RowModel) -> Iterator[dict[str, Tensor]]:
        return gram_matrices(model.part, names, model.batches, masked=masked)

    files = yield from _measured_models(measured, "gram", grams)
    return GramStatistics(tuple(file.stored for file in files), linear_layers(measured.skeleton, names))


@dataclass(frozen=True)
class _StatisticsFile:
    """Statistics of one model on disk."""

    stored: StoredModel
    norm: float
    """L2 norm over all entries."""


def _measured_models(
    measured: MeasuredPool, label: str, measure: Callable[[RowModel], Iterable[dict[str, Tensor]]]
) -> Generator[Progress[Any], None, list[_StatisticsFile]]:
    """Measure one model after the other. The model is released before its statistics are written where `measure` allows."""
    if measured.load_rows is None:
        raise DataError(
            f"{measured.settings.method} reads each model's own training rows",
            expected="a pool of classifiers of GLUE's tasks, or data: SPEC for each model",
        )
    models = measured.pool.models
    files = []
    for number, model in enumerate(models):
        yield Progress(number, len(models), note=f"{label} of {model.name}")
        statistics = measure(measured.load_rows(model))
        files.append(_write_statistics(statistics, measured.stored.names, measured.folder / str(number)))
        del statistics
    return files


def _write_statistics(statistics: Iterable[dict[str, Tensor]], names: list[str], folder: Path) -> _StatisticsFile:
    """Write the statistics of the tensors `names` to `folder`, a file per dictionary."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    stored, squares = StoredModel(folder.name, {}, {}), 0.0
    for number, values in enumerate(statistics):
        file = folder / f"{number}.safetensors"
        for name in [n for n in values if n not in names]:
            del values[name]
        save_file({name: value.contiguous() for name, value in values.items()}, file)
        stored.places.update({name: (file, name) for name in values})
        stored.shapes.update({name: tuple(value.shape) for name, value in values.items()})
        squares += sum(float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2 for value in values.values())
    return _StatisticsFile(stored, math.sqrt(squares))
