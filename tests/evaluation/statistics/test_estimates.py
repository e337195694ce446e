"""Ratios, clustered errors and their differences, against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kd.common.errors import DataError
from kd.data.rows.example import Example
from kd.evaluation.statistics.estimates import (
    Documents,
    difference_stderr,
    documents_behind,
    figures_by_task,
    from_statistics,
    per_example,
    standard_error,
    with_tasks,
)


def test_ratio_and_its_error_equal_numbers_worked_by_hand():
    documents = Documents.of_examples(["a#0", "a#1", "b#0"], "documents")
    estimate = documents.ratio(np.array([1.0, 2.0, 6.0]), np.array([2.0, 2.0, 2.0]))
    # s = (3, 6), c = (4, 2): R = 9/6; residuals 3 - 6 = -3 and 6 - 3 = 3; se² = 2/1 * (9 + 9) / 36 = 1
    assert estimate.value == 1.5
    assert estimate.stderr == pytest.approx(1.0, rel=1e-12)
    assert estimate.n == 6


def test_examples_of_one_document_count_as_one_draw():
    sums, counts = np.array([1.0, 1.0, 3.0, 3.0]), np.ones(4)
    clustered = Documents.of_examples(["a#0", "a#1", "b#0", "b#1"], "documents").ratio(sums, counts)
    apart = Documents.of_examples(["a#0", "a#1", "b#0", "b#1"], "pairs").ratio(sums, counts)
    assert clustered.value == apart.value
    assert clustered.stderr > 1.5 * apart.stderr


def test_influences_add_up_to_zero():
    rng = np.random.default_rng(0)
    documents = Documents.of_examples([f"d{i % 7}#{i}" for i in range(40)], "documents")
    estimate = documents.ratio(rng.random(40), rng.integers(1, 9, 40))
    assert estimate.influence.sum() == pytest.approx(0, abs=1e-12)  # the residuals of a ratio do, exactly


def test_error_of_a_mean_is_the_textbook_one_when_documents_have_equal_size():
    values = np.random.default_rng(1).normal(size=50)
    estimate = Documents.of_examples([str(i) for i in range(50)], "pairs").ratio(values, np.ones(50))
    assert estimate.stderr == pytest.approx(values.std(ddof=1) / math.sqrt(50), rel=1e-12)


def test_clustered_error_matches_the_spread_over_repeated_samples():
    rng = np.random.default_rng(2)
    found: list[float] = []
    claimed: list[float] = []
    for _ in range(400):
        sizes = rng.integers(1, 20, 30)
        sums = sizes * (2.0 + rng.normal(size=30)) + rng.normal(size=30) * np.sqrt(sizes)
        estimate = Documents.of_examples([str(i) for i in range(30)], "pairs").ratio(sums, sizes)
        found.append(estimate.value)
        assert estimate.stderr is not None
        claimed.append(estimate.stderr)
    # 400 samples know a spread to 3.5 %; the linearised error of 30 documents is about 4 % low
    assert np.mean(claimed) == pytest.approx(np.std(found), rel=0.15)


def test_difference_of_an_estimate_with_itself_has_no_error():
    influence = np.array([0.3, -0.1, -0.2])
    assert difference_stderr(influence, influence) == 0.0


def test_paired_error_is_smaller_than_adding_errors_when_documents_are_hard_for_both():
    hard = np.random.default_rng(3).normal(size=40)
    left, right = hard + 0.1 * np.sin(np.arange(40)), hard
    alone = [standard_error(influence) or 0.0 for influence in (left, right)]
    added = math.hypot(*alone)
    assert difference_stderr(left, right) < 0.2 * added


def test_a_single_document_has_no_error():
    assert Documents.of_examples(["a#0", "a#1"], "documents").ratio(np.ones(2), np.ones(2)).stderr is None


def test_exponential_follows_the_delta_method():
    documents = Documents.of_examples(["a", "b", "c"], "pairs")
    sums, counts = np.array([2.0, 3.0, 3.5]), np.ones(3)
    estimate = documents.ratio(sums, counts).exponential()
    moved = documents.ratio(sums + np.array([1e-6, 0, 0]), counts).exponential()
    assert estimate.value == pytest.approx(math.exp(8.5 / 3))
    # moving one document by 1e-6 moves the mean by a third of that, and the exponential by exp(mean) times as much
    assert (moved.value - estimate.value) / 1e-6 == pytest.approx(estimate.value / 3, rel=1e-4)
    assert estimate.stderr == pytest.approx(estimate.value * documents.ratio(sums, counts).stderr, rel=1e-12)


def test_exponential_of_a_huge_mean_is_infinite_and_claims_no_error():
    estimate = Documents.of_examples(["a", "b"], "pairs").ratio(np.array([800.0, 900.0]), np.ones(2)).exponential()
    assert estimate.value == math.inf
    assert estimate.stderr is None


def test_ids_with_a_hash_stay_apart_in_pairs():
    assert Documents.of_examples(["q#1", "q#2"], "pairs").names == ("q#1", "q#2")
    assert Documents.of_examples(["c#a#0", "c#a#1", "c#b#0"], "documents").names == ("c#a", "c#b")


def test_sums_per_example_equal_a_loop():
    values, lengths = np.arange(7.0), [2, 1, 4]
    assert per_example(values, lengths).tolist() == [1.0, 2.0, 3 + 4 + 5 + 6.0]


def test_nothing_to_average_over_is_an_error():
    with pytest.raises(DataError, match="nothing to average"):
        Documents.of_examples(["a"], "pairs").ratio(np.zeros(1), np.zeros(1))


def mean_of_sums(sums: np.ndarray) -> float:
    return float(sums[0] / sums[1])


@pytest.fixture
def measured():
    """Sixty examples of forty documents and two tasks, and `[60, 2]` statistics whose ratio is a mean."""
    rng = np.random.default_rng(0)
    tasks = [("a", "b")[i % 40 % 2] for i in range(60)]
    examples = [Example(str(i), "x", f"prompt {i % 40}", task) for i, task in enumerate(tasks)]
    return Documents.of_prompts(examples), np.stack([rng.random(60), np.ones(60)], axis=1), tasks


def test_resampling_a_mean_gives_the_error_of_a_mean(measured):
    documents, statistics, _ = measured
    exact = documents.ratio(statistics[:, 0], statistics[:, 1])
    found = from_statistics(documents, statistics, mean_of_sums, seed=0)
    assert found.value == pytest.approx(exact.value, rel=1e-12)
    # 1,000 draws know a standard error within 1 / sqrt(2000) = 2.2 %, and divide by G where it divides by G - 1: 1.3 %
    assert found.stderr == pytest.approx(exact.stderr, rel=0.08)
    # the jackknife of a ratio is its linearisation up to 1/G
    assert found.influence == pytest.approx(exact.influence, abs=0.05 * np.abs(exact.influence).max())
    assert found.influence.sum() == pytest.approx(0, abs=1e-12)


def test_resampling_depends_on_its_seed_alone(measured):
    documents, statistics, _ = measured
    first, again, other = (from_statistics(documents, statistics, mean_of_sums, seed=s).stderr for s in (1, 1, 2))
    assert first == again != other


def test_tasks_of_a_resampled_score_equal_those_of_a_mean(measured):
    documents, statistics, tasks = measured
    exact = figures_by_task("m", documents, statistics[:, 0], tasks)
    found = with_tasks("m", documents, statistics, tasks, mean_of_sums, seed=0)
    assert set(found) == {"m", *exact}
    for name, estimate in exact.items():
        assert found[name].value == pytest.approx(estimate.value, rel=1e-12)
        assert found[name].n == estimate.n
        assert standard_error(found[name].influence) == pytest.approx(estimate.stderr, rel=0.05)


def test_one_document_has_no_error(measured):
    documents = Documents.of_prompts([Example("0", "x", "p"), Example("1", "y", "p")])
    assert documents.names == ("0",)
    assert from_statistics(documents, np.ones((2, 2)), mean_of_sums, seed=0).stderr is None


def test_a_part_spread_over_all_documents_keeps_its_error(measured):
    documents, statistics, tasks = measured
    inside = np.array([task == "b" for task in tasks])
    part = documents.part(inside)
    assert len(part.names) == 20
    estimate = part.ratio(statistics[inside, 0], statistics[inside, 1])
    spread = documents.spread(estimate, part)
    assert len(spread.influence) == 40
    assert spread.stderr == pytest.approx(estimate.stderr, rel=1e-12)


def test_documents_of_other_tasks_do_not_count_for_a_task():
    a, b = np.array([0.1, -0.1, 0.0, 0.0, 0.0]), np.array([0.0, 0.2, -0.2, 0.0, 0.0])
    assert documents_behind([a, b]) == 3
    assert documents_behind([np.zeros(7)]) == 7  # every document alike: all of them count
    assert documents_behind([np.array([0.3, 0.0])]) == 2
