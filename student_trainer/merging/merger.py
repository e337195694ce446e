"""Merge a pool of models tensor by tensor, in bounded memory.

    prepare   what is global is measured: Ties' thresholds and majority, Fisher information, Gram matrices (on disk)
    apply     every tensor of the merged model is written, block by block, from the files

Held at most: the model being written and a block of one tensor of every model (of RegMean's layers, the whole tensor);
before that, one model's task vector (Ties' threshold), or one model with its statistics. Seven GPT-2-layout models are
measured in `tests/student_trainer/merging/test_merge_memory.py`. `apply` with another scaling is a sweep: it reads anew.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.common.errors import DataError, unknown_name
from kd.student_trainer.merging.measurements import Batches, fisher_information, gram_matrices, linear_layers
from kd.student_trainer.merging.merge_methods import (
    ELECTIONS,
    MERGE_METHODS,
    average,
    dare,
    fisher_average,
    fisher_weights,
    regmean,
    task_arithmetic,
    ties,
    trimmed,
)
from kd.student_trainer.merging.pool import ModelPool, PoolModel
from kd.student_trainer.merging.stored_weights import Block, StoredModel, StoredPool, read_whole, skeleton

Measured = tuple[Any, Callable[[dict[str, Tensor]], Tensor], Batches]
"""The part of a model that is merged, its logits of a batch, and batches of its own training rows."""
Measure = Callable[[PoolModel], Measured]


@dataclass(frozen=True)
class MergeSettings:
    """How to merge; each method reads its own part."""

    method: str
    """Key of `MERGE_METHODS`."""
    scaling: float | None = None
    """Factor of task vectors; None = the method's default."""
    threshold: float = 20.0
    """Of ties: share of each task vector that is kept, in percent; 1 and below is a fraction, as in the reference."""
    elect: str = "sum"
    """Of ties: how entries that agree are merged, one of ELECTIONS."""
    density: float = 0.5
    """Of dare: share of each task vector that is drawn."""
    normalize: bool = True
    """Of fisher: weigh models by the inverse of their information's norm."""
    minimal: float = 1e-6
    """Of fisher: added to every entry's information."""
    off_diagonal: float = 0.6
    """Of regmean: factor of the Gram matrices' off-diagonal entries."""
    mask_pads: bool = False
    """Of regmean: leave padding out of the Gram matrices."""
    exclude: tuple[str, ...] = ()
    """Regular expressions: tensors whose name begins so keep the base's values."""
    seed: int = 0
    """Of dare's draws."""

    def __post_init__(self) -> None:
        if self.method not in MERGE_METHODS:
            raise unknown_name("merge method", self.method, MERGE_METHODS)
        if self.elect not in ELECTIONS:
            raise unknown_name("way to merge what agrees", self.elect, ELECTIONS)
        if self.scaling is not None and MERGE_METHODS[self.method].scaling is None:
            scaled = ", ".join(name for name, m in MERGE_METHODS.items() if m.scaling is not None)
            raise DataError(
                f"{self.method} has no scaling", found=f"--scaling {self.scaling:g}", expected=f"with {scaled}"
            )
        if not (math.isfinite(self.factor)):
            raise DataError("the scaling is no number", found=self.scaling)
        if not 0 < self.kept <= 1:
            raise DataError(
                "the share of a task vector to keep is out of bounds",
                found=f"--threshold {self.threshold:g}",
                expected="above 0, at most 100 percent",
            )
        if not 0 < self.density <= 1:
            raise DataError(
                "the share to draw is out of bounds", found=f"--density {self.density:g}", expected="in (0, 1]"
            )
        if not 0 <= self.off_diagonal <= 1:
            raise DataError(
                "the off-diagonal factor is out of bounds", found=f"{self.off_diagonal:g}", expected="0 to 1"
            )
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except re.error as error:
                raise DataError("not a regular expression", found=pattern, reason=error) from error

    @property
    def factor(self) -> float:
        """The scaling, or the method's default (0 where it has none)."""
        return self.scaling if self.scaling is not None else (MERGE_METHODS[self.method].scaling or 0.0)

    @property
    def kept(self) -> float:
        """Share of a task vector that ties keeps."""
        return self.threshold / 100 if self.threshold > 1 else self.threshold


