"""Figures of GLUE against scikit-learn and the jackknife."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef

from kd.data.instruction_tasks.glue import glue_task, glue_tasks
from kd.evaluation.merged.glue_figures import GLUE_METRICS, Score, f1, glue_figures, matthews


def test_every_metric_of_the_tasks_is_known() -> None:
    assert {name for task in glue_tasks().values() for name in task.metrics} == set(GLUE_METRICS)


@pytest.fixture
def guesses() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    true = rng.random(300) < 0.7
    return np.where(rng.random(300) < 0.75, true, rng.random(300) < 0.5), true


def test_figures_are_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    logits, labels = torch.from_numpy(rng.normal(size=(120, 2))).float(), rng.integers(0, 2, 120)
    figures = glue_figures(glue_task("cola"), logits, labels) | glue_figures(glue_task("mrpc"), logits, labels)
    predicted = logits.argmax(dim=1).numpy()
    assert figures["accuracy"].value == pytest.approx(accuracy_score(labels, predicted), abs=1e-12)
    assert figures["mcc"].value == pytest.approx(matthews_corrcoef(labels, predicted), abs=1e-12)
    assert figures["f1"].value == pytest.approx(f1_score(labels, predicted), abs=1e-12)
    assert figures["loss"].value == pytest.approx(log_loss(labels, torch.softmax(logits.double(), 1).numpy()), abs=1e-9)
    share = figures["accuracy"].value
    assert figures["accuracy"].stderr == pytest.approx(np.sqrt(share * (1 - share) / 119), abs=1e-12)  # by hand: n - 1


@pytest.mark.parametrize("figure", [f1, matthews])
def test_standard_errors_agree_with_leaving_one_out(figure: Any, guesses: tuple[np.ndarray, np.ndarray]) -> None:
    predicted, true = guesses
    left = np.array([figure(np.delete(predicted, i), np.delete(true, i)).value for i in range(len(true))])
    jackknife = np.sqrt((len(true) - 1) / len(true) * ((left - left.mean()) ** 2).sum())
    # both are first-order in 1/n: they differ by terms of relative size 1/n = 0.3 %, a few of them
    assert figure(predicted, true).stderr == pytest.approx(jackknife, rel=0.02)


def test_constant_predictions_have_no_correlation_and_no_error() -> None:
    ones, true = np.ones(6, dtype=bool), np.array([1, 0, 1, 1, 0, 1], dtype=bool)
    assert matthews(ones, true) == Score(0.0, None, 6)
    assert f1(~ones, ~ones) == Score(0.0, None, 6)
    assert f1(ones, true).value == pytest.approx(0.8)  # 8 / (8 + 2 + 0)
