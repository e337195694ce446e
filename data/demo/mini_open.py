"""Questions with several right answers, made up by rules: no files, no network, any number of them.

    Name an animal that eats fish.      -> a bear, an eagle, a heron, an otter or a seal

They ask for one of the animals of `kd.data.demo.animals` that eats, lives in, or has the colour of something. The target is one of
the right answers, drawn with `chances`: the answer that comes first in the alphabet comes most often. So nothing in a question
tells which of its right answers comes, and a model that knows all of them must be unsure. `references` are all right answers.

A question belongs to one split by a digest of its text: every fifth is held out. The held-out questions ask for the same facts in
other words. A training question comes several times, each time with an answer of its own. The questions are the same in every
process and Python version, and a longer list begins with the shorter one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import accumulate

from kd.common.errors import unknown_name
from kd.data.demo.animals import ANIMALS, KINDS, values
from kd.data.demo.mini_mixture import FILLERS
from kd.data.demo.mini_world import Draw
from kd.data.rows.example import Example

OPEN_COUNTS = {"train": 6000, "heldout": 500}
"""Default number of examples of a split."""
PROPERTIES = {
    "food": ("eats {v}", "feeds on {v}"),
    "home": ("lives in the {v}", "is at home in the {v}"),
    "colour": ("is {v}", "is {v} all over"),
}
"""Kind of fact -> ways to say what the animal must be like."""
WORDINGS = (
    "Name an animal that {p}.",
    "Which animal {p}?",
    "It {p}. What could it be?",
    "Think of an animal that {p}.",
    "Give an example: an animal that {p}.",
)
SURROUNDINGS = ("{f} {q}", "{q} {f}", "{q}")
"""Where a sentence stands that says nothing of the animal."""


def open_examples(split: str, count: int | None = None) -> Iterator[Example]:
    """The first `count` examples of `split` (`train` or `heldout`); None is the number in OPEN_COUNTS.

    Raises DataError for another split.
    """
    if split not in OPEN_COUNTS:
        raise unknown_name("split", split, tuple(OPEN_COUNTS), where="the mini-open source")
    wanted, number, made = OPEN_COUNTS[split] if count is None else count, 0, 0
    while made < wanted:
        draw = Draw(f"mini-open/{split}/{number}", split)
        kind = KINDS[number % len(KINDS)]
        value = draw.pick(values(kind))
        prompt = _question(draw, kind, value)
        number += 1
        if split_of_question(prompt) == split:
            answers = right_answers(kind, value)
            target = drawn(draw, answers)
            yield Example(
                f"mini-open/{split}/{made}", target, prompt, f"open_{kind}", split, references=(target, *answers)
            )
            made += 1


def right_answers(kind: str, value: str) -> tuple[str, ...]:
    """All animals with this food, home or colour and their articles, in the order of the alphabet."""
    return tuple(animal.one for animal in sorted(ANIMALS, key=lambda one: one.name) if animal.value(kind) == value)


def chances(answers: Sequence[str]) -> list[float]:
    """How probable each right answer is: in proportion to 1, 1/2, 1/3 and so on."""
    weights = [1 / (rank + 1) for rank in range(len(answers))]
    return [weight / sum(weights) for weight in weights]


def drawn(draw: Draw, answers: Sequence[str]) -> str:
    """One of the right answers, with `chances`."""
    point = draw.below(1_000_000) / 1_000_000
    ends = list(accumulate(chances(answers)))
    return next((answer for answer, end in zip(answers, ends, strict=True) if point < end), answers[-1])


def split_of_question(prompt: str) -> str:
    """The split of a question, by its text alone."""
    digest = hashlib.blake2b(prompt.encode("ascii"), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % 5 == 0 else "train"


def _question(draw: Draw, kind: str, value: str) -> str:
    asked = draw.pick(WORDINGS).format(p=draw.pick(PROPERTIES[kind]).format(v=value))
    return draw.pick(SURROUNDINGS).format(f=draw.pick(FILLERS), q=asked)
