"""Heads and ensembles against whole classifiers; names that are no tasks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kd.common.errors import DataError
from kd.common.progress import final
from kd.evaluation.merged.glue_figures import Score, glue_figures
from kd.evaluation.merged.glue_scores import (
    cross_task_matrix,
    evaluate_classifier,
    load_heads,
    most_frequent,
    score_ensemble,
)
from kd.evaluation.merged.merged_settings import ClassifierEvaluation, GlueRowSettings
from kd.models.classifiers import load_classifier
from kd.models.model_request import ModelRequest
from kd.student_trainer.classify.encoding import pad_rows


def rows(glue_root: Path) -> GlueRowSettings:
    return GlueRowSettings(glue_root, max_length=64, device="cpu")


def test_heads_score_as_the_whole_classifier_does(pool: Any, glue_root: Path) -> None:
    heads = load_heads(pool, rows(glue_root))
    table = final(cross_task_matrix(pool, heads, rows(glue_root)))
    assert list(table.rows) == ["most frequent class", "_pretrained_", "cola", "mrpc", "mnli"]
    for model in pool.models:
        settings = ClassifierEvaluation(task=model.name, rows=rows(glue_root))
        result = final(evaluate_classifier(model.path, settings))
        assert result.rows == 20
        for name, score in result.scores.items():
            assert table.rows[model.name][model.name][name].value == pytest.approx(score.value, abs=1e-6)


def test_the_most_frequent_class_is_its_share_and_its_loss_the_entropy(gpt2_pool: Any, glue_root: Path) -> None:
    heads = load_heads(gpt2_pool, rows(glue_root))
    figures = most_frequent(heads[2])  # 20 rows of three classes: 7, 7, 6
    shares = np.array([7, 7, 6]) / 20
    assert figures["accuracy"].value == pytest.approx(0.35)
    assert figures["loss"].value == pytest.approx(-(shares * np.log(shares)).sum())
    assert most_frequent(heads[0])["mcc"] == Score(0.0, None, 20)


def test_the_ensemble_is_the_mean_of_all_backbones_logits_under_one_head(pool: Any, glue_root: Path) -> None:
    heads = load_heads(pool, rows(glue_root))
    scores = final(score_ensemble(pool, heads, rows(glue_root)))
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
        expected = glue_figures(head.task, mean, head.rows.labels)
        for name, score in scores[head.task.name].whole.items():
            assert score.value == pytest.approx(expected[name].value, abs=1e-5)


def test_names_that_are_no_tasks_and_other_heads_are_refused(gpt2_pool: Any, glue_root: Path) -> None:
    wrong = replace(gpt2_pool, models=(replace(gpt2_pool.models[0], name="kola"),))
    with pytest.raises(DataError, match="unknown GLUE task"):
        load_heads(wrong, rows(glue_root))
    swapped = replace(gpt2_pool, models=(replace(gpt2_pool.models[0], name="mnli"),))
    with pytest.raises(DataError, match="another number of classes"):
        load_heads(swapped, rows(glue_root))
    cola, mnli = (ClassifierEvaluation(task=task, rows=rows(glue_root)) for task in ("cola", "mnli"))
    with pytest.raises(DataError, match="another number of classes"):
        final(evaluate_classifier(gpt2_pool.models[0].path, mnli))
    with pytest.raises(DataError, match="not a classifier"):  # never a random head
        final(evaluate_classifier(gpt2_pool.base.path, cola))
    with pytest.raises(DataError, match="unknown GLUE task"):
        final(
            evaluate_classifier(str(Path(gpt2_pool.models[0].path).parent), ClassifierEvaluation(rows=rows(glue_root)))
        )
