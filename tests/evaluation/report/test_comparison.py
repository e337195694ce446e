"""Which figure of a table is marked best, and which evaluations are compared at all."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from reported import HARD, evaluation

from kd.evaluation.report.comparison import Entry, compare, short_name, with_error
from kd.evaluation.report.writing import write_report
from kd.evaluation.results import EvalReport
from kd.evaluation.statistics.estimates import standard_error


def best_of(*reports: EvalReport) -> str | None:
    (comparison,) = compare([Entry(r.model, r) for r in reports])
    winner = comparison.best("perplexity")
    return None if winner is None else comparison.entries[winner].name


def test_a_small_difference_is_marked_when_documents_are_hard_for_both():
    easier = [h + e for h, e in zip(HARD, [0.005, -0.01, 0.01, -0.005] * 4, strict=True)]
    assert best_of(evaluation("a", HARD, 8.0), evaluation("b", easier, 7.9)) == "b"


def test_the_same_difference_is_not_marked_without_pairing():
    unpaired = evaluation("b", HARD, 7.9, documents={})
    assert best_of(evaluation("a", HARD, 8.0), unpaired) is None
    near = evaluation("b", HARD, 6.5, documents={})  # 1.5 against an error of 0.78 * sqrt(2)
    assert best_of(evaluation("a", HARD, 8.0), near) is None
    far = evaluation("b", HARD, 5.0, documents={})
    assert best_of(evaluation("a", HARD, 8.0), far) == "b"


def test_a_difference_within_its_error_is_not_marked():
    assert best_of(evaluation("a", HARD, 8.0), evaluation("b", [-h for h in HARD], 7.0)) is None


def test_one_close_rival_is_enough_to_mark_nothing():
    a, b, c = evaluation("a", HARD, 8.0), evaluation("b", HARD, 9.0), evaluation("c", [-h for h in HARD], 8.1)
    assert best_of(a, b) == "a"
    assert best_of(a, b, c) is None


@pytest.mark.parametrize(
    "changes",
    [
        {
            "settings": {
                "perplexity": {"text_digest": "d1", "seq_len": 48, "stride": 47, "bos": True, "limit_tokens": None}
            }
        },
        {"tokenizer": "t2"},
    ],
)
def test_other_settings_or_another_tokenizer_are_shown_and_not_compared(changes):
    assert best_of(evaluation("a", HARD, 8.0), evaluation("b", HARD, 1.0)) == "b"
    assert best_of(evaluation("a", HARD, 8.0), evaluation("b", HARD, 1.0, **changes)) is None


def test_a_single_document_marks_nothing():
    assert best_of(evaluation("a", [0.0], 8.0), evaluation("b", [0.0], 1.0)) is None


def test_a_value_that_is_not_finite_marks_nothing():
    broken = evaluation("b", HARD, 1.0)
    broken.tasks["perplexity"]["perplexity"]["value"] = None
    (comparison,) = compare([Entry("a", evaluation("a", HARD, 8.0)), Entry("b", broken)])
    assert comparison.best("perplexity") is None
    assert comparison.table().rows[1][2] == "not finite"


def chooser(model: str, accuracy: float, influences: list[float], tokenizer: str = "t1") -> EvalReport:
    """A report of `choices` over 24 examples of two tasks."""
    figure = {
        "value": accuracy,
        "stderr": standard_error(np.array(influences)),
        "n": 24,
        "over": "example",
        "unit": "share of examples",
        "better": "higher",
        "title": "accuracy",
    }
    part = {**figure, "n": 1, "stderr": None, "title": "accuracy: nli"}
    rest = {**figure, "n": 23, "title": "accuracy: qa"}
    settings = {"text_digest": "d1", "choices_digest": "c1", "separator": "\n", "prompts_cut": 0}
    kept = {"digest": "same", "count": 24, "influence": {"accuracy": influences}, "samples": [{"prompt": "<b>"}]}
    return evaluation(
        model,
        [0.0],
        1.0,
        tokenizer=tokenizer,
        tasks={"choices": {"accuracy": figure, "accuracy/nli": part, "accuracy/qa": rest}},
        settings={"choices": settings},
        documents={"choices": kept},
    )


RIGHT, LESS = ([1 / 144] * 5 + [-5 / 144]) * 4, ([1 / 48] * 3 + [-1 / 48] * 3) * 4
"""Influences of five right of six, and of three, four times over."""


def test_the_higher_accuracy_is_best_whatever_the_tokenizer():
    better, worse = chooser("a", 5 / 6, RIGHT), chooser("b", 1 / 2, LESS, tokenizer="t2")
    for reports in ((better, worse), (worse, better)):
        (comparison,) = compare([Entry(r.model, r) for r in reports])
        winner = comparison.best("accuracy")
        assert winner is not None
        assert comparison.entries[winner].name == "a"
        assert comparison.best("accuracy/nli") is None  # one example has no error


def test_parts_stand_in_the_table_and_not_in_the_note(tmp_path):
    (comparison,) = compare([Entry("a", chooser("a", 5 / 6, RIGHT)), Entry("b", chooser("b", 1 / 2, LESS))])
    assert comparison.table().headers[2:] == ["accuracy ↑", "accuracy: nli ↑", "accuracy: qa ↑"]
    assert comparison.note() == (
        'Over 24 examples, 24 documents, separator "\\n", prompts cut 0. Units: accuracy [share of examples].'
    )
    for name, report in (("a", chooser("a", 5 / 6, RIGHT)), ("b", chooser("b", 1 / 2, LESS))):
        report.save(tmp_path / name)
    files = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report")
    assert files.metrics_png is not None
    rows = list(csv.DictReader(files.csv.read_text("utf-8").splitlines()))
    assert [(r["model"], r["metric"], r["better"], r["best"]) for r in rows] == [
        ("a", "accuracy", "higher", "1"),
        ("b", "accuracy", "higher", "0"),
        ("a", "accuracy/nli", "higher", "0"),
        ("b", "accuracy/nli", "higher", "0"),
        ("a", "accuracy/qa", "higher", "1"),
        ("b", "accuracy/qa", "higher", "0"),
    ]


def test_parts_of_a_text_of_one_task_are_not_shown_a_second_time():
    report = chooser("a", 5 / 6, RIGHT)
    report.tasks["choices"]["accuracy_mean_of_tasks"] = report.tasks["choices"].pop("accuracy/qa")
    (comparison,) = compare([Entry("a", report)])
    assert comparison.table().headers[2:] == ["accuracy ↑"]
    assert comparison.metrics == ["accuracy", "accuracy_mean_of_tasks", "accuracy/nli"]  # CSV and JSON hold all


def test_tables_keep_the_order_of_the_registry_whatever_a_file_sorts():
    figure = evaluation("a", HARD, 8.0).tasks["perplexity"]["perplexity"]
    tasks = {
        "agreement": {"top1_agreement": figure, "kl": figure},
        "perplexity": {"bits_per_byte": figure, "perplexity": figure},
    }
    report = evaluation(
        "a", HARD, 8.0, tasks=tasks, settings={"agreement": {"cache_fingerprint": "f"}, "perplexity": {}}
    )
    found = compare([Entry("a", report)])
    assert [(c.task, c.metrics) for c in found] == [
        ("perplexity", ["perplexity", "bits_per_byte"]),
        ("agreement", ["kl", "top1_agreement"]),
    ]


def test_texts_are_not_mixed_in_one_table():
    other = {"perplexity": {"text_digest": "d2", "seq_len": 24}}
    found = compare([Entry("a", evaluation("a", HARD, 8.0)), Entry("b", evaluation("b", HARD, 7.0, settings=other))])
    assert [len(c.entries) for c in found] == [1, 1]


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [(5.27149, 0.0831, "5.271 ± 0.083"), (1234.4, 56.0, "1234 ± 56"), (0.5, 0.0, "0.5"), (2.5, None, "2.5")],
)
def test_values_have_as_many_places_as_their_error_deserves(value, error, expected):
    assert with_error({"value": value, "stderr": error}) == expected


def test_paths_of_one_machine_are_shortened():
    assert [short_name(n) for n in ("/a/b/kl", "../kl/", "owner/name", "demo")] == ["kl", "kl", "owner/name", "demo"]
