"""Rows of the tasks of `mini-flan`, FLAN in small: ten clusters, thirty tasks, made up by rules. No files, no network.

Seven clusters are those that FLAN's ablation trains on, and three are those that it holds out:

    summarization           mini_diary, mini_mail, mini_talk, mini_topic
    translation             mini_avish, mini_belic, mini_coran, mini_dunic     languages that do not exist
    reading_comprehension   mini_count, mini_span, mini_span2, mini_yesno
    sentiment               mini_films, mini_hotels, mini_meals, mini_messages
    struct_to_text          mini_cards, mini_concepts, mini_table, mini_triples
    coreference             mini_gap, mini_pronoun
    conversational_qa       mini_dialogue, mini_interview                      a part of FLAN's cluster misc
    nli                     mini_cb, mini_rte                                  held out
    closed_book_qa          mini_facts, mini_which                             held out
    commonsense             mini_endings, mini_guess                           held out

All tell of the animals of `kd.data.demo.animals`, so that what one cluster teaches helps in others. The tasks' files, with ten
templates each, are in `data/instruction_tasks/instructions/mini`; they name a maker of this module (`made: NAME`).

A row belongs to one split by a digest of what it says, so no test row is among the training rows; the facts are in
all splits. Labels take turns, so that they are balanced. The same rows are made in every process and every version of Python.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from kd.common.errors import unknown_name
from kd.data.demo.animals import (
    ANIMALS,
    KINDS,
    QUESTIONS,
    STATEMENTS,
    Animal,
    others,
    sentence,
    statement,
    unlike,
    values,
)
from kd.data.demo.mini_mixture import FILLERS
from kd.data.demo.mini_world import Draw
from kd.data.demo.opinions import opinion
from kd.data.demo.small_languages import LANGUAGES

Row = dict[str, Any]
SIZES = {"train": 400, "dev": 40, "test": 100}
"""Split -> most rows of each task."""
TRIES = 1500
"""Rows that are made at most to find those of a split: some tasks have fewer than `SIZES` says."""
READERS = ("Anna", "Boris", "Clara", "Hugo", "Lena", "Omar", "Rosa", "Tom")
"""People who talk and write."""
NUMBERS = ("none", "one", "two", "three")


@cache
def made_rows(maker: str, split: str) -> Sequence[Row]:
    """The rows of a split, which nobody may change. Raises DataError for an unknown maker or split."""
    if maker not in MAKERS:
        raise unknown_name("maker of rows", maker, MAKERS)
    if split not in SIZES:
        raise unknown_name("split", split, SIZES, where=f"made: {maker}")
    rows: dict[str, Row] = {}
    for n in range(TRIES):
        row = MAKERS[maker](Draw(f"mini-flan/{maker}/{split}/{n}", split), len(rows))
        said = json.dumps(row, sort_keys=True)
        if split_of_row(said) == split:
            rows.setdefault(said, row)
        if len(rows) == SIZES[split]:
            break
    return tuple(rows.values())


def split_of_row(said: str) -> str:
    """The one split that a row may be in, by a digest of its JSON: one row in ten is dev, two are test."""
    tenth = int.from_bytes(hashlib.blake2b(said.encode("ascii"), digest_size=8).digest(), "big") % 10
    return ("dev", "test", "test")[tenth] if tenth < 3 else "train"


def _placed(draw: Draw, right: str, wrong: list[str]) -> tuple[list[str], int]:
    """The texts with the right one at a random place, and that place."""
    label = draw.below(len(wrong) + 1)
    return [*wrong[:label], right, *wrong[label:]], label


def _stated(draw: Draw, animal: Animal, kind: str) -> str:
    return sentence(statement(kind, animal, wording=draw.below(len(STATEMENTS[kind]))))


def _with_fillers(draw: Draw, text: str) -> str:
    """The text among two sentences that say nothing of it."""
    sentences = draw.shuffled(FILLERS)[:2]
    sentences.insert(draw.below(3), text)
    return " ".join(sentences)


def _diary(draw: Draw, number: int) -> Row:
    animal = draw.pick(ANIMALS)
    seen = f"{sentence(f'I saw {animal.one} in the {animal.home}')} It ate {animal.food}."
    return {
        "text": _with_fillers(draw, seen),
        "summary": sentence(f"{animal.one} ate {animal.food} in the {animal.home}"),
    }


def _mail(draw: Draw, number: int) -> Row:
    animal, (writer, reader) = draw.pick(ANIMALS), draw.shuffled(READERS)[:2]
    about = f"There is {animal.one} in the {animal.home}. Please bring {animal.food} for it."
    return {
        "mail": f"Dear {reader}, {_with_fillers(draw, about)} Yours, {writer}",
        "subject": f"{animal.food.capitalize()} for the {animal.name} in the {animal.home}",
    }


def _talk(draw: Draw, number: int) -> Row:
    animal, (one, other) = draw.pick(ANIMALS), draw.shuffled(READERS)[:2]
    kind = draw.pick(("food", "home"))
    asked = QUESTIONS[kind].format(a=animal.one)
    answer = animal.food if kind == "food" else f"In the {animal.home}"
    return {
        "dialogue": f"{one}: {draw.pick(FILLERS)} {asked}\n{other}: {answer.capitalize()}, I think.",
        "summary": f"{other} tells {one} that {statement(kind, animal)}.",
    }


def _topic(draw: Draw, number: int) -> Row:
    kind = KINDS[number % 3]
    animals = draw.shuffled(ANIMALS)[:2]
    return {"text": " ".join(_stated(draw, animal, kind) for animal in animals), "label": number % 3}


def _foreign(language: str) -> Callable[[Draw, int], Row]:
    def make(draw: Draw, number: int) -> Row:
        parts = [statement(draw.pick(KINDS), animal) for animal in draw.shuffled(ANIMALS)[:2]]
        foreign = map(LANGUAGES[language], parts)
        return {"foreign": sentence(", ".join(foreign)), "english": sentence(", and ".join(parts))}

    return make


def _passage(draw: Draw, kinds: list[str], animals: list[Animal]) -> str:
    return " ".join(_stated(draw, animal, kind) for animal, kind in zip(animals, kinds, strict=True))


def _span(draw: Draw, number: int) -> Row:
    animals, kinds = draw.shuffled(ANIMALS)[:2], [draw.pick(KINDS), draw.pick(KINDS)]
    asked = draw.below(2)
    question = QUESTIONS[kinds[asked]].format(a=animals[asked].one)
    return {
        "passage": _passage(draw, kinds, animals),
        "question": question,
        "answers": [animals[asked].value(kinds[asked])],
    }


def _span_or_none(draw: Draw, number: int) -> Row:
    if number % 3:
        return _span(draw, number)
    animals, kinds = draw.shuffled(ANIMALS)[:2], [draw.pick(KINDS), draw.pick(KINDS)]
    missing = draw.pick([kind for kind in KINDS if kind != kinds[0]])
    question = QUESTIONS[missing].format(a=animals[0].one)
    return {"passage": _passage(draw, kinds, animals), "question": question, "answers": []}


def _count(draw: Draw, number: int) -> Row:
    food, much = draw.pick(("fish", "grass", "leaves", "insects", "worms", "mice")), number % 4
    eaters = draw.shuffled([animal for animal in ANIMALS if animal.food == food])[:much]
    rest = draw.shuffled([animal for animal in ANIMALS if animal.food != food])[: 3 - len(eaters)]
    animals = draw.shuffled([*eaters, *rest])
    return {
        "passage": _passage(draw, ["food"] * len(animals), animals),
        "question": f"How many of the animals eat {food}?",
        "answers": [NUMBERS[len(eaters)]],
    }


def _yes_no(draw: Draw, number: int) -> Row:
    animals, kinds = draw.shuffled(ANIMALS)[:2], [draw.pick(KINDS), draw.pick(KINDS)]
    asked = draw.below(2)
    animal, kind = animals[asked], kinds[asked]
    value = animal.value(kind) if number % 2 else others(draw, kind, animal, 1)[0]
    claim = {"food": "does {a} eat {v}", "home": "does {a} live in the {v}", "colour": "is {a} {v}"}[kind]
    return {
        "passage": _passage(draw, kinds, animals),
        "question": claim.format(a=animal.one, v=value),
        "answer": bool(number % 2),
    }


def _opinion(subject: str) -> Callable[[Draw, int], Row]:
    return lambda draw, number: {"text": opinion(draw, subject, good=bool(number % 2)), "label": number % 2}


def _triples(draw: Draw, number: int) -> Row:
    animal, kinds = draw.pick(ANIMALS), draw.shuffled(KINDS)[: 2 + draw.below(2)]
    verbs = {"food": "eats", "home": "lives in", "colour": "is"}
    facts = "; ".join(f"{animal.name} | {verbs[kind]} | {animal.value(kind)}" for kind in kinds)
    return {"data": facts, "text": sentence(_joined(animal, kinds))}


def _cards(draw: Draw, number: int) -> Row:
    animal, kinds = draw.pick(ANIMALS), draw.shuffled(KINDS)[: 2 + draw.below(2)]
    return {
        "data": ", ".join([f"name[{animal.name}]", *(f"{kind}[{animal.value(kind)}]" for kind in kinds)]),
        "text": sentence(_joined(animal, kinds)),
    }


def _table(draw: Draw, number: int) -> Row:
    animal, kinds = draw.pick(ANIMALS), draw.shuffled(KINDS)[: 2 + draw.below(2)]
    head, line = ["animal", *kinds], [animal.name, *(animal.value(kind) for kind in kinds)]
    return {"data": f"{' / '.join(head)}\n{' / '.join(line)}", "text": sentence(_joined(animal, kinds))}


def _joined(animal: Animal, kinds: list[str]) -> str:
    """Facts of an animal in one sentence, without capital and full stop."""
    first, *rest = (statement(kind, animal) for kind in kinds)
    *middle, last = (text.removeprefix(f"{animal.one} ") for text in rest)
    return f"{', '.join([first, *middle])} and {last}"


def _concepts(draw: Draw, number: int) -> Row:
    (animal, other), kind = draw.shuffled(ANIMALS)[:2], KINDS[number % 3]
    text = f"{statement(kind, animal)}, and {statement(kind, other)}"
    words = [animal.name, animal.value(kind), other.name, other.value(kind)]
    return {"concepts": draw.shuffled(list(dict.fromkeys(words))), "targets": [sentence(text)]}


def _pronoun(draw: Draw, number: int) -> Row:
    animal = draw.pick(ANIMALS)
    (other,) = unlike(draw, animal, ("food", "home"), 1)
    candidates = [animal.name, other.name] if number % 2 else [other.name, animal.name]
    clue = draw.pick((f"it had found {animal.food}", f"it was back in the {animal.home}"))
    return {
        "sentence": f"The {candidates[0]} did not see the {candidates[1]} any more, because {clue}.",
        "pronoun": "it",
        "candidates": [f"the {name}" for name in candidates],
        "label": candidates.index(animal.name),
    }


def _gap(draw: Draw, number: int) -> Row:
    animal = draw.pick(ANIMALS)
    (other,) = unlike(draw, animal, ("food", "home"), 1)
    names = [animal.name, other.name] if number % 2 else [other.name, animal.name]
    end = draw.pick((f"looked for {animal.food}", f"went home to the {animal.home}"))
    return {
        "sentence": f"The {names[0]} met the {names[1]} and after a while the _ {end}.",
        "option1": names[0],
        "option2": names[1],
        "answer": str(names.index(animal.name) + 1),
    }


def _dialogue(draw: Draw, number: int) -> Row:
    animals, kinds = draw.shuffled(ANIMALS)[:2], draw.shuffled(KINDS)[:2]
    story = " ".join(_stated(draw, animal, kind) for animal in animals for kind in kinds)
    before, animal = animals if number % 2 else reversed(animals)
    turns = f"Q: {QUESTIONS[kinds[0]].format(a=before.one)} A: {before.value(kinds[0])}"
    return {"story": story, "turns": turns, "question": f"And {animal.one}?", "answers": [animal.value(kinds[0])]}


def _interview(draw: Draw, number: int) -> Row:
    animal, (first, second) = draw.pick(ANIMALS), draw.shuffled(KINDS)[:2]
    story = " ".join(draw.shuffled([_stated(draw, animal, kind) for kind in KINDS]))
    turns = f"Q: {QUESTIONS[first].format(a=animal.one)} A: {animal.value(first)}"
    return {
        "story": story,
        "turns": turns,
        "question": QUESTIONS[second].format(a="it"),
        "answers": [animal.value(second)],
    }


def _rte(draw: Draw, number: int) -> Row:
    return _entailment(draw, 2 * (number % 2))


def _cb(draw: Draw, number: int) -> Row:
    return _entailment(draw, number % 3) | {"label": (0, 2, 1)[number % 3]}


def _entailment(draw: Draw, relation: int) -> Row:
    """relation   0: the premise says so, 1: it says nothing of it, 2: it says something else"""
    animals, kinds = draw.shuffled(ANIMALS)[:2], [draw.pick(KINDS), draw.pick(KINDS)]
    asked, kind = animals[0], kinds[0]
    order = draw.shuffled([0, 1])
    premise = " ".join(_stated(draw, animals[i], kinds[i]) for i in order)
    value = asked.value(kind)
    if relation == 1:
        kind = draw.pick([one for one in KINDS if one != kind])
        value = draw.pick(values(kind))
    elif relation == 2:
        value = others(draw, kind, asked, 1)[0]
    hypothesis = sentence(statement(kind, asked, value, draw.below(len(STATEMENTS[kind]))))
    return {"premise": premise, "hypothesis": hypothesis, "label": int(relation > 0)}


def _facts(draw: Draw, number: int) -> Row:
    kind = KINDS[number % 3]
    animal = draw.pick(ANIMALS)
    texts, label = _placed(draw, animal.value(kind), others(draw, kind, animal, 3))
    return {"question": QUESTIONS[kind].format(a=animal.one), "choices": texts, "label": label}


def _which(draw: Draw, number: int) -> Row:
    kind = KINDS[number % 3]
    animal = draw.pick(ANIMALS)
    texts, label = _placed(draw, animal.name, [one.name for one in unlike(draw, animal, (kind,), 3)])
    asked = {"food": "eats {v}", "home": "lives in the {v}", "colour": "is {v}"}[kind].format(v=animal.value(kind))
    return {"question": f"Which of these animals {asked}?", "choices": texts, "label": label}


def _endings(draw: Draw, number: int) -> Row:
    animal, hungry = draw.pick(ANIMALS), bool(number % 2)
    kind = "food" if hungry else "home"
    ends = [
        f"looks for {v}." if hungry else f"goes to the {v}."
        for v in (animal.value(kind), *others(draw, kind, animal, 3))
    ]
    texts, label = _placed(draw, ends[0], ends[1:])
    start = f"The {animal.name} is {'hungry' if hungry else 'tired and wants to go home'}. Therefore it"
    return {"start": start, "endings": texts, "label": label}


def _guess(draw: Draw, number: int) -> Row:
    animal = draw.pick(ANIMALS)
    (other,) = unlike(draw, animal, KINDS, 1)
    clue = f"It is {animal.colour}, it lives in the {animal.home} and it eats {animal.food}."
    texts, label = _placed(draw, animal.one, [other.one])
    return {"clue": clue, "first": texts[0], "second": texts[1], "label": label}


MAKERS: Mapping[str, Callable[[Draw, int], Row]] = {
    "diary": _diary,
    "mail": _mail,
    "talk": _talk,
    "topic": _topic,
    **{name: _foreign(name) for name in LANGUAGES},
    "span": _span,
    "span2": _span_or_none,
    "count": _count,
    "yesno": _yes_no,
    **{subject: _opinion(subject) for subject in ("films", "hotels", "meals", "messages")},
    "triples": _triples,
    "cards": _cards,
    "table": _table,
    "concepts": _concepts,
    "pronoun": _pronoun,
    "gap": _gap,
    "dialogue": _dialogue,
    "interview": _interview,
    "rte": _rte,
    "cb": _cb,
    "facts": _facts,
    "which": _which,
    "endings": _endings,
    "guess": _guess,
}
"""Name of a maker -> the function that makes row `number` of a split."""
