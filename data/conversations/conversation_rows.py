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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kd.common.errors import DataError
from kd.data.conversations.conversation import ASSISTANT, ROLES, Conversation, Message

Row = Mapping[str, Any]

CALLER = "function_call"
"""A role of ShareGPT: an assistant's turn whose text is the calls of tools as JSON."""
ROLE_NAMES = {
    "human": "user",
    "gpt": ASSISTANT,
    "chatgpt": ASSISTANT,
    "model": ASSISTANT,
    "bot": ASSISTANT,
    CALLER: ASSISTANT,
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    **{role: role for role in ROLES},
}
"""Name of a role in a data set -> the role."""
MARKS = ("weight", "train", "training", "loss")
"""Keys of a message that say whether it is learned."""
MESSAGE_KEYS = {
    *("role", "from", "content", "value", "name", "reasoning_content", "reasoning", "tool_calls", "tool_call_id"),
    *MARKS,
}
"""Keys of a message that are read."""


class BadRow(DataError):
    """A row that is not a conversation."""


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
    row: Row, layout: str, *, where: str, name: str, task: str, split: str, unread: set[str]
) -> Conversation:
    """A row as a conversation. Raises BadRow naming row and field.

    row      field of the layout -> value
    layout   one of LAYOUTS
    where    the row, for errors
    name     the conversation's id
    unread   receives the names of keys in messages that are not read
    """
    messages = LAYOUTS[layout].read(row, where, unread)
    messages = _with_system_text(messages, _text(row.get("system"), f"{where} field system"), where)
    tools = tuple(_mappings(row.get("tools"), f"{where} field tools"))
    answers = [message for message in messages if message.role == ASSISTANT]
    if not answers:
        found = ", ".join(message.role for message in messages)
        raise BadRow("a conversation has no turn of the assistant", where=where, found=found)
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
    return Conversation(where, messages, tuple(_mappings(row.get("tools"), f"{where} field tools")))


def holds_messages(value: Any) -> bool:
    """Whether a cell holds a list, as it is or as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return isinstance(json.loads(value), list)
        except (json.JSONDecodeError, RecursionError):
            return False
    return isinstance(value, list | tuple)


def _read_messages(row: Row, where: str, unread: set[str]) -> tuple[Message, ...]:
    return _messages(row, "messages", where, unread)


def _read_sharegpt(row: Row, where: str, unread: set[str]) -> tuple[Message, ...]:
    return _messages(row, "conversations", where, unread)


def _read_prompt_completion(row: Row, where: str, unread: set[str]) -> tuple[Message, ...]:
    """The prompt's turns of the assistant are read and not learned, as in TRL."""
    asked = tuple(replace(turn, scored=turn.role != ASSISTANT) for turn in _messages(row, "prompt", where, unread))
    return asked + _messages(row, "completion", where, unread)


def _read_instruction(row: Row, where: str, unread: set[str]) -> tuple[Message, ...]:
    """Alpaca's columns: the input follows the instruction after an empty line."""
    texts = {name: _text(row.get(name), f"{where} field {name}") for name in ("instruction", "input", "output")}
    for name in ("instruction", "output"):
        if not texts[name]:
            found = "null" if texts[name] is None else "an empty text"
            raise BadRow("a text is missing", where=f"{where} field {name}", found=found, expected="a text")
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
    value = _parsed(value, where)
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in value):
        raise BadRow("a value is not a list of pairs", where=where, found=type(value).__name__)
    said = [(_text(asked, where), _text(answer, where)) for asked, answer in value]
    return tuple(
        Message(role, text or "") for pair in said for role, text in zip(("user", ASSISTANT), pair, strict=True)
    )


