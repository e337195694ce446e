"""Rows of a table become conversations, in the four layouts that data sets use.

    messages            [{"role": "user", "content": …}, …]; `tools` may stand beside it
    conversations       [{"from": "human", "value": …}, …], as ShareGPT writes them
    prompt, completion  two lists of messages, as TRL writes them
    instruction         `instruction`, `input` and `output`, as Alpaca writes them; `system` may stand beside them

The layout is recognised by the columns. A row that cannot be read is an error that names the row and the field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from kd.common.errors import DataError
from kd.data.conversations.conversation import ASSISTANT, ROLES, Conversation, Message

Row = Mapping[str, Any]

ROLE_NAMES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    **{role: role for role in ROLES},
}
"""Name of a role in a data set -> the role."""

COLUMNS_OF_LAYOUT = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt-completion": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
}
"""Layout -> the columns by which it is recognised."""


class BadRow(DataError):
    """A row that is not a conversation."""


def chat_layout(names: Sequence[str], first: Row | None = None) -> str | None:
    """The layout that a table has, by its columns; None where it has none.

    first   first row; `prompt` and `completion` count only where they hold messages there
    """
    for layout, columns in COLUMNS_OF_LAYOUT.items():
        if all(column in names for column in columns):
            if layout == "prompt-completion" and not (first and _is_list(first.get("prompt"))):
                continue
            return layout
    return None


def rows_to_conversations(
    rows: Iterable[Row],
    layout: str,
    *,
    place: Callable[[int], str],
    prefix: str,
    split: str,
    refused: list[BadRow] | None = None,
) -> Iterator[Conversation]:
    """The rows as conversations, in their order. Raises BadRow naming row and field.

    layout    one of COLUMNS_OF_LAYOUT
    place     number of a row -> where it is, for errors
    prefix    beginning of a conversation's id
    refused   receives the errors of rows that are not conversations, which are then left out; None raises the first
    """
    task = prefix.rpartition("/")[2].partition(".")[0]
    for number, row in enumerate(rows):
        row_name = place(number)
        try:
            messages = READERS[layout](row, row_name)
            tools = tuple(_mappings(row.get("tools"), f"{row_name} field tools"))
            if not any(message.role == ASSISTANT for message in messages):
                raise BadRow(
                    "a conversation has no turn of the assistant",
                    where=row_name,
                    found=", ".join(message.role for message in messages),
                )
        except BadRow as error:
            if refused is None:
                raise
            refused.append(error)
            continue
        yield Conversation(f"{prefix}:{number}", messages, tools, task, split)


def read_prompt(row: Row, where: str) -> Conversation:
    """The messages (and `tools`) of one row, which an assistant is to answer. Raises BadRow naming the field."""
    messages = _read_messages(row, where)
    if messages[-1].role == ASSISTANT:
        raise BadRow(
            "the messages end with the assistant's turn, so there is nothing to answer",
            where=f"{where} field messages",
            found=", ".join(message.role for message in messages),
            expected="a turn of the user or of a tool at the end",
        )
    return Conversation(where, messages, tuple(_mappings(row.get("tools"), f"{where} field tools")))


def _read_messages(row: Row, where: str) -> tuple[Message, ...]:
    return _messages(row.get("messages"), f"{where} field messages")


def _read_sharegpt(row: Row, where: str) -> tuple[Message, ...]:
    turns = _messages(row.get("conversations"), f"{where} field conversations", role="from", content="value")
    system = _text(row.get("system"), f"{where} field system")
    return (Message("system", system), *turns) if system and turns[0].role != "system" else turns


def _read_prompt_completion(row: Row, where: str) -> tuple[Message, ...]:
    prompt = _messages(row.get("prompt"), f"{where} field prompt")
    return prompt + _messages(row.get("completion"), f"{where} field completion")


def _read_instruction(row: Row, where: str) -> tuple[Message, ...]:
    """Alpaca's three columns: the input follows the instruction after an empty line."""
    texts = {
        name: _text(row.get(name), f"{where} field {name}") for name in ("system", "instruction", "input", "output")
    }
    for name in ("instruction", "output"):
        if not texts[name]:
            found = "null" if texts[name] is None else "an empty text"
            raise BadRow("a text is missing", where=f"{where} field {name}", found=found, expected="a text")
    asked = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text)
    system = (Message("system", texts["system"]),) if texts["system"] else ()
    return (*system, Message("user", asked), Message(ASSISTANT, texts["output"] or ""))


READERS: dict[str, Callable[[Row, str], tuple[Message, ...]]] = {
    "messages": _read_messages,
    "conversations": _read_sharegpt,
    "prompt-completion": _read_prompt_completion,
    "instruction": _read_instruction,
}
"""Layout -> its reader."""


def _is_list(value: Any) -> bool:
    """Whether a cell holds a list, as it is or as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return isinstance(json.loads(value), list)
        except (json.JSONDecodeError, RecursionError):
            return False
    return isinstance(value, list | tuple)


def _messages(value: Any, where: str, *, role: str = "role", content: str = "content") -> tuple[Message, ...]:
    """The messages in a cell; `role` and `content` are the keys under which their roles and texts stand."""
    read = tuple(
        _message(turn, f"{where}[{number}]", role, content) for number, turn in enumerate(_mappings(value, where))
    )
    if not read:
        raise BadRow("a conversation is empty", where=where, expected="a list of messages")
    return read


def _message(turn: Row, where: str, role_key: str, content_key: str) -> Message:
    name = turn.get(role_key)
    if not isinstance(name, str) or name not in ROLE_NAMES:
        raise BadRow("unknown role", where=f"{where}.{role_key}", found=repr(name), expected=", ".join(ROLE_NAMES))
    calls = tuple(_mappings(turn.get("tool_calls"), f"{where}.tool_calls"))
    content = _content(turn.get(content_key), f"{where}.{content_key}")
    if content is None and not calls:
        raise BadRow("a message has no text", where=f"{where}.{content_key}", found="null", expected="a text")
    reasoning = turn.get("reasoning_content", turn.get("reasoning"))
    return Message(
        ROLE_NAMES[name],
        content or "",
        _text(turn.get("name"), f"{where}.name"),
        _text(reasoning, f"{where}.reasoning_content"),
        calls,
        _text(turn.get("tool_call_id"), f"{where}.tool_call_id"),
    )


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


def _mappings(value: Any, where: str) -> list[Row]:
    """A list of mappings: as it is, or as JSON in a cell of a CSV file. Null is an empty list."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise BadRow("a value is not a list", where=where, found=str(error), expected="a list as JSON") from error
    if value is None:
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(entry, Mapping) for entry in value):
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