@dataclass(frozen=True)
class Merger:
    """A pool with everything measured that its method needs."""

    settings: MergeSettings
    stored: StoredPool
    thresholds: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float32))
    """[M] of ties"""
    majority: float = 0.0
    """Of ties."""
    statistics: tuple[StoredModel, ...] = ()
    """Fisher information by tensor, or Gram matrices by weight, one file per model."""
    weights: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """[M] of fisher"""

    @torch.no_grad()
    def apply(self, model: Any, scaling: float | None = None) -> None:
        """Write the merged weights into `model` (see `skeleton`)."""
        settings = self.settings if scaling is None else replace(self.settings, scaling=scaling)
        layers = linear_layers(model, self.stored.names) if settings.method == "regmean" else {}
        target = model.state_dict()
        for name in self.stored.names:
            if not self._excluded(name) and name in layers:
                target[name].copy_(self._solved(name, transposed=not layers[name]))
                continue
            for block in self.stored.blocks(name):
                place = target[name][block.rows] if target[name].dim() else target[name]
                place.copy_(self._merged(block, settings))

    def _excluded(self, name: str) -> bool:
        return any(re.match(pattern, name) for pattern in self.settings.exclude)

    def _merged(self, block: Block, settings: MergeSettings) -> Tensor:
        values, base = block.values, block.base
        if self._excluded(block.name):
            assert base is not None
            return base
        if settings.method == "fisher" and block.name in self.statistics[0].places:
            information = torch.stack([_rows(s, block) for s in self.statistics])
            return fisher_average(values, information, weights=self.weights, minimal=settings.minimal)
        if base is None or MERGE_METHODS[settings.method].scaling is None:
            return average(values)
        if settings.method == "ties":
            return ties(
                values,
                base,
                thresholds=self.thresholds,
                majority=self.majority,
                elect=settings.elect,
                scaling=settings.factor,
            )
        if settings.method == "dare":
            place = zlib.crc32(f"{settings.seed} {block.name} {block.rows.start}".encode())
            return dare(values, base, density=settings.density, scaling=settings.factor, seed=place)
        return task_arithmetic(values, base, scaling=settings.factor)

    def _solved(self, name: str, *, transposed: bool) -> Tensor:
        """RegMean of one linear layer; a weight kept as [out, in] is turned round and back."""
        models = self.stored.models
        values = torch.empty((len(models), *models[0].shapes[name]), dtype=torch.float64)
        for place, model in zip(values, models, strict=True):
            place.copy_(read_whole(model.places[name]))
        grams = (read_whole(s.places[name]).double() for s in self.statistics)
        values = values.mT if transposed else values
        solved = regmean(values, grams, off_diagonal=self.settings.off_diagonal)
        return solved.T if transposed else solved


def _rows(statistics: StoredModel, block: Block) -> Tensor:
    from safetensors import safe_open

    file, key = statistics.places[block.name]
    with safe_open(file, framework="pt") as handle:
        view = handle.get_slice(key)
        found = view[block.rows] if view.get_shape() else handle.get_tensor(key)
        return found.double()  # type: ignore[no-any-return]


@dataclass(frozen=True)
class PrepareProgress:
    """One step of `prepare`."""

    done: int
    total: int
    note: str
    merger: Merger | None = None
    """On the last record."""


