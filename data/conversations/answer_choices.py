"""Choices beside the messages or the prompt of a row: the answers that may stand at its end, and which of them is right.

    choices   a list of at least two texts, as it is or as JSON
    answer    the number of the right one, counted from 0, or its text; where it is missing, what stands at the end is right

Only an evaluation that ranks choices reads these columns. Of a conversation they are turns of the assistant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kd.data.conversations.conversation import ASSISTANT, Conversation, Message
from kd.data.conversations.message_values import BadRow, parsed_value, text_of

CHOICES, ANSWER = "choices", "answer"
CHOICE_FIELDS = (CHOICES, ANSWER)
"""Fields that may stand beside every layout."""


def choices_in(value: Any, where: str) -> tuple[str, ...]:
    """The texts of a cell. Raises BadRow naming the field."""
    value = parsed_value(value, where)
    texts = [text_of(one, where) for one in value] if isinstance(value, list | tuple) else []
    if len(texts) < 2 or not all(text and text.strip() for text in texts):
        raise BadRow(
            "a row has no choices", where=where, found=repr(value)[:60], expected="a list of two texts or more"
        )
    if len({(text or "").strip() for text in texts}) < len(texts):
        raise BadRow("two choices are the same", where=where, found=repr(value)[:60])
    return tuple(text or "" for text in texts)


def right_choice(choices: Sequence[str], value: Any, end: str | None, where: str) -> int:
    """The number of the right choice, by the column `answer` and by the text `end` of the row, which may not differ.

    Raises BadRow where nothing says which is right, or where that is none of the choices.
    """
    said = [_number(choices, one, f"{where} {name}") for one, name in ((value, f"field {ANSWER}"), (end, "at its end"))]
    known = {number for number in said if number is not None}
    if not known:
        raise BadRow("nothing says which choice is right", where=where, expected=f"a column {ANSWER}, or an answer")
    if len(known) > 1:
        raise BadRow(
            "a row has two right choices",
            where=where,
            found=f"field {ANSWER} says {choices[said[0] or 0]!r}, the row ends with {choices[said[1] or 0]!r}",
        )
    return known.pop()


def _number(choices: Sequence[str], value: Any, where: str) -> int | None:
    """The number of the choice that a value names; None where there is no value."""
    if value is None:
        return None
    stripped = [choice.strip() for choice in choices]
    if isinstance(value, str) and value.strip() in stripped:
        return stripped.index(value.strip())
    number = int(value) if isinstance(value, str) and value.strip().isdigit() else value
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(choices):
        return number
    raise BadRow(
        "the answer is none of the choices",
        where=where,
        found=repr(value)[:60],
        expected=f"0..{len(choices) - 1}, or one of {list(choices)}"[:200],
    )


def answered_rightly(talk: Conversation, choices: Sequence[str], value: Any, where: str) -> tuple[Conversation, int]:
    """The conversation with the right choice as the assistant's last turn, and its number. Raises BadRow."""
    last = talk.messages[-1]
    is_answered = last.role == ASSISTANT
    right = right_choice(choices, value, last.content if is_answered else None, where)
    if is_answered:
        return talk, right
    return replace(talk, messages=(*talk.messages, Message(ASSISTANT, choices[right]))), right
