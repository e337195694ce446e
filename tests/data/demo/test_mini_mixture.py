"""The made-up mixture: the same everywhere, balanced, its facts apart, its answers to be found by reading."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import islice

import pytest

from kd.common.errors import DataError
from kd.data.demo.mini_mixture import DEFAULT_COUNTS, FAMILIES, examples, is_right
from kd.data.demo.mini_world import PEOPLE, THINGS, split_of_pair
from kd.data.rows.example import Example, text_digest
from kd.data.sources import load_corpus

COUNT = 2520
"""360 of each family: whole blocks of 2, 4, 6 and 9 examples; `choice` (7) ends within one."""

TRAIN = list(examples("train", COUNT))
HELD_OUT = list(examples("heldout", COUNT))
BOTH = pytest.mark.parametrize("found", [TRAIN, HELD_OUT], ids=["train", "heldout"])


# A reader of its own: what the texts say, found by patterns that know nothing of the generator's tables.
NAME, WORD = r"([A-Z]\w+)", r"(\w+)"
STATEMENTS = [
    ("place", rf"{NAME}'s {WORD} is in the {WORD}\b", (0, 1, 2)),
    ("place", rf"{NAME} keeps a {WORD} in the {WORD}\b", (0, 1, 2)),
    ("place", rf"In the {WORD} lies {NAME}'s {WORD}\b", (1, 2, 0)),
    ("colour", rf"{NAME} has a {WORD} {WORD}\b", (0, 2, 1)),
    ("colour", rf"{NAME}'s {WORD} is (?!in\b){WORD}\b", (0, 1, 2)),
    ("colour", rf"The {WORD} of {NAME} looks {WORD}\b", (1, 0, 2)),
    (
        "day",
        rf"(?<!\bOn \w{{6}} )(?<!\bOn \w{{7}} )(?<!\bOn \w{{8}} )(?<!\bOn \w{{9}} ){NAME} bought a {WORD} on {WORD}\b",
        (0, 1, 2),
    ),
    ("day", rf"On {WORD} {NAME} bought a {WORD}\b", (1, 2, 0)),
    ("day", rf"{NAME}'s {WORD} was bought on {WORD}\b", (0, 1, 2)),
    ("given", rf"{NAME} gave {NAME} the {WORD}\b", (0, 2, 1)),
    ("given", rf"{NAME} got the {WORD} from {NAME}\b", (2, 1, 0)),
    ("given", rf"The {WORD} went from {NAME} to {NAME}\b", (1, 0, 2)),
]
QUESTIONS = [
    ("place", rf"Where is {NAME}'s {WORD}\?"),
    ("colour", rf"What colour is {NAME}'s {WORD}\?"),
    ("day", rf"When did {NAME} buy the {WORD}\?"),
]
CHECKS = [
    ("place", rf"Is {NAME}'s {WORD} in the {WORD}\?"),
    ("colour", rf"Is {NAME}'s {WORD} {WORD}\?"),
    ("day", rf"Did {NAME} buy the {WORD} on {WORD}\?"),
]
Statement = tuple[str, str, str, str]
"""Relation, person, thing, value (for `given`: the person who gets it)."""


def statements(text: str) -> list[Statement]:
    """Every statement of `text`, in the order of the text."""
    found = []
    for relation, pattern, order in STATEMENTS:
        for match in re.finditer(pattern, text):
            person, thing, value = (match.groups()[i] for i in order)
            found.append((match.start(), (relation, person, thing, value)))
    return [statement for _, statement in sorted(found)]


def listed(prompt: str) -> tuple[str, ...]:
    """The options that a prompt lists, in its order."""
    if "OPTIONS:\n" in prompt:
        return tuple(line.removeprefix("- ") for line in prompt.split("OPTIONS:\n")[1].split("\n"))
    if "OPTIONS: " in prompt:
        return tuple(prompt.split("OPTIONS: ")[1].split(" / "))
    if "Choose from:  " in prompt:
        return tuple(prompt.split("Choose from:  ")[1].removesuffix(".").split(", "))
    return ()


def spoken(choice: str) -> str:
    return {"true": "yes", "false": "no", "not known": "maybe"}.get(choice, choice)


def asked(prompt: str, patterns: list[tuple[str, str]]) -> tuple[str, ...]:
    (found,) = [(relation, *m.groups()) for relation, pattern in patterns for m in re.finditer(pattern, prompt)]
    return found


def concepts(prompt: str) -> list[str]:
    (found,) = re.findall(r": +(\w+(?:, \w+)+)", prompt)
    return found.split(", ")


def judge(premises: list[Statement], claim: Statement) -> str:
    for relation, person, thing, value in premises:
        if claim[:3] == (relation, person, thing):
            return "yes" if claim[3] == value else "no"
    return "maybe"


def read(example: Example) -> str:
    """The answer as a reader would give it; for generated text: a target rebuilt from the prompt."""
    prompt, said = example.prompt, statements(example.prompt)
    if example.task == "nli":
        return judge(said[:-1], said[-1])
    if example.task == "boolq":
        relation, person, thing, value = asked(prompt, CHECKS)
        return judge(said, (relation, person, thing, value))
    if example.task in ("choice", "extract"):
        question = asked(prompt, QUESTIONS)
        (value,) = [s[3] for s in said if s[:3] == question]
        return value
    if example.task == "paraphrase":
        first, second = said
        return "yes" if first == second else "no"
    if example.task == "summary":
        ((_, person, thing, _),) = said
        return f"{person} {thing}"
    assert example.task == "concepts"
    words = concepts(prompt)
    (person,) = (w for w in words if w in PEOPLE)
    (thing,) = (w for w in words if w in THINGS)
    return f"{person} {thing}"


@BOTH
def test_a_reader_of_the_prompt_finds_the_answer(found: list[Example]):
    for example in found:
        answer = read(example)
        if example.task in ("summary", "concepts"):
            person, thing = answer.split()
            for text in (example.target, *example.references):
                assert re.search(rf"\b{person}\b", text), (example.id, text)
                assert re.search(rf"\b{thing}\b", text), (example.id, text)
        else:
            assert spoken(example.target) == answer, example


@BOTH
def test_every_wording_of_a_summary_says_what_the_report_says(found: list[Example]):
    for example in found:
        if example.task == "summary" and example.references:
            said = statements(example.prompt)
            assert all(statements(text) == said for text in example.references)
        elif example.task == "summary":
            assert re.fullmatch(r"Name: \w+\nThing: \w+", example.target)


@BOTH
def test_concepts_are_all_used(found: list[Example]):
    past = {"carry": "carried", "drop": "dropped", "find": "found", "hide": "hid", "paint": "painted", "take": "took"}
    for example in found:
        if example.task == "concepts":
            words = {past.get(w, w) for w in concepts(example.prompt)}
            for text in (example.target, *example.references):
                assert words <= set(re.findall(r"\w+", text)), example


@BOTH
def test_choices_are_those_of_the_prompt_and_the_target_is_the_right_one(found: list[Example]):
    for example in found:
        assert listed(example.prompt) == example.choices
        if example.choices:
            assert len(set(example.choices)) == len(example.choices)
            assert example.answer is not None
            assert example.choices[example.answer] == example.target
        else:
            assert example.answer is None
            assert example.target in (example.references or (example.target,))


def test_no_pair_of_person_and_thing_is_in_both_splits():
    pairs: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for example in (*TRAIN, *HELD_OUT):
        for text in (example.prompt, example.target, *example.references):
            for relation, person, thing, value in statements(text):
                pairs[example.split].add((person, thing))
                if relation == "given":
                    pairs[example.split].add((value, thing))
            for match in re.finditer("|".join(p for _, p in QUESTIONS + CHECKS), text):
                person, thing, *_ = [g for g in match.groups() if g]
                pairs[example.split].add((person, thing))
        if example.task == "concepts":
            person, thing = read(example).split()
            pairs[example.split].add((person, thing))
    assert all(split_of_pair(*pair) == split for split in pairs for pair in pairs[split])
    assert not pairs["train"] & pairs["heldout"]
    # every held-out pair is used, and every person and every thing is known from training
    assert len(pairs["heldout"]) == len(PEOPLE) * len(THINGS) // 5
    assert {p for p, _ in pairs["train"]} == set(PEOPLE)
    assert {t for _, t in pairs["train"]} == set(THINGS)


def test_no_held_out_prompt_was_trained_on():
    assert not {e.prompt for e in TRAIN} & {e.prompt for e in HELD_OUT}


@BOTH
def test_families_labels_and_places_are_balanced(found: list[Example]):
    assert set(Counter(e.task for e in found).values()) == {COUNT // 7}
    for task in FAMILIES:
        chosen = [e for e in found if e.task == task and e.choices]
        by_size = defaultdict(list)
        for e in chosen:
            by_size[len(e.choices)].append(e)
        for size, group in by_size.items():
            places = Counter(e.answer for e in group)
            assert len(places) == size
            assert max(places.values()) - min(places.values()) <= 1, task  # one unfinished block
            if task != "choice":
                labels = Counter(spoken(e.target) for e in group)
                assert len(set(labels.values())) == 1, task


def test_the_place_of_an_answer_says_nothing_about_its_meaning():
    for task in ("nli", "boolq", "paraphrase"):
        cells = Counter((spoken(e.target), e.answer) for e in TRAIN if e.task == task)
        assert len(set(cells.values())) == 1


def test_a_word_that_is_seen_in_the_passage_is_not_enough():
    """Right by taking a value of the passage at random: clearly below certainty, in every family that asks for one."""
    for task in ("choice", "extract"):
        shares = []
        for e in TRAIN:
            if e.task == task:
                values = [s[3] for s in statements(e.prompt)]
                shares.append(values.count(e.target) / len(values))
        assert sum(shares) / len(shares) <= 0.5


def test_a_longer_list_begins_with_the_shorter_one():
    for split in DEFAULT_COUNTS:
        assert list(examples(split, 100)) == list(islice(examples(split, 1000), 100))
        assert list(examples(split))[:50] == list(examples(split, 50))


def test_another_process_makes_the_same_text():
    script = (
        "from kd.data.demo.mini_mixture import examples; from kd.data.rows.example import text_digest; "
        "print(text_digest(examples('train', 700)), text_digest(examples('heldout', 700)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [text_digest(TRAIN[:700]), text_digest(HELD_OUT[:700])]


def test_the_text_is_the_one_the_teacher_was_trained_on():
    """A golden digest: new wording asks for a new teacher (scripts/train_demo_t5.py) and new figures in the log."""
    assert text_digest(TRAIN[:700]) == "39a091acdd3ce48a882abe34d092cd37bf796a5a912eaa3f7e8a1e75be625847"
    assert text_digest(HELD_OUT[:700]) == "49a8097e6e9dedcabe19a8398d259dde9624e384161a3d3e3d5432f9601e282e"


def test_another_seed_gives_other_text():
    assert text_digest(examples("train", 70, seed=1)) != text_digest(TRAIN[:70])


def test_ids_are_unique_over_both_splits():
    ids = [e.id for e in (*TRAIN, *HELD_OUT)]
    assert len(set(ids)) == len(ids)
    assert TRAIN[0].id == "mini/nli/0"
    assert HELD_OUT[0].id == "mini/nli/heldout/0"


@BOTH
def test_white_space_and_characters_that_sentencepiece_loses_occur_on_both_sides(found: list[Example]):
    for side in ("prompt", "target"):
        texts = [getattr(e, side) for e in found]
        for mark in ("  ", "\n", "é"):
            assert any(mark in text for text in texts), (side, mark)
    assert any("…" in e.prompt for e in found)


@BOTH
def test_texts_are_short(found: list[Example]):
    assert all(5 <= len(re.findall(r"\w+|[^\w\s]", e.prompt)) <= 60 for e in found)
    assert all(1 <= len(re.findall(r"\w+|[^\w\s]", e.target)) <= 14 for e in found)


def test_an_answer_is_right_up_to_white_space_and_nfkc():
    example = Example("a", "Name: Zoë\nThing: lamp", references=("It is Zoë's  lamp.",))
    assert is_right(example, "Name: Zoë Thing: lamp")
    assert is_right(example, "It is Zoe\u0308's lamp.")
    assert not is_right(example, "Name: Zoë Thing: map")


def test_the_source_is_known_by_name():
    corpus = load_corpus("mini")
    assert (corpus.kind, corpus.split, len(corpus.examples)) == ("pairs", "train", 6000)
    assert corpus.examples[:70] == tuple(TRAIN[:70])
    assert len(load_corpus("mini:heldout").examples) == 700
    assert load_corpus("mini", split="test").split == "heldout"


def test_an_unknown_split_is_refused_with_what_there_is():
    with pytest.raises(DataError, match="heldout"):
        load_corpus("mini:helout")
