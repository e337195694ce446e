"""A small mixture of instruction tasks, made up by rules: no files, no network, any number of examples.

    nli          premise, hypothesis            -> yes / maybe / no
    boolq        passage, question              -> yes / no
    choice       passage, question, options     -> one of three or four options
    extract      passage, question              -> a word of the passage
    summary      report                         -> one sentence, or a form of two lines
    concepts     a few words                    -> a sentence that uses them
    paraphrase   two sentences                  -> same meaning, yes or no

All families use one small world (`mini_world`), in which no held-out prompt links a person to a thing that any training
prompt links.

Texts are short (about 20-60 tokens) and mostly ASCII. Line breaks, double spaces and characters that NFKC rewrites occur in
prompts and targets, because sentencepiece teachers lose them.

The examples are the same in every process and Python version: each has a random generator seeded by its id. A longer list
therefore begins with the shorter one. Labels and the position of the right option are balanced exactly over blocks.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kd.common.errors import unknown_name
from kd.data.demo.mini_world import PEOPLE, PLACES, RELATIONS, THINGS, Draw, Fact
from kd.data.rows.example import Example

DEFAULT_COUNTS = {"train": 6000, "heldout": 700}
"""Default number of examples of a split."""

FILLERS = (
    "It was raining.",
    "The weather was fine.",
    "Nobody was surprised.",
    "There was music all day.",
    "Tea was served at noon.",
    "The bus came late.",
    "A dog slept by the door.",
    "Everyone went home early.",
    "The news came from a neighbour.",
    "It was a quiet week.",
)
ACTIONS = {
    "carry": "{p} carried the {t} to the {v}.",
    "drop": "{p} dropped the {t} near the {v}.",
    "find": "{p} found the {t} in the {v}.",
    "hide": "{p} hid the {t} in the {v}.",
    "paint": "{p} painted the {t} in the {v}.",
    "take": "{p} took the {t} from the {v}.",
}
"""Verb of the `concepts` family -> the sentence that uses it."""

YES_NO = (("yes", "no"), ("true", "false"))
YES_MAYBE_NO = (("yes", "maybe", "no"), ("true", "not known", "false"))


@dataclass(frozen=True)
class Draft:
    """An example without id, task and split, which `examples` adds."""

    prompt: str
    target: str
    choices: tuple[str, ...] = ()
    references: tuple[str, ...] = ()


def _placed(right: str, wrong: Sequence[str], position: int) -> tuple[str, ...]:
    options = list(wrong)
    options.insert(position, right)
    return tuple(options)


def _listed(draw: Draw, options: Sequence[str]) -> str:
    form = draw.below(3)
    if form == 0:
        return "OPTIONS:\n" + "\n".join(f"- {o}" for o in options)
    if form == 1:
        return "OPTIONS: " + " / ".join(options)
    return "Choose from:  " + ", ".join(options) + "."


def _judged(draw: Draw, prompt: str, labels: Sequence[str], label: int, position: int) -> Draft:
    """A question whose answer is `labels[label]`, which is option number `position`."""
    wrong = draw.shuffled([text for i, text in enumerate(labels) if i != label])
    choices = _placed(labels[label], wrong, position)
    return Draft(f"{prompt}\n{_listed(draw, choices)}", labels[label], choices)


def _nli(draw: Draw, label: int, position: int) -> Draft:
    facts = draw.facts(2, [draw.pick(RELATIONS)])
    fact = draw.pick(facts)
    thing, value = fact.thing, fact.value
    if label == 1:  # the premise does not mention the thing
        thing, value = draw.thing_of(fact.person, [f.thing for f in facts]), draw.pick([f.value for f in facts])
    elif label == 2:
        value = draw.other_value(fact, facts)
    hypothesis = Fact(fact.relation, fact.person, thing, value).say(draw.pick(fact.relation.wordings))
    template = draw.pick(
        (
            "Premise: {a}\nHypothesis: {b}\nDoes the hypothesis follow?",
            "{a}\nIf that is so, is this right?  {b}",
            "Read: {a} Claim: {b} Does the text support the claim?",
        )
    )
    prompt = template.format(a=draw.passage(facts), b=hypothesis)
    return _judged(draw, prompt, draw.pick(YES_MAYBE_NO), label, position)


def _boolq(draw: Draw, label: int, position: int) -> Draft:
    facts = draw.facts(2 + draw.below(2), RELATIONS)
    fact = draw.pick(facts)
    value = fact.value if label == 0 else draw.other_value(fact, facts)
    question = Fact(fact.relation, fact.person, fact.thing, value).say(fact.relation.check)
    template = draw.pick(
        (
            "Passage: {a}\nQuestion: {q}",
            "{a}\n\n{q}",
            "Answer from the text … {a} {q}",
        )
    )
    return _judged(draw, template.format(a=draw.passage(facts), q=question), draw.pick(YES_NO), label, position)


def _choice(draw: Draw, label: int, position: int) -> Draft:
    facts = draw.facts(2, [draw.pick(RELATIONS)])
    fact = draw.pick(facts)
    near = [f.value for f in facts if f is not fact]
    far = draw.shuffled([v for v in fact.relation.values if v != fact.value and v not in near])
    wrong = draw.shuffled([*near, *far[: 2 if label else 1]])
    choices = _placed(fact.value, wrong, position)
    template = draw.pick(
        (
            "{a}\n{q}\n{o}",
            "Pick the right option. {q} {a}\n{o}",
            "Question: {q}\nText: {a}\n{o}",
        )
    )
    prompt = template.format(a=draw.passage(facts), q=fact.say(fact.relation.question), o=_listed(draw, choices))
    return Draft(prompt, fact.value, choices)


def _extract(draw: Draw, label: int, position: int) -> Draft:
    facts = draw.facts(2 + draw.below(2), RELATIONS)
    fact = facts[position % len(facts)]
    template = draw.pick(
        (
            "Passage: {a}\nQuestion: {q}\nAnswer with words of the passage.",
            "{a}  {q}",
            "Find the answer in the text. {q}\n{a}",
        )
    )
    prompt = template.format(a=draw.passage(facts), q=fact.say(fact.relation.question))
    references = (fact.value, f"the {fact.value}", f"in the {fact.value}") if fact.relation.values is PLACES else ()
    return Draft(prompt, fact.value, references=references)


def _summary(draw: Draw, label: int, position: int) -> Draft:
    (fact,) = draw.facts(1, RELATIONS)
    sentences = draw.shuffled(FILLERS)[:2]
    sentences.insert(position, fact.say(draw.pick(fact.relation.wordings)))
    report = " ".join(sentences)
    if label:
        prompt = draw.pick(("Report: {r}\nFill in the form: name, thing.", "{r}\n\nWhose is it, and what is it?"))
        return Draft(prompt.format(r=report), f"Name: {fact.person}\nThing: {fact.thing}")
    prompt = draw.pick(("Report: {r}\nSum it up in one sentence.", "Say what matters in short:  {r}"))
    references = tuple(fact.say(wording) for wording in fact.relation.wordings)
    return Draft(prompt.format(r=report), references[0], references=references)


def _concepts(draw: Draw, label: int, position: int) -> Draft:
    person, value = draw.pick(PEOPLE), draw.pick(PLACES)
    thing = draw.thing_of(person)
    if label:
        words = draw.shuffled((person, thing, value))
        prompt = draw.pick(("Write two sentences with: {w}.", "Two sentences, please. Words: {w}"))
        target = f"{person} has a {thing}.  It is in the {value}."
        return Draft(prompt.format(w=", ".join(words)), target)
    verb = draw.pick(tuple(ACTIONS))
    words = draw.shuffled((person, thing, value, verb))
    prompt = draw.pick(("Write a sentence with: {w}.", "Concepts:  {w}\nSentence:", "Use all the words: {w}."))
    target = ACTIONS[verb].format(p=person, t=thing, v=value)
    return Draft(prompt.format(w=", ".join(words)), target, references=(target, target.replace(" the ", " a ", 1)))


GIVING = ("{p} gave {q} the {t}.", "{q} got the {t} from {p}.", "The {t} went from {p} to {q}.")


def _paraphrase(draw: Draw, label: int, position: int) -> Draft:
    form = draw.below(4)
    if form == 0:  # who gave and who got
        thing = draw.pick(THINGS)
        giver = draw.person_with(thing)
        getter = draw.person_with(thing, [giver])
        first, second = draw.shuffled(GIVING)[:2]
        a = first.format(p=giver, q=getter, t=thing)
        b = second.format(p=giver, q=getter, t=thing) if label == 0 else second.format(p=getter, q=giver, t=thing)
    else:
        (fact,) = draw.facts(1, RELATIONS)
        first, second = draw.shuffled(fact.relation.wordings)[:2]
        person, thing, value = fact.person, fact.thing, fact.value
        if label == 1 and form == 1:
            person = draw.person_with(thing, [person])
        elif label == 1 and form == 2:
            thing = draw.thing_of(person, [thing])
        elif label == 1:
            value = draw.other_value(fact, [])
        a, b = fact.say(first), Fact(fact.relation, person, thing, value).say(second)
    template = draw.pick(
        (
            "Sentence 1: {a}\nSentence 2: {b}\nDo they mean the same?",
            "{a}\n{b}\nSame meaning?",
            "Is this a paraphrase?  {a}  {b}",
        )
    )
    return _judged(draw, template.format(a=a, b=b), draw.pick(YES_NO), label, position)


@dataclass(frozen=True)
class Family:
    """One kind of task."""

    make: Callable[[Draw, int, int], Draft]
    """`make(draw, label, position)`: position is that of the right option or sentence."""
    cells: tuple[tuple[int, int], ...]
    """The pairs (label, position), which are equally frequent."""


def _grid(labels: int, positions: int) -> tuple[tuple[int, int], ...]:
    return tuple((label, position) for label in range(labels) for position in range(positions))


def examples(split: str, count: int | None = None, seed: int = 0) -> Iterator[Example]:
    """The first `count` examples of `split` (`train` or `heldout`); the families take turns.

    `count=None` is the number in DEFAULT_COUNTS. Raises DataError for another split.
    """
    if split not in DEFAULT_COUNTS:
        raise unknown_name("split", split, tuple(DEFAULT_COUNTS), where="the mini source")
    names = tuple(FAMILIES)
    for i in range(DEFAULT_COUNTS[split] if count is None else count):
        name, number = names[i % len(names)], i // len(names)
        draft = _draft(name, number, split, seed)
        answer = draft.choices.index(draft.target) if draft.choices else None
        identity = f"mini/{name}/{number}" if split == "train" else f"mini/{name}/{split}/{number}"
        yield Example(identity, draft.target, draft.prompt, name, split, draft.choices, answer, draft.references)


def is_right(example: Example, answer: str) -> bool:
    """Whether a generated answer is the target or one of the references, ignoring white space and NFKC.

    A lossy tokenizer can therefore be right. For examples with choices, the answer is the choice that a model finds most
    likely per token.
    """
    return _plain(answer) in [_plain(text) for text in (example.target, *example.references)]


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _draft(name: str, number: int, split: str, seed: int) -> Draft:
    family = FAMILIES[name]
    block, within = divmod(number, len(family.cells))
    order = Draw(f"{seed}/{split}/{name}/block {block}", split).shuffled(family.cells)
    return family.make(Draw(f"{seed}/{split}/{name}/{number}", split), *order[within])


FAMILIES: dict[str, Family] = {
    "nli": Family(_nli, _grid(3, 3)),
    "boolq": Family(_boolq, _grid(2, 2)),
    "choice": Family(_choice, (*_grid(1, 3), *((1, position) for position in range(4)))),  # three options, or four
    "extract": Family(_extract, _grid(1, 6)),
    "summary": Family(_summary, _grid(2, 3)),
    "concepts": Family(_concepts, _grid(2, 1)),
    "paraphrase": Family(_paraphrase, _grid(2, 2)),
}
