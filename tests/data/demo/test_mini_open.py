"""The open questions: the same everywhere, answered by the small world, with the chances that the module states."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest

from kd.common.errors import DataError
from kd.data.demo.animals import ANIMALS
from kd.data.demo.mini_open import OPEN_COUNTS, chances, open_examples, right_answers
from kd.data.sources import load_corpus

KINDS = ("food", "home", "colour")


def test_every_right_answer_fits_the_question_and_no_other_does() -> None:
    for split in OPEN_COUNTS:
        for example in open_examples(split, 300):
            kind = example.task.removeprefix("open_")
            (value,) = {one.value(kind) for one in ANIMALS if f" {one.value(kind)}" in example.prompt}
            assert set(example.references) == {one.one for one in ANIMALS if one.value(kind) == value}
            assert example.target == example.references[0]


def test_no_question_is_in_both_splits_and_training_ones_come_several_times() -> None:
    prompts = {split: [example.prompt for example in open_examples(split)] for split in OPEN_COUNTS}
    assert not set(prompts["train"]) & set(prompts["heldout"])
    assert len(prompts["train"]) > 2 * len(set(prompts["train"]))


def test_answers_come_as_often_as_their_chances_say() -> None:
    """Of 6,000 answers; four standard errors of a share."""
    answers: dict[tuple[str, ...], list[str]] = {}
    for example in open_examples("train"):
        answers.setdefault(example.references[1:], []).append(example.target)
    for right, given in answers.items():
        counts = Counter(given)
        for name, chance in zip(right, chances(right), strict=True):
            assert counts[name] / len(given) == pytest.approx(chance, abs=4 * (0.25 / len(given)) ** 0.5)
    assert chances(right_answers("food", "mice")) == pytest.approx([6 / 11, 3 / 11, 2 / 11])


def test_a_longer_list_begins_with_the_shorter_one_and_is_the_same_everywhere() -> None:
    short, long = list(open_examples("heldout", 5)), list(open_examples("heldout", 9))
    assert long[:5] == short
    text = json.dumps([[e.id, e.prompt, e.target, e.references] for e in open_examples("train", 100)])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "e900ccddf55dce61"


def test_the_source_has_two_splits() -> None:
    corpus = load_corpus("mini-open:heldout")
    assert (corpus.kind, len(corpus.examples)) == ("pairs", 500)
    with pytest.raises(DataError, match="split"):
        load_corpus("mini-open:other")
