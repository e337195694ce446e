"""Scores over templates: the mean over templates and rows, and the template that another split finds best."""

from __future__ import annotations

import numpy as np
import pytest

from kd.common.errors import DataError
from kd.common.settings import make
from kd.data.data_settings import InstructionConfig
from kd.data.rows.example import Example, row_and_template
from kd.data.sources import load_corpus
from kd.evaluation.eval_settings import EvalSettings
from kd.evaluation.statistics.estimates import Documents, Estimate, figures_by_task
from kd.evaluation.tasks.template_scores import by_template, over_templates


def figures(hits: dict[str, np.ndarray]) -> dict[str, Estimate]:
    """Task -> `[templates, rows]` hits; as a measurement on the text with one task per template gives them."""
    ids, tasks, values = [], [], []
    for task, table in hits.items():
        for (k, row), value in np.ndenumerate(table):
            ids.append(f"{task}/test/{row} in template {k}")
            tasks.append(f"{task} in template {k}")
            values.append(float(value))
    documents = Documents.of_examples(ids, "pairs")
    every = np.array(values)
    return {
        "accuracy": documents.ratio(every, np.ones(len(ids))),
        **figures_by_task("accuracy", documents, every, tasks),
    }


def test_a_task_is_the_mean_over_its_templates_and_the_best_is_chosen_on_the_other_text() -> None:
    rng = np.random.default_rng(1)
    hits = {"a": rng.integers(0, 2, (3, 8)), "b": rng.integers(0, 2, (2, 5))}
    dev = {"a": np.array([[0, 1], [1, 1], [1, 1]]), "b": np.array([[0, 0, 0], [0, 0, 1]])}
    scores = over_templates(figures(hits), figures(dev))
    assert set(scores) == {
        *("accuracy", "accuracy_mean_of_tasks", "accuracy/a", "accuracy/b"),
        *("accuracy_best_template", "accuracy_best_template/a", "accuracy_best_template/b"),
    }
    assert scores["accuracy/a"].value == pytest.approx(hits["a"].mean())
    assert scores["accuracy_mean_of_tasks"].value == pytest.approx((hits["a"].mean() + hits["b"].mean()) / 2)
    assert scores["accuracy_best_template/a"].value == pytest.approx(hits["a"][1].mean())  # of equal ones the first
    assert scores["accuracy_best_template/b"].value == pytest.approx(hits["b"][1].mean())
    of_rows = hits["a"].mean(
        axis=0
    )  # a row is one document, in however many templates: the plain error of a mean over rows
    assert scores["accuracy/a"].stderr == pytest.approx(of_rows.std(ddof=1) / np.sqrt(8))
    assert "accuracy_best_template" not in over_templates(figures(hits))


def test_figures_without_templates_stay_as_they_are() -> None:
    plain = {"accuracy": Estimate(0.5, np.zeros(2), 2), "accuracy/a": Estimate(0.5, np.zeros(2), 2)}
    assert over_templates(plain) == plain


def test_a_metric_has_a_mean_over_tasks_where_it_had_one() -> None:
    alone = {"choice_match/a in template 0": Estimate(0.5, np.zeros(2), 2)}
    assert set(over_templates(alone)) == {"choice_match/a"}


def test_a_text_in_each_template_has_a_task_for_each_of_them() -> None:
    corpus = load_corpus("mini-flan:mini_span,mini_rte", split="dev", instructions=InstructionConfig(template="each"))
    asked = by_template(corpus)
    assert {e.task for e in asked.examples} == {
        f"{t} in template {k}" for t in ("mini_span", "mini_rte") for k in range(9)
    }
    assert asked.metrics["mini_span in template 3"] == corpus.metrics["mini_span"]
    assert [e.id for e in asked.examples] == [e.id for e in corpus.examples]
    once = load_corpus("mini-flan:mini_rte", split="dev")
    assert by_template(once) is once


def test_rows_in_several_templates_are_one_document() -> None:
    examples = [
        Example(f"t/{row} in template {k}", "x", f"p{row // 2} {k}", f"t in template {k}")
        for k in (1, 0)
        for row in range(4)
    ]
    assert list(Documents.of_examples([e.id for e in examples], "pairs").numbers) == [0, 1, 2, 3] * 2
    assert (
        list(Documents.of_prompts(examples).numbers) == [0, 0, 1, 1] * 2
    )  # rows 0 and 1 have one prompt, as CommonGen's
    assert row_and_template("a in template b") == ("a in template b", None)


def test_the_best_template_needs_scores_in_each() -> None:
    with pytest.raises(DataError, match="best of several templates"):
        make(EvalSettings, {"tasks": "choices", "data": "mini-flan", "best-template-on": "dev"})
