"""The answers of a row: the words or texts to choose from, or the references that are acceptable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from kd.common.errors import DataError
from kd.data.instruction_tasks.task import Choices, Field, Labels, TaskFile, column_value, label_key
from kd.data.rows.tables import Place

UNLABELLED = ("-1", "none", "")
"""Label values of a row that has no label."""


@dataclass(frozen=True)
class RowAnswers:
    """The answers of one row."""

    texts: tuple[str, ...]
    """The choices, or the references."""
    index: int | None
    """Index of the right choice; None for references."""
    references: tuple[str, ...] = ()
    """All acceptable answers, where the task has references."""

    @property
    def right(self) -> str:
        """The right choice, or the first reference."""
        return self.texts[self.index or 0]


def row_answers(task: TaskFile, row: Mapping[str, Any], wording: str, where: str) -> RowAnswers | None:
    """The row's answers, or None where it has none. Raises DataError for a label that the task does not list.

    wording   of fixed labels: `original` or `flan`
    where     file and number of the row, for errors
    """
    if task.references is not None:
        texts = _reference_texts(task.references, row, where)
        return RowAnswers(texts, None, texts) if texts else None
    if task.labels is not None:
        return _label_answers(task.labels, row, wording, where)
    assert task.choices is not None
    return _choice_answers(task.choices, row, where)


def _label_answers(labels: Labels, row: Mapping[str, Any], wording: str, where: str) -> RowAnswers | None:
    values = [value for value, _ in labels.words[wording]]
    words = tuple(word for _, word in labels.words[wording])
    index = _index_of_label(row, labels.column, values, where)
    return None if index is None else RowAnswers(words, index)


def _choice_answers(choices: Choices, row: Mapping[str, Any], where: str) -> RowAnswers | None:
    texts: list[str] = []
    for column in choices.columns:
        value = Field((column,)).read(row, where)
        texts += [value] if isinstance(value, str) else value
    index = _index_of_label(row, choices.label, [str(i) for i in range(len(texts))], where)
    return None if index is None else RowAnswers(tuple(texts), index)


def _index_of_label(row: Mapping[str, Any], column: str, values: list[str], where: str) -> int | None:
    label = label_key(column_value(row, column, where))
    if label in values:
        return values.index(label)
    if label in UNLABELLED:
        return None
    raise DataError(
        "a label is not in the task's list",
        where=f"{where} column {column}",
        found=label,
        expected=", ".join(values) + " (-1 or empty: unlabelled)",
    )


def _reference_texts(references: Field, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The references of a row, each once; none where there is no text."""
    if all(column_value(row, column, where) is None for column in references.columns):
        return ()
    value = references.read(row, where)
    return tuple(dict.fromkeys(t for t in ([value] if isinstance(value, str) else value) if t.strip()))


def reference_group(task: TaskFile, row: Mapping[str, Any], where: str) -> str | None:
    """The row's value of the column that groups references, or None where the task does not group them."""
    if task.references is None or task.references.group is None:
        return None
    return str(column_value(row, task.references.group, where))


def grouped_references(task: TaskFile, rows: Iterable[Mapping[str, Any]], place: Place) -> dict[str, tuple[str, ...]]:
    """Group -> references of all its rows, in the order of the rows, each once; empty where the task has no groups."""
    groups: dict[str, dict[str, None]] = {}
    if task.references is None or task.references.group is None:
        return {}
    for number, row in enumerate(rows):
        row_where = place(number)
        texts = groups.setdefault(str(reference_group(task, row, row_where)), {})
        texts |= dict.fromkeys(_reference_texts(task.references, row, row_where))
    return {group: tuple(texts) for group, texts in groups.items()}
