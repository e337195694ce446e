"""Map the columns of a table to examples: `text` makes documents, `prompt` and `target` pairs, `messages` conversations.

Other column names are given by `--columns`, e.g. `--columns prompt=question,target=answer`. Every row must have the columns that
are read: an empty value is a value, a missing one is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.data.conversations.conversation import CONVERSATIONS, Conversation
from kd.data.conversations.conversation_rows import chat_layout, rows_to_conversations
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.rows.tables import Place, is_nothing

Columns = Mapping[str, str]
"""Field (one of FIELDS) -> name of the column that holds it."""
FIELDS = ("text", "prompt", "target", "id")
TEXTS = ("text", "prompt", "target")
"""Fields that make examples."""


class MissingColumnsError(DataError):
    """A table has none of the columns that make examples."""


def rows_to_examples(
    rows: Iterable[Mapping[str, Any]],
    names: Sequence[str],
    columns: Columns,
    *,
    where: str,
    place: Place,
    prefix: str,
    split: str,
    left_out: LeftOut,
) -> tuple[str, Iterator[Example]]:
    """The kind of the table (`documents`, `pairs` or `conversations`), and its rows as examples in their order.

    names     columns of the table
    columns   columns that are not called as their field is
    where     file or data set, for errors
    place     number of a row -> where it is, for errors
    prefix    beginning of an example's id where no column holds it; what follows its last slash, up to a dot, is the task
    left_out  receives the pairs that have no prompt

    Raises DataError for a missing column, and, while the examples are read, for a row that lacks one, or a value that is not text.
    """
    others = "text" in names or {"prompt", "target"} <= set(names)
    layout = (
        None
        if columns or others
        else chat_layout(names, next(iter(rows), None) if isinstance(rows, Sequence) else None)
    )
    if layout is not None:
        chats = rows_to_conversations(rows, layout, place=place, prefix=prefix, split=split)
        return CONVERSATIONS, map(conversation_example, chats)
    fields = _fields_of(names, columns, where)
    expected = set(fields.values()) if columns else {name for name in TEXTS if name in names}
    id_column = columns.get("id")
    task = prefix.rpartition("/")[2].partition(".")[0]

    def examples() -> Iterator[Example]:
        for number, row in enumerate(rows):
            _check_columns(row, expected, () if columns else TEXTS, number, place)
            texts = {field: _text(row[column], column, number, place) for field, column in fields.items()}
            identity = row.get(id_column) if id_column else f"{prefix}:{number}"
            if is_nothing(identity):
                raise DataError("an id is missing", where=f"{place(number)} column {id_column}")
            example = Example(str(identity), texts["target"], texts.get("prompt", ""), task=task, split=split)
            if "prompt" in fields and not example.prompt and example.target.strip():
                left_out.add("without_prompt", example.id)
            yield example

    return ("pairs" if "prompt" in fields else "documents"), examples()


def conversation_example(conversation: Conversation) -> Example:
    """A conversation as an example, whose prompt and target are for people."""
    return Example(
        conversation.id,
        conversation.answered.strip() or "(no text)",
        conversation.asked,
        conversation.task,
        conversation.split,
        conversation=conversation,
    )


def _fields_of(names: Sequence[str], columns: Columns, where: str) -> dict[str, str]:
    """Field of an example -> its column. Raises DataError for an unknown field or a missing column."""
    for field in columns:
        if field not in FIELDS:
            raise unknown_name("field in --columns", field, FIELDS)
    column_of = {field: columns.get(field, field) for field in FIELDS}
    missing = [column for field, column in column_of.items() if field in columns and column not in names]
    pairs = column_of["prompt"] in names and column_of["target"] in names and "text" not in columns
    if missing or not (pairs or column_of["text"] in names):
        raise MissingColumnsError(
            "columns are missing",
            where=where,
            found=", ".join(names) or "none",
            expected=", ".join(missing) or "text, prompt and target, or messages",
            try_="--columns text=NAME or --columns prompt=NAME,target=NAME",
        )
    if pairs:
        return {"prompt": column_of["prompt"], "target": column_of["target"]}
    return {"target": column_of["text"]}


def _check_columns(row: Mapping[str, Any], expected: set[str], known: Sequence[str], number: int, place: Place) -> None:
    """Raise DataError for a row that lacks a column, or has one of `known` that the first row has not."""
    missing = sorted(expected - row.keys())
    added = [name for name in known if name in row and name not in expected]
    if missing or added:
        raise DataError(
            "a row has other columns than the first row",
            where=place(number),
            found=", ".join(map(str, row)) or "none",
            expected=", ".join(sorted(expected)) + (f" (missing: {', '.join(missing)})" if missing else ""),
            try_="the same columns in every row, or --columns for those to read; an empty text or null is a value",
        )


def _text(value: Any, column: str, number: int, place: Place) -> str:
    """The text of a value; no value is the empty text."""
    if isinstance(value, str):
        return value
    if is_nothing(value):
        return ""
    raise DataError(
        "a value is not text",
        where=f"{place(number)} column {column}",
        found=type(value).__name__,
        expected="a string",
    )
