"""The small world of `mini-flan`: animals, and for each what it eats, where it lives and which colour it has.

Facts are the same in every task, as those of the real world are. So a task whose answers are not in its prompt (closed-book QA,
commonsense) can be answered by a model that has met the facts in other tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kd.data.demo.mini_world import Draw


@dataclass(frozen=True)
class Animal:
    """An animal and its facts."""

    name: str
    food: str
    home: str
    colour: str

    @property
    def one(self) -> str:
        """The animal with its article: `an owl`."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"

    def value(self, kind: str) -> str:
        """Its food, home or colour."""
        return {"food": self.food, "home": self.home, "colour": self.colour}[kind]


ANIMALS = tuple(
    Animal(*words.split())
    for words in (
        "bat insects cave black",
        "bear fish forest brown",
        "beaver leaves river brown",
        "camel grass desert yellow",
        "cow grass meadow white",
        "crow seeds garden black",
        "deer leaves forest brown",
        "duck worms pond green",
        "eagle fish mountains brown",
        "fox mice forest red",
        "frog insects pond green",
        "goat leaves mountains white",
        "hare grass meadow brown",
        "heron fish river grey",
        "lizard insects desert green",
        "mole worms garden black",
        "mouse seeds barn grey",
        "otter fish river brown",
        "owl mice barn white",
        "robin worms garden red",
        "seal fish sea grey",
        "snail leaves garden yellow",
        "snake mice desert yellow",
        "squirrel nuts forest red",
        "swan grass pond white",
        "wolf deer mountains grey",
    )
)
KINDS = ("food", "home", "colour")
"""What is known of an animal."""
QUESTIONS = {"food": "What does {a} eat?", "home": "Where does {a} live?", "colour": "What colour is {a}?"}
STATEMENTS = {
    "food": ("{a} eats {v}", "{a} feeds on {v}"),
    "home": ("{a} lives in the {v}", "{a} is at home in the {v}"),
    "colour": ("{a} is {v}", "{a} is {v} all over"),
}
"""Kind -> ways to state the fact, without capital and full stop."""


def values(kind: str) -> tuple[str, ...]:
    """Every value of a kind once, in the order of the animals."""
    return tuple(dict.fromkeys(animal.value(kind) for animal in ANIMALS))


def sentence(text: str) -> str:
    """With a capital and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


def statement(kind: str, animal: Animal, value: str | None = None, wording: int = 0) -> str:
    """A fact in one of its wordings, without capital and full stop; `value` is another value than the true one."""
    return STATEMENTS[kind][wording].format(a=animal.one, v=value or animal.value(kind))


def others(draw: Draw, kind: str, animal: Animal, count: int) -> list[str]:
    """Values of the kind that are not the animal's."""
    return draw.shuffled([value for value in values(kind) if value != animal.value(kind)])[:count]


def unlike(draw: Draw, animal: Animal, kinds: Sequence[str], count: int) -> list[Animal]:
    """Animals that differ from this one in all of these kinds."""
    different = [one for one in ANIMALS if all(one.value(kind) != animal.value(kind) for kind in kinds)]
    return draw.shuffled(different)[:count]