def prepare(
    pool: ModelPool, settings: MergeSettings, *, folder: Path, measure: Measure | None = None
) -> Iterator[PrepareProgress]:
    """Measure what is global; the last record carries the `Merger`. Statistics are written to `folder`.

    `measure` gives a model and batches of its rows, for fisher and regmean. Raises DataError where models do not fit
    together, the base is missing, or `ensemble`, which has no weights, is asked for.
    """
    method = MERGE_METHODS[settings.method]
    if method.live:
        raise DataError(f"{settings.method} has no merged weights", expected="it is evaluated live")
    shape = skeleton(pool)
    stored = StoredPool.of(pool, shape, with_base=method.needs_base or bool(settings.exclude))
    total = len(pool.models) if method.statistics or settings.method == "ties" else 0
    merger = Merger(settings, stored)
    if settings.method == "ties":
        thresholds = []
        for number, model in enumerate(pool.models):
            yield PrepareProgress(number, total, f"threshold of {model.name}")
            thresholds.append(kth_magnitude(stored, number, settings.kept))
        merger = replace(merger, thresholds=torch.tensor(thresholds, dtype=torch.float32))
        merger = replace(merger, majority=_majority(merger))
    if method.statistics:
        if measure is None:
            raise DataError(
                f"{settings.method} reads each model's own training rows",
                expected="a pool of classifiers of GLUE's tasks, or data: SPEC for each model",
            )
        files, norms = [], []
        for number, model in enumerate(pool.models):
            yield PrepareProgress(number, total, f"{method.statistics} of {model.name}")
            file, norm = _measured(method.statistics, measure(model), stored.names, settings, folder / str(number))
            files.append(file)
            norms.append(norm)
        weights = fisher_weights(norms, normalize=settings.normalize, minimal=settings.minimal)
        merger = replace(merger, statistics=tuple(files), weights=weights)
    yield PrepareProgress(total, total, "prepared", merger)


def kth_magnitude(stored: StoredPool, number: int, kept: float) -> float:
    """The smallest size, in float32, of an entry of one model's task vector that is kept: the k-th smallest, k = d - int(d kept).

    int(d kept) + 1 entries are at least that large where sizes differ; 0 where everything is kept. Holds one task vector.
    """
    size = sum(math.prod(stored.models[number].shapes[name]) for name in stored.names)
    k = size - int(size * kept)
    if k == 0:
        return 0.0
    sizes = np.empty(size, dtype=np.float32)
    one = replace(stored, models=(stored.models[number],))
    start = 0
    for name in stored.names:
        for block in one.blocks(name):
            assert block.base is not None
            found = (block.values[0] - block.base).float().abs().flatten().numpy()
            sizes[start : start + len(found)] = found
            start += len(found)
    sizes.partition(k - 1)
    return float(sizes[k - 1])


def _majority(merger: Merger) -> float:
    """Sign of the sum of the signs of all entries of the trimmed task vectors' sum."""
    count = 0.0
    for name in merger.stored.names:
        for block in merger.stored.blocks(name):
            assert block.base is not None
            count += float(trimmed(block.values, block.base, merger.thresholds).sum(dim=0).sign().sum())
    return float(np.sign(count))


def _measured(
    kind: str, measured: Measured, names: Sequence[str], settings: MergeSettings, folder: Path
) -> tuple[StoredModel, float]:
    """Write one model's statistics to `folder`; returns where they lie and their L2 norm. The model is let go before."""
    from safetensors.torch import save_file

    part, logits, batches = measured
    del measured
    found: Iterable[dict[str, Tensor]]
    if kind == "fisher":
        found = [fisher_information(part, logits, batches)]
    else:
        found = gram_matrices(part, names, batches, masked=settings.mask_pads)
    del part, logits, batches
    folder.mkdir(parents=True, exist_ok=True)
    stored, squares = StoredModel(folder.name, {}, {}), 0.0
    for number, values in enumerate(found):
        file = folder / f"{number}.safetensors"
        for name in [n for n in values if n not in names]:
            del values[name]
        save_file({name: value.contiguous() for name, value in values.items()}, file)
        stored.places.update({name: (file, name) for name in values})
        stored.shapes.update({name: tuple(value.shape) for name, value in values.items()})
        squares += sum(float(torch.linalg.vector_norm(value, dtype=torch.float64)) ** 2 for value in values.values())
    return stored, math.sqrt(squares)
