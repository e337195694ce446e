"""Figures of a classifier on one GLUE task, with standard errors.

    accuracy   share of rows that are predicted right: what the reference reports for all seven tasks
    loss       mean cross-entropy, nats per row
    mcc        Matthews' correlation, for CoLA
    f1         F1 of the class 1 (duplicate, equivalent), for MRPC and QQP; mcc and f1 are what GLUE reports

F1 = 2 TP / (2 TP + FP + FN) is a ratio of sums over rows. Matthews' correlation is a smooth function of the shares p of
the four cells, in which a row of cell c has the influence (df/dp_c - sum_k p_k df/dp_k) / n. Both are 0 where they are undefined
(no such prediction or row), as in scikit-learn, and their error is unknown there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kd.data.instruction_tasks.glue import GlueTask
from kd.evaluation.statistics.estimates import standard_error


@dataclass(frozen=True)
class Score:
    """A figure of one task, and how sure it is."""

    value: float
    stderr: float | None
    """Standard error; None where it is unknown."""
    n: int
    """Number of rows."""

    def percent(self) -> str:
        """The figure in percent: `85.2 ± 2.5`."""
        return f"{100 * self.value:.1f}" + ("" if self.stderr is None else f" ± {100 * self.stderr:.1f}")


Scores = Mapping[str, Score]
"""Name -> figure, for one task."""


def glue_figures(task: GlueTask, logits: Tensor, labels: np.ndarray) -> dict[str, Score]:
    """Accuracy, loss and GLUE's own figures of `logits [n, C]` against `labels [n]`."""
    log_p = torch.log_softmax(logits.double(), dim=-1).numpy()
    predicted = logits.argmax(dim=-1).numpy()
    scores = {
        "accuracy": _mean((predicted == labels).astype(np.float64)),
        "loss": _mean(-log_p[np.arange(len(labels)), labels]),
    }
    return scores | {name: GLUE_METRICS[name](predicted == 1, labels == 1) for name in task.metrics}


def _mean(values: np.ndarray) -> Score:
    return Score(float(values.mean()), standard_error((values - values.mean()) / len(values)), len(values))


def f1(predicted: np.ndarray, true: np.ndarray) -> Score:
    """F1 of one class; both arrays `[n]` bool mark its rows."""
    hits = 2.0 * (predicted & true)
    counts = hits + (predicted ^ true)
    if not counts.sum():
        return Score(0.0, None, len(true))
    value = float(hits.sum() / counts.sum())
    return Score(value, standard_error((hits - value * counts) / counts.sum()), len(true))


def matthews(predicted: np.ndarray, true: np.ndarray) -> Score:
    """Matthews' correlation of two classes; both arrays `[n]` bool mark the rows of one of them."""
    cells = (~predicted).astype(int) * 2 + (~true).astype(int)  # 0 both, 1 only predicted, 2 only true, 3 neither
    a, b, c, d = np.bincount(cells, minlength=4) / len(true)
    sides = (a + b, a + c, d + b, d + c)
    if min(sides) == 0:
        return Score(0.0, None, len(true))
    root = math.sqrt(math.prod(sides))
    value = (a * d - b * c) / root
    inverse = [1 / side for side in sides]
    slope = np.array([d, -c, -b, a]) / root - value / 2 * np.array(
        [inverse[0] + inverse[1], inverse[0] + inverse[2], inverse[1] + inverse[3], inverse[2] + inverse[3]]
    )
    influence = (slope[cells] - (np.array([a, b, c, d]) * slope).sum()) / len(true)
    return Score(float(value), standard_error(influence), len(true))


GLUE_METRICS: dict[str, Callable[[np.ndarray, np.ndarray], Score]] = {"mcc": matthews, "f1": f1}
