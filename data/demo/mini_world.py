"""The small world of the made-up tasks (see `mini_mixture`): people own things; a thing has a place, a colour and a day on
which it was bought.

The facts are drawn anew for every example, so that only the passage tells the answer. A *pair* (person, thing) belongs to
one split (`split_of_pair`): no held-out prompt links a person to a thing that any training prompt links. Only
`random.Random.random` is used, the one method whose sequence Python promises to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

T = TypeVar("T")

PEOPLE = (
    "Anna",
    "Boris",
    "Clara",
    "David",
    "Emil",
    "Fatima",
    "Greta",
    "Hugo",
    "Ines",
    "José",
    "Karl",
    "Lena",
    "Mara",
    "Nora",
    "Omar",
    "Paul",
    "Rosa",
    "Sam",
    "Tom",
    "Zoë",
)
THINGS = (
    "ball",
    "basket",
    "bell",
    "book",
    "box",
    "coat",
    "coin",
    "cup",
    "doll",
    "drum",
    "flute",
    "hammer",
    "hat",
    "kite",
    "knife",
    "lamp",
    "letter",
    "map",
    "mirror",
    "pen",
    "piñata",
    "rope",
    "shell",
    "spoon",
    "ticket",
)
PLACES = (
    "attic",
    "barn",
    "boat",
    "café",
    "cellar",
    "church",
    "garden",
    "kitchen",
    "library",
    "market",
    "museum",
    "school",
    "shop",
    "stable",
    "tent",
)
COLOURS = ("black", "blue", "brown", "green", "grey", "pink", "red", "silver", "white", "yellow")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
HELD_OUT_STEP = 5
"""One pair (person, thing) in five is held out; for every person, a fifth of the things."""


def split_of_pair(person: str, thing: str) -> str:
    """The split that may link this person and this thing: `heldout` for one pair in five, else `train`."""
    return "train" if (PEOPLE.index(person) + THINGS.index(thing)) % HELD_OUT_STEP else "heldout"


@dataclass(frozen=True)
class Relation:
    """A relation between a person's thing and a value. In its texts `{p}` is the person, `{t}` the thing, `{v}` the value."""

    values: tuple[str, ...]
    wordings: tuple[str, ...]
    """Statements with the same meaning. Targets use the first."""
    question: str
    """A question that asks for the value."""
    check: str
    """A question whether the value is this one."""


RELATIONS = (
    Relation(
        PLACES,
        ("{p}'s {t} is in the {v}.", "{p} keeps a {t} in the {v}.", "In the {v} lies {p}'s {t}."),
        "Where is {p}'s {t}?",
        "Is {p}'s {t} in the {v}?",
    ),
    Relation(
        COLOURS,
        ("{p} has a {v} {t}.", "{p}'s {t} is {v}.", "The {t} of {p} looks {v}."),
        "What colour is {p}'s {t}?",
        "Is {p}'s {t} {v}?",
    ),
    Relation(
        DAYS,
        ("{p} bought a {t} on {v}.", "On {v} {p} bought a {t}.", "{p}'s {t} was bought on {v}."),
        "When did {p} buy the {t}?",
        "Did {p} buy the {t} on {v}?",
    ),
)


@dataclass(frozen=True)
class Fact:
    """One statement of a passage."""

    relation: Relation
    person: str
    thing: str
    value: str

    def say(self, wording: str) -> str:
        """`wording` filled with this fact."""
        return wording.format(p=self.person, t=self.thing, v=self.value)


class Draw:
    """Random choices within one split, from one generator and its method `random` only."""

    def __init__(self, seed: str, split: str) -> None:
        self._random = Random(seed)
        self._split = split

    def below(self, n: int) -> int:
        """A whole number from 0 to n - 1."""
        return int(self._random.random() * n)

    def pick(self, items: Sequence[T]) -> T:
        """One of `items`."""
        return items[self.below(len(items))]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """`items` in random order (Fisher and Yates)."""
        result = list(items)
        for i in range(len(result) - 1, 0, -1):
            j = self.below(i + 1)
            result[i], result[j] = result[j], result[i]
        return result

    def thing_of(self, person: str, without: Sequence[str] = ()) -> str:
        """A thing that this split may link to `person`."""
        return self.pick([t for t in THINGS if split_of_pair(person, t) == self._split and t not in without])

    def person_with(self, thing: str, without: Sequence[str] = ()) -> str:
        """A person that this split may link to `thing`."""
        return self.pick([p for p in PEOPLE if split_of_pair(p, thing) == self._split and p not in without])

    def facts(self, count: int, relations: Sequence[Relation]) -> list[Fact]:
        """Facts about different people and different things with different values."""
        result: list[Fact] = []
        for person in self.shuffled(PEOPLE)[:count]:
            relation = self.pick(relations)
            thing = self.thing_of(person, [f.thing for f in result])
            value = self.pick([v for v in relation.values if v not in [f.value for f in result]])
            result.append(Fact(relation, person, thing, value))
        return result

    def passage(self, facts: Sequence[Fact]) -> str:
        """The facts in random wordings; sometimes with two spaces or a line break between sentences."""
        gap = self.pick((" ", " ", " ", "  ", "\n"))
        return gap.join(f.say(self.pick(f.relation.wordings)) for f in facts)

    def other_value(self, fact: Fact, facts: Sequence[Fact]) -> str:
        """A value other than the fact's: often that of another fact, so that finding the word in the passage is not enough."""
        near = [f.value for f in facts if f is not fact and f.relation is fact.relation]
        if near and self.below(2):
            return self.pick(near)
        return self.pick([v for v in fact.relation.values if v != fact.value])
