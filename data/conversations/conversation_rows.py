"""Rows of a table become conversations, in the layouts that data sets use.

    messages            [{"role": "user", "content": …}, …]
    conversations       [{"from": "human", "value": …}, …], as ShareGPT writes them
    prompt, completion  two lists of messages, as TRL writes them
    instruction         `instruction`, `input` and `output`, as Alpaca writes them; `history` holds earlier pairs of texts

`tools` and `system` may stand beside them. A message may say whether it is learned: `weight` (0 or 1, as Mistral and OpenAI
write it), `train` or `training` (axolotl), `loss` (ms-swift). A row that cannot be read is an error that names the row and
the field. Columns and keys that no reader knows are named, so that they can be counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from kd.data.conversations.conversation import ASSISTANT, Conversation, Message
from kd.data.conversations.message_values import BadRow, Row, mappings_in, messages_in, parsed_value, text_of


@dataclass(frozen=True)
class ChatLayout:
    """Fields of one layout, and its reader."""

    needed: tuple[str, ...]
    """Fields that every row has."""
    beside: tuple[str, ...]
    """Fields that a row may have."""
    read: Callable[[Row, str, set[str]], tuple[Message, ...]]
    """(row by field, where it is, receives the names of keys that are not read) -> the messages."""


def conversation_of(
    row: Row, layout: str, *, where: str, name: str, task: str, split: str, unread: set[str], prompts: bool = False
) -> Conversation:
    """A row as a conversation. Raises BadRow naming row and field.

    row      field of the layout -> value
    layout   one of LAYOUTS
    where    the row, for errors
    name     the conversation's id
    unread   receives the names of keys in messages that are not read
    prompts  whether the conversation needs no turn of the assistant
    """
    messages = LAYOUTS[layout].read(row, where, unread)
    messages = _with_system_text(messages, text_of(row.get("system"), f"{where} field system"), where)
    tools = tuple(mappings_in(row.get("tools"), f"{where} field tools"))
    answers = [message for message in messages if message.role == ASSISTANT]
    if prompts:
        return Conversation(name, messages, tools, task, split)
    if not answers:
        roles = ", ".join(message.role for message in messages)
        raise BadRow("a conversation has no turn of the assistant", where=where, found=roles)
    if not any(message.scored for message in answers):
        raise BadRow(
            "no turn of the assistant is to be learned",
            where=where,
            found="weight 0 in each of them, or all are in the prompt",
        )
    return Conversation(name, messages, tools, task, split)


def read_prompt(row: Row, where: str) -> Conversation:
    """The messages (and `tools`) of one row, which an assistant is to answer. Raises BadRow naming the field."""
    messages = _read_messages(row, where, set())
    if messages[-1].role == ASSISTANT:
        raise BadRow(
            "the messages end with the assistant's turn, so there is nothing to answer",
            where=f"{where} field messages",
            found=", ".join(message.role for message in messages),
            expected="a turn of the user or of a tool at the end",
        )
    return Conversation(where, messages, tuple(mappings_in(row.get("tools"), f"{where} field tools")))


def holds_messages(value: Any) -> bool:
    """Whether a cell holds a list, as it is or as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return isinstance(json.loads(value), list)
        except (json.JSONDecodeError, RecursionError):
            return False
    return isinstance(value, list | tuple)


def _read_messages(row: Row, where: str, unread: set[str]) -> tuple[Message, ...]:
    return messages_in(row, "messages", where, unread)


def _read_sharegpt(row: Row, where: str, unread: set[str]) -> tuple[Message, ...]:
    return messages_in(row, "conversations", where, unread)


def _read_prompt_completion(row: Row, where: str, unread: set[str]) -> tuple[Message, ...]:
    """The prompt's turns of the assistant are read and not learned, as in TRL."""
    asked = tuple(replace(turn, scored=turn.role != ASSISTANT) for turn in messages_in(row, "prompt", where, unread))
    return asked + messages_in(row, "completion", where, unread)


def _read_instruction(row: Row, where: str, unread: set[str]) -> tuple[Message, ...]:
    """Alpaca's columns: the input follows the instruction after an empty line."""
    texts = {name: text_of(row.get(name), f"{where} field {name}") for name in ("instruction", "input", "output")}
    for name in ("instruction", "output"):
        if not texts[name]:
            problem = "null" if texts[name] is None else "an empty text"
            raise BadRow("a text is missing", where=f"{where} field {name}", found=problem, expected="a text")
    asked = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    earlier = _history(row.get("history"), f"{where} field history")
    return (*earlier, Message("user", asked), Message(ASSISTANT, texts["output"] or ""))


LAYOUTS = {
    "messages": ChatLayout(("messages",), ("tools", "system"), _read_messages),
    "conversations": ChatLayout(("conversations",), ("tools", "system"), _read_sharegpt),
    "prompt-completion": ChatLayout(("prompt", "completion"), ("tools", "system"), _read_prompt_completion),
    "instruction": ChatLayout(("instruction", "output"), ("input", "system", "history"), _read_instruction),
}
"""Name -> layout, in the order in which they are tried."""


def _with_system_text(messages: tuple[Message, ...], system: str | None, where: str) -> tuple[Message, ...]:
    """The messages after the system text that stands beside them. Raises BadRow where they have another one."""
    if not system:
        return messages
    if messages[0].role not in ("system", "developer"):
        return (Message("system", system), *messages)
    if messages[0].content != system:
        raise BadRow(
            "a conversation has two system texts",
            where=f"{where} field system",
            found=repr(system[:60]),
            expected=repr(messages[0].content[:60]),
        )
    return messages


def _history(value: Any, where: str) -> tuple[Message, ...]:
    """Earlier pairs of a question and its answer."""
    value = parsed_value(value, where)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in value):
        raise BadRow("a value is not a list of pairs", where=where, found=type(value).__name__)
    said = [(text_of(asked, where), text_of(answer, where)) for asked, answer in value]
    return tuple(
        Message(role, text or "") for pair in said for role, text in zip(("user", ASSISTANT), pair, strict=True)
    )
