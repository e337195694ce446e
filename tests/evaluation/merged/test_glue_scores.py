"""GLUE's figures against scikit-learn and the jackknife; tables; heads and ensembles against whole classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss, matthews_corrcoef

from kd.common.errors import DataError
from kd.common.progress import final
from kd.data.tasks.glue import glue_task
from kd.evaluation.merged.glue_scores import (
    GlueTable,
    Score,
    cross_task_matrix,
    evaluate_classifier,
    f1,
    load_heads,
    matthews,
    most_frequent,
    score_ensemble,
    score_rows,
)
from kd.models.classifiers import load_classifier
from kd.models.loading import ModelRequest
from kd.student_trainer.classify.encoding import pad_rows


@pytest.fixture
def guesses() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    true = rng.random(300) < 0.7
    return np.where(rng.random(300) < 0.75, true, rng.random(300) < 0.5), true


def test_figures_are_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    logits, labels = torch.from_numpy(rng.normal(size=(120, 2))).float(), rng.integers(0, 2, 120)
    found = score_rows(glue_task("cola"), logits, labels) | score_rows(glue_task("mrpc"), logits, labels)
    predicted = logits.argmax(dim=1).numpy()
    assert found["accuracy"].value == pytest.approx(accuracy_score(labels, predicted), abs=1e-12)
    assert found["mcc"].value == pytest.approx(matthews_corrcoef(labels, predicted), abs=1e-12)
    assert found["f1"].value == pytest.approx(f1_score(labels, predicted), abs=1e-12)
    assert found["loss"].value == pytest.approx(log_loss(labels, torch.softmax(logits.double(), 1).numpy()), abs=1e-9)
    share = found["accuracy"].value
    assert found["accuracy"].stderr == pytest.approx(np.sqrt(share * (1 - share) / 119), abs=1e-12)  # by hand: n - 1


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


def test_heads_score_as_the_whole_classifier_does(pool: Any, glue_root: Path) -> None:
    heads = load_heads(pool, task_root=glue_root, max_length=64, device="cpu")
    table = final(cross_task_matrix(pool, heads, device="cpu"))
    assert list(table.rows) == ["most frequent class", "_pretrained_", "cola", "mrpc", "mnli"]
    for model in pool.models:
        own = final(evaluate_classifier(model.path, task=model.name, task_root=glue_root, max_length=64, device="cpu"))
        assert own.rows == 20
        for name, score in own.scores.items():
            assert table.rows[model.name][model.name][name].value == pytest.approx(score.value, abs=1e-6)


def test_the_most_frequent_class_is_its_share_and_its_loss_the_entropy(gpt2_pool: Any, glue_root: Path) -> None:
    heads = load_heads(gpt2_pool, task_root=glue_root, max_length=64, device="cpu")
    found = most_frequent(heads[2])  # 20 rows of three classes: 7, 7, 6
    shares = np.array([7, 7, 6]) / 20
    assert found["accuracy"].value == pytest.approx(0.35)
    assert found["loss"].value == pytest.approx(-(shares * np.log(shares)).sum())
    assert most_frequent(heads[0])["mcc"] == Score(0.0, None, 20)


def test_the_ensemble_is_the_mean_of_all_backbones_logits_under_one_head(pool: Any, glue_root: Path) -> None:
    heads = load_heads(pool, task_root=glue_root, max_length=64, device="cpu")
    found = final(score_ensemble(pool, heads, device="cpu"))
    for head in heads:
        mean = torch.zeros(len(head.rows), len(head.task.labels))
        for model in pool.models:
            whole = load_classifier(ModelRequest(model.path, device="cpu"), pad_id=0)
            whole.score.weight = torch.nn.Parameter(head.weight)
            with torch.inference_mode():
                mean += (
                    torch.cat(
                        [whole(**pad_rows([row], 0)).logits @ torch.eye(len(head.weight)) for row in head.rows.ids]
                    )
                    / 3
                )
        expected = score_rows(head.task, mean, head.rows.labels)
        for name, score in found[head.task.name][0].items():
            assert score.value == pytest.approx(expected[name].value, abs=1e-5)


def test_a_table_marks_the_best_average_and_shows_errors() -> None:
    def scores(share: float) -> dict[str, dict[str, Score]]:
        return {
            "cola": {"accuracy": Score(share, 0.03, 100), "loss": Score(0.5, 0.01, 100), "mcc": Score(0.1, None, 100)},
            "sst2": {"accuracy": Score(0.8, 0.04, 100), "loss": Score(0.3, 0.01, 100)},
        }

    table = GlueTable("scaling", ("cola", "sst2"), {"0": scores(0.5), "0.1": scores(0.7), "0.2": scores(0.7)})
    assert table.best == "0.1"  # of equal ones the first
    average = table.average("0.1")
    assert (average.value, average.n) == (0.75, 200)
    assert average.stderr == pytest.approx(0.025)  # sqrt(0.03² + 0.04²) / 2
    text = table.markdown()
    assert "| 0.1 | 70.0 ± 3.0 | 80.0 ± 4.0 | **75.0 ± 2.5** |" in text
    assert text.count("**") == 2
    assert "| 0 | 10.0 |" in text
    report = table.report("0")
    assert set(report) == {"cola", "sst2", "average"}
    assert report["average"]["accuracy"] == 0.65


def test_names_that_are_no_tasks_and_other_heads_are_refused(gpt2_pool: Any, glue_root: Path) -> None:
    from dataclasses import replace

    wrong = replace(gpt2_pool, models=(replace(gpt2_pool.models[0], name="kola"),))
    with pytest.raises(DataError, match="unknown GLUE task"):
        load_heads(wrong, task_root=glue_root, device="cpu")
    swapped = replace(gpt2_pool, models=(replace(gpt2_pool.models[0], name="mnli"),))
    with pytest.raises(DataError, match="another number of classes"):
        load_heads(swapped, task_root=glue_root, device="cpu")
    options: dict[str, Any] = {"task_root": glue_root, "max_length": 64, "device": "cpu"}
    with pytest.raises(DataError, match="another number of classes"):
        final(evaluate_classifier(gpt2_pool.models[0].path, task="mnli", **options))
    with pytest.raises(DataError, match="no classifier"):  # never a random head
        final(evaluate_classifier(gpt2_pool.base.path, task="cola", **options))
    with pytest.raises(DataError, match="unknown GLUE task"):
        final(evaluate_classifier(str(Path(gpt2_pool.models[0].path).parent), task_root=glue_root))
