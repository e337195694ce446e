"""Small conversations, made up by rules: no files, no network, any number of them.

    system      says whether to answer in a word or in a sentence
    user        tells two facts and asks for one of them
    assistant   answers
    user        asks for a fact that nobody has told
    assistant   calls the tool `look_up`
    tool        tells the fact
    assistant   answers
    user        asks whether something is so, about the second fact
    assistant   says yes or no

They use the small world of `mini_world`: no held-out conversation links a person to a thing that any training conversation
links. The conversations are the same in every process and Python version. A longer list begins with the shorter one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kd.common.errors import unknown_name
from kd.data.conversations.conversation import ASSISTANT, Conversation, Message
from kd.data.demo.mini_world import RELATIONS, Draw, Fact

CHAT_COUNTS = {"train": 2000, "heldout": 200}
"""Default number of conversations of a split."""
IN_A_WORD, IN_A_SENTENCE = "Answer in a word.", "Answer in a sentence."
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "parameters": {
            "type": "object",
            "properties": {"person": {"type": "string"}, "thing": {"type": "string"}},
            "required": ["person", "thing"],
        },
    },
}
"""The JSON schema of the tool."""


def mini_conversations(split: str, count: int | None = None, seed: int = 0) -> Iterator[Conversation]:
    """The first `count` conversations of `split` (`train` or `heldout`); None is the number in CHAT_COUNTS.

    Raises DataError for another split.
    """
    if split not in CHAT_COUNTS:
        raise unknown_name("split", split, tuple(CHAT_COUNTS), where="the mini-chat source")
    for number in range(CHAT_COUNTS[split] if count is None else count):
        draw = Draw(f"{seed}/{split}/mini-chat/{number}", split)
        identity = f"mini-chat/{number}" if split == "train" else f"mini-chat/{split}/{number}"
        yield Conversation(identity, tuple(_messages(draw, number)), (TOOL,), "mini-chat", split)


def _messages(draw: Draw, number: int) -> Iterator[Message]:
    """The messages; the system texts take turns, and so do yes and no."""
    in_a_word, so = number % 2 == 0, number // 2 % 2 == 0
    stated, looked_up, doubted = draw.facts(3, RELATIONS)
    yield Message("system", IN_A_WORD if in_a_word else IN_A_SENTENCE)
    yield Message("user", f"{draw.passage([stated, doubted])} {_ask(stated)}")
    yield Message(ASSISTANT, _answer(stated, in_a_word))
    yield Message("user", _ask(looked_up))
    arguments = {"person": looked_up.person, "thing": looked_up.thing}
    call = {"type": "function", "function": {"name": "look_up", "arguments": arguments}}
    yield Message(ASSISTANT, tool_calls=(call,))
    yield Message("tool", looked_up.say(draw.pick(looked_up.relation.wordings)), name="look_up")
    yield Message(ASSISTANT, _answer(looked_up, in_a_word))
    asked = (
        doubted if so else Fact(doubted.relation, doubted.person, doubted.thing, draw.other_value(doubted, [stated]))
    )
    yield Message("user", asked.say(doubted.relation.check))
    yield Message(ASSISTANT, "Yes." if so else "No.")


def _ask(fact: Fact) -> str:
    return fact.say(fact.relation.question)


def _answer(fact: Fact, in_a_word: bool) -> str:
    """The fact's value, or a sentence with it."""
    return f"{fact.value[0].upper()}{fact.value[1:]}." if in_a_word else fact.say(fact.relation.wordings[0])