def _messages(row: Row, field: str, where: str, unread: set[str]) -> tuple[Message, ...]:
    """The messages in a cell."""
    turns = _mappings(row.get(field), f"{where} field {field}")
    if not turns:
        raise BadRow("a conversation is empty", where=f"{where} field {field}", expected="a list of messages")
    for turn in turns:
        unread.update(f"{field}.{key}" for key in turn.keys() - MESSAGE_KEYS)
    messages = tuple(_message(turn, f"{where} field {field}[{number}]") for number, turn in enumerate(turns))
    for turn, message in zip(turns, messages, strict=True):
        if message.role != ASSISTANT:
            unread.update(f"{field}.{key} of {message.role}" for key in MARKS if turn.get(key))
    return messages


def _message(turn: Row, where: str) -> Message:
    role_key = "role" if "role" in turn else "from"
    content_key = "value" if "value" in turn and "content" not in turn else "content"
    name = turn.get(role_key)
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise BadRow("unknown role", where=f"{where}.{role_key}", found=repr(name), expected=", ".join(ROLE_NAMES))
    calls = tuple(_mappings(turn.get("tool_calls"), f"{where}.tool_calls"))
    content = _content(turn.get(content_key), f"{where}.{content_key}")
    if name == CALLER:
        calls, content = (*calls, *_calls(content, f"{where}.{content_key}")), ""
    if content is None and not calls:
        raise BadRow("a message has no text", where=f"{where}.{content_key}", found="null", expected="a text")
    return Message(
        ROLE_NAMES[name],
        content or "",
        _text(turn.get("name"), f"{where}.name"),
        _text(turn.get("reasoning_content", turn.get("reasoning")), f"{where}.reasoning_content"),
        calls,
        _text(turn.get("tool_call_id"), f"{where}.tool_call_id"),
        scored=ROLE_NAMES[name] != ASSISTANT or _is_scored(turn, where),
    )


def _is_scored(turn: Row, where: str) -> bool:
    """Whether a message is learned; it is where it does not say. Raises BadRow for a weight that is neither 0 nor 1."""
    marks = {key: turn[key] for key in MARKS if key in turn}
    for key, value in marks.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise BadRow(
                "a weight of a message is neither 0 nor 1", where=f"{where}.{key}", found=repr(value), expected="0 or 1"
            )
    if len({bool(value) for value in marks.values()}) > 1:
        raise BadRow("a message is to be learned and is not", where=where, found=str(marks))
    return all(marks.values())


def _calls(text: str | None, where: str) -> list[Mapping[str, Any]]:
    """The calls of tools that ShareGPT writes as JSON into the text of a turn."""
    value = _parsed(text, where)
    calls = [value] if isinstance(value, Mapping) else _mappings(value, where)
    return [{"type": "function", "function": dict(call)} for call in calls]


def _content(value: Any, where: str) -> str | None:
    """The text of a message; a list of parts is joined where all parts are texts."""
    if not isinstance(value, list | tuple):
        return _text(value, where)
    texts: list[str] = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise BadRow("a part of a message is not text", where=f"{where}[{number}]", found=kind, expected="text")
        texts.append(text)
    return "".join(texts)


def _text(value: Any, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise BadRow("a value is not text", where=where, found=type(value).__name__, expected="a string")
    if value is not None:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("a text is not valid Unicode", where=where, found=str(error)) from error
    return value


def _parsed(value: Any, where: str) -> Any:
    """A value; a text is read as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadRow("a value is not a list", where=where, found=str(error), expected="a list as JSON") from error


def _mappings(value: Any, where: str) -> list[Row]:
    """A list of mappings: as it is, or as JSON in a cell, or its entries as JSON. Null is an empty list."""
    value = _parsed(value, where)
    if value is None:
        return []
    if isinstance(value, list | tuple):
        value = [_parsed(entry, where) for entry in value]
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise BadRow("a value is not a list of objects", where=where, found=type(value).__name__)
    entries = [_without_nulls(entry) for entry in value]
    try:
        json.dumps(entries, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:  # lone surrogates are a ValueError
        raise BadRow("a value cannot be written as JSON", where=where, found=str(error)) from error
    return entries


def _without_nulls(value: Any) -> Any:
    """A value without the keys whose values are null: Parquet has every key in every row."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list | tuple) else value
