"""The thirty small tasks: their rows are the same everywhere, in one split each, balanced, and answered by what they say."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations

import pytest

from kd.common.errors import DataError
from kd.data.demo.animals import ANIMALS, KINDS
from kd.data.demo.mini_flan import MAKERS, SIZES, made_rows
from kd.data.instruction_tasks.task_files import load_task, mini_task_names
from kd.data.sources import load_corpus

FACTS = {(animal.name, kind): animal.value(kind) for animal in ANIMALS for kind in KINDS}
SAID = (
    ("food", r"\ban? (\w+) (?:eats|feeds on) (\w+)"),
    ("home", r"\ban? (\w+) (?:lives|is at home) in the (\w+)"),
    ("colour", r"\ban? (\w+) is (?!at home)(\w+)"),
)
ASKED = (
    ("food", r"What does an? (\w+) eat"),
    ("home", r"Where does an? (\w+) live"),
    ("colour", r"What colour is an? (\w+)"),
)
CLAIMED = (
    ("food", r"does an? (\w+) eat (\w+)"),
    ("home", r"does an? (\w+) live in the (\w+)"),
    ("colour", r"is an? (\w+) (\w+)"),
)


def read(text: str, patterns=SAID) -> list[tuple[str, ...]]:
    """Kind, animal and value of every statement, by patterns that know nothing of the generator's tables."""
    return [(kind, *m) for kind, pattern in patterns for m in re.findall(pattern, text, re.IGNORECASE)]


def asked(question: str) -> list[tuple[str, str]]:
    """Kind and animal that a question asks for."""
    return [(kind, animal) for kind, pattern in ASKED for animal in re.findall(pattern, question)]


def stated(text: str) -> dict[tuple[str, str], str]:
    return {(animal, kind): value for kind, animal, value in read(text)}


@pytest.mark.parametrize("maker", MAKERS)
def test_no_row_is_in_two_splits_or_twice_in_one(maker: str) -> None:
    rows = {split: [json.dumps(row) for row in made_rows(maker, split)] for split in SIZES}
    assert all(len(set(said)) == len(said) > 20 for said in rows.values())
    assert all(not set(a) & set(b) for a, b in combinations(rows.values(), 2))


def test_the_rows_are_the_same_in_every_process_and_version() -> None:
    corpora = [load_corpus("mini-flan", split=split) for split in ("train", "test")]
    assert [corpus.digest[:16] for corpus in corpora] == ["4ef58246503dd72e", "e0c0f7a398982b81"]


def test_labels_take_turns() -> None:
    for name in mini_task_names():
        task = load_task(name)
        if task.labels is not None:
            rows = made_rows(str(task.made), "train")
            counts = Counter(str(row[task.labels.column]) for row in rows)
            assert max(counts.values()) - min(counts.values()) <= 1, name


def test_every_task_has_ten_templates_of_which_at_most_three_are_inverted() -> None:
    assert len(mini_task_names()) == 30 == len(MAKERS)
    for name in mini_task_names():
        templates = load_task(name).templates
        assert len({t.prompt for t in templates}) == 10
        assert sum(t.inverted for t in templates) in (1, 2, 3)
        assert not templates[0].inverted


def test_passages_and_sentences_say_what_is_true_in_the_world() -> None:
    for maker, column in (("span", "passage"), ("dialogue", "story"), ("triples", "text"), ("avish", "english")):
        for row in made_rows(maker, "test"):
            assert stated(row[column]).items() <= FACTS.items(), row


def test_answers_about_a_passage_can_be_read_from_it() -> None:
    for row in (*made_rows("span", "test"), *made_rows("span2", "test")):
        ((kind, animal),) = asked(row["question"])
        answer = stated(row["passage"]).get((animal, kind))
        assert row["answers"] == ([] if answer is None else [answer])
    for row in made_rows("yesno", "test"):
        kind, animal, value = read(row["question"], CLAIMED)[0]
        assert row["answer"] == (stated(row["passage"])[animal, kind] == value)
    for row in made_rows("count", "test"):
        food = re.findall(r"eat (\w+)", row["question"])[0]
        eaters = [1 for kind, _, value in read(row["passage"]) if (kind, value) == ("food", food)]
        assert row["answers"] == [("none", "one", "two", "three")[len(eaters)]]


def test_a_sentence_follows_where_the_premise_says_so() -> None:
    for maker, labels in (("rte", {"yes": 0, "no": 1, "open": 1}), ("cb", {"yes": 0, "no": 1, "open": 2})):
        for row in made_rows(maker, "test"):
            ((key, claimed),) = stated(row["hypothesis"]).items()
            known = stated(row["premise"]).get(key)
            verdict = "open" if known is None else "yes" if known == claimed else "no"
            assert row["label"] == labels[verdict], row


def test_held_out_questions_have_one_right_choice_by_the_facts_of_the_world() -> None:
    for row in made_rows("facts", "test"):
        ((kind, animal),) = asked(row["question"])
        assert [i for i, text in enumerate(row["choices"]) if text == FACTS[animal, kind]] == [row["label"]]
    for row in made_rows("endings", "test"):
        animal = re.findall(r"The (\w+) is", row["start"])[0]
        known = [FACTS[animal, kind] for kind in ("food", "home")]
        assert [i for i, text in enumerate(row["endings"]) if text.rstrip(".").split()[-1] in known] == [row["label"]]


def test_an_unknown_maker_or_split_is_named() -> None:
    with pytest.raises(DataError, match="unknown maker of rows"):
        made_rows("spam", "train")
    with pytest.raises(DataError, match="unknown split"):
        made_rows("span", "heldout")
