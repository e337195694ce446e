"""The weights of the best scoring of a run, kept in its folder until the end, and taken back then.

    runs/student/best/
        weights.safetensors     the parameters that are trained, as they were when the figure was best
        best.json               the step and the figure; written last

A run that continues from a checkpoint drops weights of a later step: the steps are made again, and so are those weights.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kd.common.errors import DataError
from kd.common.files import canonical_json, read_object, sync_file, write_atomic

BEST = "best"
"""Folder of the best weights while the run goes on."""
WEIGHTS, RECORD = "weights.safetensors", "best.json"


@dataclass(frozen=True)
class ChosenFigure:
    """One figure of the scorings: the one by which the weights are chosen."""

    task: str
    """Name of a task of `kd eval`."""
    metric: str | None = None
    """Name of its metric; None is its first."""

    def of(self, record: Mapping[str, Any]) -> tuple[float, float] | None:
        """(value, value with the sign that makes more better) in a line of the log; None where it is not finite.

        Raises DataError where the line holds no such figure, or one of which neither more nor less is better.
        """
        metrics = record["tasks"].get(self.task, {})
        wanted = self.metric or next(iter(metrics), "")
        # releases before this one called agreement's `kl_kept` and `jsd_kept` kl and jsd: a run may have lines of both
        name = next((n for n in (wanted, f"{wanted}_kept", wanted.removesuffix("_kept")) if n in metrics), wanted)
        if name not in metrics or metrics[name].get("better") not in ("lower", "higher"):
            ranked = [
                f"{t}.{m}" for t, ms in record["tasks"].items() for m, figure in ms.items() if figure.get("better")
            ]
            raise DataError(
                "the weights cannot be chosen by this figure",
                found=f"{self.task}.{name}" if name else self.task,
                expected=f"one of {', '.join(ranked)}" if ranked else "a task that gives figures",
            )
        value = metrics[name]["value"]
        if value is None or not math.isfinite(value):
            return None
        return float(value), float(value) if metrics[name]["better"] == "higher" else -float(value)


@dataclass
class BestSoFar:
    """Which scoring was best, and how many came after it."""

    figure: ChosenFigure
    step: int | None = None
    """Step of the best scoring; None before the first that is finite."""
    value: float | None = None
    """The figure there."""
    since: int = 0
    """Scorings after it."""
    _rank: float = field(default=-math.inf, repr=False)

    def add(self, record: Mapping[str, Any]) -> bool:
        """Take one more scoring into account; returns whether it is the best so far."""
        now = self.figure.of(record)
        if now is None or now[1] <= self._rank:
            self.since += 1
            return False
        self.step, self.value, self._rank, self.since = int(record["step"]), now[0], now[1], 0
        return True

    @classmethod
    def after(cls, figure: ChosenFigure, records: Sequence[Mapping[str, Any]]) -> BestSoFar:
        """The state after the scorings of a run that is continued."""
        best = cls(figure)
        for record in records:
            best.add(record)
        return best


def keep_weights(folder: Path, model: Any, document: Mapping[str, Any]) -> None:
    """Write the trained parameters of `model` into a run's folder, in place of those of an earlier scoring. Raises OSError.

    document   what `best.json` says: the step and the figure
    """
    from safetensors.torch import save_file

    best = folder / BEST
    best.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous().clone() for name, p in model.named_parameters() if p.requires_grad}
    staged = best / f"{WEIGHTS}.tmp"
    save_file(tensors, staged)
    sync_file(staged)
    (best / RECORD).unlink(missing_ok=True)  # the weights count when this file is there
    staged.replace(best / WEIGHTS)
    write_atomic(best / RECORD, canonical_json(document))


def drop_weights_after(folder: Path, step: int) -> None:
    """Remove weights that a run kept after the step from which it continues, or did not finish writing."""
    kept = kept_step(folder)
    if kept is None or kept > step:
        shutil.rmtree(folder / BEST, ignore_errors=True)


def kept_step(folder: Path) -> int | None:
    """The step whose weights are kept; None where none are."""
    record = folder / BEST / RECORD
    return int(read_object(record)["step"]) if record.is_file() else None


def take_back(folder: Path, model: Any, step: int | None) -> bool:
    """Give `model` the weights that were kept at `step`, and remove the files; False where those weights are not there."""
    from safetensors.torch import load_file

    best = folder / BEST
    if step is None or kept_step(folder) != step:
        shutil.rmtree(best, ignore_errors=True)
        return False
    stored = load_file(best / WEIGHTS)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(stored[name])
    shutil.rmtree(best)
    return True
