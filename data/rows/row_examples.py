"""Map the columns of a table to examples: `text` makes documents, `prompt` and `target` pairs, `messages` conversations.

Which format a table has, and which columns are read, says `kd.data.rows.row_reading`. Every row must have the columns that are
read: an empty value is a value, a missing one is an error. A row that cannot be read is an error, or is left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kd.common.errors import DataError
from kd.data.conversations.answer_choices import CHOICE_FIELDS, CHOICES, answered_rightly, choices_in, right_choice
from kd.data.conversations.conversation import CONVERSATIONS, Conversation
from kd.data.conversations.conversation_rows import LAYOUTS, conversation_of
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example, check_unicode
from kd.data.rows.row_reading import ID, RowReading
from kd.data.rows.tables import RowLocation, UnreadRow, is_nothing, rows_in

TEXTS = ("text", "prompt", "target")
"""Fields that make documents and pairs."""


def rows_to_examples(
    rows: Iterable[Mapping[str, Any]],
    names: Sequence[str],
    reading: RowReading,
    *,
    where: str,
    location: RowLocation,
    prefix: str,
    split: str,
    left_out: LeftOut,
) -> tuple[str, Iterator[Example]]:
    """The kind of the table (`documents`, `pairs` or `conversations`), and its rows as examples in their order.

    names     columns of the table
    where     file or data set, for errors
    place     number of a row -> where it is, for errors
    prefix    beginning of an example's id where no column holds it; what follows its last slash, up to a dot, is the task
    left_out  receives the pairs that have no prompt, columns and keys of conversations that are not read, and rows that cannot be

    Raises DataError for a missing column, and, while the examples are read, for a row that lacks one, or a value that is not text.
    """
    form = reading.format_of(names, rows, where)
    task = prefix.rpartition("/")[2].partition(".")[0]
    read = _conversations if form in LAYOUTS else _texts
    example_of = read(reading, form, names, location, task, split, _Unread(left_out, prefix))

    def examples() -> Iterator[Example]:
        for number, row in enumerate(rows):
            name = f"{prefix}:{number}"
            try:
                if isinstance(row, UnreadRow):
                    raise row.error
                example = example_of(number, row, name)
                if reading.skip:
                    check_unicode(prefix, example)
            except DataError as error:
                if not reading.skip:
                    error.details.setdefault("try", "--bad-rows skip leaves such rows out and counts them")
                    raise
                left_out.add("bad_rows", f"{name}, {error.headline}")
                continue
            if form == "pairs" and not example.prompt and example.target.strip():
                left_out.add("without_prompt", example.id)
            yield example

    kind = CONVERSATIONS if form in LAYOUTS else "documents" if form == "text" else form
    return kind, examples()


@dataclass(frozen=True)
class DatasetTexts:
    """The examples of a data set of the library `datasets`, in memory, on this disk or streamed, or of rows that look like one."""

    where: str
    """What errors call it."""
    rows: Any
    """Rows that can be read again, with `column_names`."""
    prefix: str
    """As for `rows_to_examples`."""
    split: str
    reading: RowReading
    names: tuple[str, ...] = ()
    """Columns, where the rows do not name them."""

    def __call__(self, left_out: LeftOut) -> Iterator[Example]:
        """The examples in their order; `left_out` receives what is not read. Raises DataError."""
        yield from self._opened(left_out)[1]

    def kind(self) -> str:
        """`documents`, `pairs` or `conversations`. Raises DataError for columns that are none of them."""
        return self._opened(LeftOut())[0]

    def _opened(self, left_out: LeftOut) -> tuple[str, Iterator[Example]]:
        location, names = rows_in(self.where), self.names or self.rows.column_names
        if names is None:  # a stream whose features are not known before its first row
            names = list(next(iter(self.rows), {}))
        return rows_to_examples(
            self.rows,
            list(names),
            self.reading,
            where=self.where,
            location=location,
            prefix=self.prefix,
            split=self.split,
            left_out=left_out,
        )


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


class _Unread:
    """Names of columns and keys of one table that are not read, each counted once."""

    def __init__(self, left_out: LeftOut, prefix: str) -> None:
        self._left_out, self._prefix = left_out, prefix
        self._seen: set[str] = set()

    def add(self, names: Iterable[str]) -> None:
        for name in sorted({*names} - self._seen):
            self._seen.add(name)
            self._left_out.add("other_fields", f"{name} in {self._prefix}")


_Read = Callable[[int, Mapping[str, Any], str], Example]
"""(number of a row, the row, its id where no column holds one) -> an example."""


def _texts(
    reading: RowReading, form: str, names: Sequence[str], location: RowLocation, task: str, split: str, unread: _Unread
) -> _Read:
    """The reader of documents and pairs."""
    columns = reading.used(form)
    fields = {"target": columns["text"]} if form == "text" else columns
    by_name = not (reading.columns or reading.chosen)
    expected = {name for name in TEXTS if name in names} if by_name else {*fields.values()}

    def read(number: int, row: Mapping[str, Any], name: str) -> Example:
        _check_columns(row, expected, TEXTS if by_name else (), number, location)
        texts = {field: _text(row[column], column, number, location) for field, column in fields.items()}
        identity = name if ID not in reading.columns else _identity(reading, row, name, location(number))
        prompt, target = texts.get("prompt", ""), texts["target"]
        if reading.prompts and not target.strip():
            target = prompt  # the teacher's answer replaces it
        example = Example(identity, target, prompt, task=task, split=split)
        asked = reading.choices_of(row) if form == "pairs" else None
        if asked is None:
            return example
        choices = choices_in(asked[0], f"{location(number)} field {CHOICES}")
        right = right_choice(choices, asked[1], target if target.strip() else None, location(number))
        return replace(example, target=target if target.strip() else choices[right], choices=choices, answer=right)

    return read


def _conversations(
    reading: RowReading, form: str, names: Sequence[str], location: RowLocation, task: str, split: str, unread: _Unread
) -> _Read:
    """The reader of conversations."""
    columns = reading.used(form)
    known = {*columns.values(), reading.columns.get(ID)}
    known |= {reading.column(name) for name in CHOICE_FIELDS} if reading.choices else set()

    def read(number: int, row: Mapping[str, Any], name: str) -> Example:
        keys: set[str] = set()
        asked = reading.choices_of(row)
        conversation = conversation_of(
            {field: None if is_nothing(row.get(column)) else row.get(column) for field, column in columns.items()},
            form,
            where=location(number),
            name=_identity(reading, row, name, location(number)),
            task=task,
            split=split,
            unread=keys,
            prompts=reading.prompts or asked is not None,
        )
        unread.add(keys | {column for column, value in row.items() if column not in known and not is_nothing(value)})
        if asked is None:
            return conversation_example(conversation)
        choices = choices_in(asked[0], f"{location(number)} field {CHOICES}")
        conversation, right = answered_rightly(conversation, choices, asked[1], location(number))
        return replace(conversation_example(conversation), choices=choices, answer=right)

    return read


def _identity(reading: RowReading, row: Mapping[str, Any], name: str, where: str) -> str:
    """The id of a row: that of the column, if one is named, else `name`. Raises DataError where it is missing."""
    column = reading.columns.get(ID)
    if column is None:
        return name
    if is_nothing(row.get(column)):
        raise DataError("an id is missing", where=f"{where} column {column}")
    return str(row[column])


def _check_columns(
    row: Mapping[str, Any], expected: set[str], known: Sequence[str], number: int, location: RowLocation
) -> None:
    """Raise DataError for a row that lacks a column, or has one of `known` that the first row has not."""
    if row.keys() == expected:
        return
    missing = sorted(expected - row.keys())
    added = [name for name in known if name in row and name not in expected]
    if missing or added:
        raise DataError(
            "a row has other columns than the first row",
            where=location(number),
            found=", ".join(map(str, row)) or "none",
            expected=", ".join(sorted(expected)) + (f" (missing: {', '.join(missing)})" if missing else ""),
            try_="the same columns in every row, or --columns for those to read; an empty text or null is a value",
        )


def _text(value: Any, column: str, number: int, location: RowLocation) -> str:
    """The text of a value; no value is the empty text."""
    if isinstance(value, str):
        return value
    if is_nothing(value):
        return ""
    raise DataError(
        "a value is not text",
        where=f"{location(number)} column {column}",
        found=type(value).__name__,
        expected="a string",
    )
