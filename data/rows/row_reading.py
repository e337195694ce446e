"""What the rows of a table are: documents, pairs, or one of the layouts of conversations. `--format`, or seen by the columns.

    text                text
    pairs               prompt and target
    messages            messages; tools and system may stand beside them
    conversations       conversations, as ShareGPT writes them; tools and system may stand beside them
    prompt-completion   prompt and completion, two lists of messages, as TRL writes them; tools and system may stand beside them
    instruction         instruction and output, as Alpaca writes them; input, system and history may stand beside them

`--columns` names the columns that are not called as their field is; every format has the field `id`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.data.conversations.answer_choices import ANSWER, CHOICE_FIELDS, CHOICES
from kd.data.conversations.conversation_rows import LAYOUTS, holds_messages
from kd.data.rows.tables import is_nothing

Columns = Mapping[str, str]
"""Field -> name of the column that holds it."""
ID = "id"
"""The field of every format."""
AUTO = "auto"
"""Value of `--format`: seen by the columns."""


@dataclass(frozen=True)
class RowFormat:
    """One way to read rows."""

    needed: tuple[str, ...]
    """Fields that every row has."""
    beside: tuple[str, ...] = ()
    """Fields that a row may have."""

    @property
    def fields(self) -> tuple[str, ...]:
        """All its fields but the id."""
        return self.needed + self.beside


FORMATS: dict[str, RowFormat] = {
    "pairs": RowFormat(("prompt", "target")),
    "text": RowFormat(("text",)),
    **{name: RowFormat(layout.needed, layout.beside) for name, layout in LAYOUTS.items()},
}
"""Name -> format, in the order in which they are tried."""
FIELDS = tuple(dict.fromkeys([*(name for form in FORMATS.values() for name in form.fields), ID, *CHOICE_FIELDS]))
"""Every field that `--columns` may name."""


class MissingColumnsError(DataError):
    """A table has none of the columns that make examples."""


@dataclass(frozen=True)
class RowReading:
    """How rows become examples."""

    columns: Columns = field(default_factory=dict)
    """Columns that are not called as their field is."""
    form: str = AUTO
    """One of FORMATS, or AUTO."""
    skip: bool = False
    """Whether a row that cannot be read is left out and counted, and is no error."""
    prompts: bool = False
    """Whether the teacher is going to answer, so that a conversation needs no turn of the assistant, and a pair no target."""

    choices: bool = False
    """Whether the columns `choices` and `answer` are read, for an evaluation that ranks choices."""

    def __post_init__(self) -> None:
        named = sorted(self.columns.keys() & {*CHOICE_FIELDS})
        if named and not self.choices:
            raise DataError(
                "choices are read by an evaluation alone",
                found=", ".join(f"--columns {name}={self.columns[name]}" for name in named),
                try_="kd eval --tasks choices",
            )
        known = (*FORMATS[self.form].fields, ID, *CHOICE_FIELDS) if self.chosen else FIELDS
        for name in self.columns:
            if name not in known:
                raise unknown_name("field in --columns", name, known)

    @property
    def chosen(self) -> bool:
        """Whether the settings name the format."""
        return self.form != AUTO

    def column(self, name: str) -> str:
        """The column that holds a field."""
        return self.columns.get(name, name)

    def used(self, form: str) -> dict[str, str]:
        """Field -> column, of a format."""
        return {name: self.column(name) for name in FORMATS[form].fields}

    def choices_of(self, row: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """The row's choices and which is right, as the table holds them; None where they are not read, or are null."""
        value = row.get(self.column(CHOICES)) if self.choices else None
        return None if is_nothing(value) else (value, row.get(self.column(ANSWER)))

    def format_of(self, names: Sequence[str], rows: Iterable[Mapping[str, Any]], where: str) -> str:
        """The format of a table with these columns. Raises MissingColumnsError, DataError for values of another kind.

        rows   read up to the first, and only where its values decide
        """
        given = self.columns.keys() - {ID, *CHOICE_FIELDS}
        candidates = (self.form,) if self.chosen else tuple(FORMATS)
        fitting = [f for f in candidates if given <= {*FORMATS[f].fields} and self._has(f, names)]
        for form in fitting:
            if self.chosen or form != "prompt-completion" or _first_holds_messages(rows, self.column("prompt")):
                return form
        if fitting:
            raise DataError(
                "prompt and completion are texts, not messages",
                where=where,
                try_=f"--format pairs --columns prompt={self.column('prompt')},target={self.column('completion')}",
            )
        raise self._missing(names, where)

    def _has(self, form: str, names: Sequence[str]) -> bool:
        wanted = {self.column(name) for name in FORMATS[form].needed}
        return wanted | {*self.columns.values()} <= {*names}

    def _missing(self, names: Sequence[str], where: str) -> MissingColumnsError:
        wanted = [self.column(name) for name in FORMATS[self.form].needed] if self.chosen else []
        missing = dict.fromkeys(column for column in [*wanted, *self.columns.values()] if column not in names)
        if (
            self.columns
            and not missing
            and not any(self.columns.keys() - {ID, *CHOICE_FIELDS} <= {*f.fields} for f in FORMATS.values())
        ):
            raise DataError(
                "the fields of --columns belong to several formats", where=where, found=", ".join(self.columns)
            )
        return MissingColumnsError(
            "columns are missing",
            where=where,
            found=", ".join(names) or "none",
            expected=", ".join(missing) or "text, prompt and target, or messages",
            try_="--columns text=NAME, --columns prompt=NAME,target=NAME, or --columns messages=NAME",
        )


def _first_holds_messages(rows: Iterable[Mapping[str, Any]], column: str) -> bool:
    """Whether the first row that could be read has messages in a column; rows that can be read only once are not looked at."""
    first = None if iter(rows) is rows else next((row for row in rows if row), None)
    return first is not None and holds_messages(first.get(column))
