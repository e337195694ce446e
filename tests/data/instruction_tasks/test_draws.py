"""A limit keeps the first rows, and drawn ones where the first would have other labels than the file."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest

from kd.data.instruction_tasks.draws import first_rows_are_unlike, in_label_order, kept_rows, keyed

SORTED = ["a"] * 60 + ["b"] * 40


def names(n: int) -> list[str]:
    return [f"t/{i}" for i in range(n)]


def test_rows_in_shuffled_order_are_kept_from_the_first() -> None:
    for seed in range(200):
        labels = SORTED.copy()
        random.Random(seed).shuffle(labels)
        assert not in_label_order(labels)
        assert kept_rows(labels, names(100), 10) == list(range(10))


def test_sorted_rows_are_drawn_in_the_shares_of_the_file() -> None:
    labels = ["a"] * 6000 + ["b"] * 4000
    kept = kept_rows(labels, names(10_000), 1000)
    assert (len(kept), kept) == (1000, sorted(kept))
    assert Counter(labels[i] for i in kept)["a"] == pytest.approx(600, abs=60)  # standard deviation 15
    assert kept != kept_rows(labels, names(10_000), 1000, seed=1)
    assert set(kept_rows(labels, names(10_000), 500)) < set(kept), "a larger limit keeps them too"


@pytest.mark.parametrize(
    ("labels", "limit", "unlike"),
    [
        (["a", "a", "b", "b"], 2, True),
        (["a", "b", "a", "b"], 2, False),
        (["a", "b", "c"], 2, False),  # a label of its own for each row is no order
        (["a"] * 10, 5, False),
        ([], 5, False),
        (SORTED, 100, False),
        (SORTED, 60, True),  # a label is missing
        (SORTED, 95, False),  # 63 % in place of 60 %
        ((["a"] * 20 + ["b"] * 20) * 10, 30, True),  # blocks
        ((["a"] * 20 + ["b"] * 20) * 10, 200, False),  # many of them
        ([None] * 10, 5, False),
    ],
)
def test_the_first_rows_are_unlike_the_file(labels: list[str], limit: int, unlike: bool) -> None:
    assert first_rows_are_unlike(labels, limit) == unlike


def test_the_real_rows_of_anlis_third_round_lie_in_blocks(shared: Path) -> None:
    lines = (shared / "tasks" / "anli_r3" / "dev.jsonl").read_text(encoding="utf-8").splitlines()
    labels = [json.loads(line)["label"] for line in lines]
    assert set(labels[:30]) == {0}
    kept = kept_rows(labels, names(len(labels)), 30)
    assert {labels[i] for i in kept} == {0, 1, 2}


def test_a_keyed_number_is_fixed_forever() -> None:
    """A golden number: template choice and order of every published cache hang on it."""
    assert keyed(0, "template", "boolq/train/0") % 10**9 == KEYED


def test_parts_do_not_run_together() -> None:
    assert keyed(0, "ab", "c") != keyed(0, "a", "bc")
    assert keyed(0, "a") != keyed(1, "a")


KEYED = 270_315_385
