"""Messages from the values of a table: lists of mappings with a role and a text, as they are or as JSON.

`role` and `content`, or `from` and `value` as ShareGPT writes them. What cannot be read is an error that names the field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from kd.common.errors import DataError
from kd.data.conversations.conversation import ASSISTANT, ROLES, Message

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


def messages_in(row: Row, field: str, where: str, unread: set[str]) -> tuple[Message, ...]:
    """The messages in a cell."""
    turns = mappings_in(row.get(field), f"{where} field {field}")
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
    calls = tuple(mappings_in(turn.get("tool_calls"), f"{where}.tool_calls"))
    content = _content(turn.get(content_key), f"{where}.{content_key}")
    if name == CALLER:
        calls, content = (*calls, *_calls(content, f"{where}.{content_key}")), ""
    if content is None and not calls:
        raise BadRow("a message has no text", where=f"{where}.{content_key}", found="null", expected="a text")
    return Message(
        ROLE_NAMES[name],
        content or "",
        text_of(turn.get("name"), f"{where}.name"),
        text_of(turn.get("reasoning_content", turn.get("reasoning")), f"{where}.reasoning_content"),
        calls,
        text_of(turn.get("tool_call_id"), f"{where}.tool_call_id"),
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
    value = parsed_value(text, where)
    calls = [value] if isinstance(value, Mapping) else mappings_in(value, where)
    return [{"type": "function", "function": dict(call)} for call in calls]


def _content(value: Any, where: str) -> str | None:
    """The text of a message; a list of parts is joined where all parts are texts."""
    if not isinstance(value, list | tuple):
        return text_of(value, where)
    texts: list[str] = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise BadRow("a part of a message is not text", where=f"{where}[{number}]", found=kind, expected="text")
        texts.append(text)
    return "".join(texts)


def text_of(value: Any, where: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise BadRow("a value is not text", where=where, found=type(value).__name__, expected="a string")
    if value is not None:
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("a text is not valid Unicode", where=where, found=str(error)) from error
    return value


def parsed_value(value: Any, where: str) -> Any:
    """A value; a text is read as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise BadRow("a value is not a list", where=where, found=str(error), expected="a list as JSON") from error


def mappings_in(value: Any, where: str) -> list[Row]:
    """A list of mappings: as it is, or as JSON in a cell, or its entries as JSON. Null is an empty list."""
    value = parsed_value(value, where)
    if value is None:
        return []
    if isinstance(value, list | tuple):
        value = [parsed_value(entry, where) for entry in value]
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
