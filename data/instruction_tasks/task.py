"""The types of a task file: fields of a row, the kind of answer, and templates; and pure functions on them.

`kd.data.instruction_tasks.task_files` reads and checks the YAML; `kd.data.instruction_tasks.rendering` turns rows into examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kd.common.errors import DataError
from kd.data.instruction_tasks.text_rules import refuse_long, without
from kd.data.rows.tables import is_nothing

SPLITS = ("train", "dev", "test")
WORDINGS = ("original", "flan")
"""Wordings of fixed labels: the reference systems' and FLAN's."""
ANSWER = "answer"
"""The field that every template may use: the right choice, or a reference."""
MAX_INVERTED = 3
"""FLAN's limit of templates per task that turn it around (write the question for the answer)."""


@dataclass(frozen=True)
class Field:
    """A field of a template, and how it is read from a row."""

    columns: tuple[str, ...]
    """Columns; dots descend into mappings. Several columns are joined, and empty ones left out."""
    join: str | None = None
    """Text between the items of a list, or between several columns. Without it, a list becomes several references."""
    numbered: bool = False
    """Turn a list into the lines `1. …`, `2. …`."""
    replace: tuple[tuple[str, str], ...] = ()
    """Pairs (old, new) of texts to replace."""
    drop: str | None = None
    """Regular expression of text to remove, before `replace`."""
    wrap: str = "{}"
    """Text around the value `{}`, e.g. a code fence."""
    group: str | None = None
    """Column of a group: rows with the same value share their references. For references only."""

    def read(self, row: Mapping[str, Any], where: str) -> str | list[str]:
        """The field's text, or its texts where the column holds a list. Raises DataError for a value that is neither."""
        values = [column_value(row, column, where) for column in self.columns]
        value = values[0] if len(values) == 1 else [v for v in values if v not in (None, "")]
        if isinstance(value, list):
            texts = [self._clean(item, where) for item in value]
            if self.numbered:
                return self._wrapped("\n", [f"{i}. {text}" for i, text in enumerate(texts, 1)], where)
            if self.join is None and len(values) == 1:
                return [self._wrapped("", [text], where) for text in texts]
            return self._wrapped(self.join if self.join is not None else "\n", texts, where)
        return self._wrapped("", [self._clean(value, where)], where)

    def _wrapped(self, join: str, texts: list[str], where: str) -> str:
        refuse_long(sum(map(len, texts)) + len(texts) * len(join) + len(self.wrap), where)
        return self.wrap.replace("{}", join.join(texts))

    def _clean(self, value: Any, where: str) -> str:
        if is_nothing(value) or isinstance(value, list | dict):
            raise DataError(
                "a value is not text",
                where=f"{where} column {', '.join(self.columns)}",
                found="nothing" if is_nothing(value) else type(value).__name__,
                expected="a string",
            )
        text = str(value)
        if self.drop is not None:
            text = without(self.drop, text, where)
        for old, new in self.replace:
            times = text.count(old)
            refuse_long(len(text) + times * (len(new) - len(old)), where)
            text = text.replace(old, new) if times else text
        return text


@dataclass(frozen=True)
class Labels:
    """A fixed list of answers."""

    column: str
    """Column of the label."""
    words: Mapping[str, tuple[tuple[str, str], ...]]
    """Wording -> (row value, word) in the order of the choices."""


@dataclass(frozen=True)
class Choices:
    """Answers that are texts of the row."""

    columns: tuple[str, ...]
    """Columns of the texts."""
    label: str
    """Column of the right text's index."""


@dataclass(frozen=True)
class Template:
    """One wording of the task."""

    prompt: str
    target: str = "{answer}"
    inverted: bool = False
    """Whether the target is not the answer, but e.g. the question; there are no choices and references then."""
    options: bool = True
    """Whether choices are listed after the prompt, where there are any."""


@dataclass(frozen=True)
class HubDataset:
    """A data set on the hub that loads without code."""

    id: str
    config: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class SplitPart:
    """A split at the source, or a part of it: `validation`, `train[:90%]`, `train[-200:]`."""

    name: str
    start: str = ""
    stop: str = ""

    @property
    def whole(self) -> bool:
        """Whether the part is the whole split."""
        return not (self.start or self.stop)

    def cut(self, rows: int) -> tuple[int, int]:
        """First row of the part and one past its last, of `rows` in the split; percentages round down."""

        def row_at(text: str, default: int) -> int:
            if not text:
                return default
            value = int(text.removesuffix("%"))
            value = rows * value // 100 if text.endswith("%") else value
            return min(max(value + rows if text.startswith("-") else value, 0), rows)

        return row_at(self.start, 0), row_at(self.stop, rows)

    def __str__(self) -> str:
        return self.name if self.whole else f"{self.name}[{self.start}:{self.stop}]"


@dataclass(frozen=True)
class TaskFile:
    """A task, read from its file and checked."""

    name: str
    about: str
    path: str
    """Path of the YAML file, for errors and for relative `files`."""
    clusters: tuple[str, ...]
    flan: str | None
    """Name among the 62 data sets of FLAN; None where it is not one of them."""
    hub: HubDataset | None
    files: Mapping[str, str]
    """Split -> file beside the YAML, or address."""
    url: str | None
    """Page to get the rows from, where no hub id or file can be loaded."""
    splits: Mapping[str, SplitPart]
    fields: Mapping[str, Field]
    labels: Labels | None
    choices: Choices | None
    references: Field | None
    keywords: Field | None
    """Field of the words that an answer has to use."""
    max_chars: Mapping[str, int]
    """Column -> characters; rows with a longer text are left out."""
    cap: int | None
    """Number of rows kept of the train split, from the first; None keeps all."""
    metrics: tuple[str, ...]
    """Metrics of generated answers (`kd.evaluation.answers.answer_metrics`), and `accuracy` where there are choices."""
    example: Mapping[str, Any]
    """A made-up row, which shows the templates."""
    templates: tuple[Template, ...]

    @property
    def has_choices(self) -> bool:
        """Whether the answer is one of several texts."""
        return self.labels is not None or self.choices is not None

    @property
    def columns(self) -> tuple[str, ...]:
        """The top-level columns a row must have, sorted."""
        names = {c for field in self.fields.values() for c in field.columns} | set(self.max_chars)
        if self.labels is not None:
            names.add(self.labels.column)
        if self.choices is not None:
            names |= {*self.choices.columns, self.choices.label}
        if self.keywords is not None:
            names |= set(self.keywords.columns)
        if self.references is not None:
            names |= {*self.references.columns, *([self.references.group] if self.references.group else [])}
        return tuple(sorted({name.partition(".")[0] for name in names}))


def label_key(value: Any) -> str:
    """A label in the form in which labels are compared: `True` -> true, `1` -> 1, ` Yes` -> yes, null and NaN -> none.

    CSV and Parquet then agree.
    """
    return "none" if is_nothing(value) else str(value).strip().lower()


def column_value(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The value at a column or dotted path; None for null and for NaN. Raises DataError where there is none."""
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            names: Iterable[str] = value if isinstance(value, Mapping) else [type(value).__name__]
            raise DataError("columns are missing", where=where, found=", ".join(map(str, names)), expected=column)
        value = value[key]
    return None if is_nothing(value) else value
