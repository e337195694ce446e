"""The answers of a row: the words or texts to choose from, or the references that are acceptable."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kd.common.errors import DataError
from kd.data.instruction_tasks.row_reading.row_field import Field, column_value, label_key
from kd.data.instruction_tasks.task import Choices, Labels, TaskFile
from kd.data.rows.tables import RowLocation

UNLABELLED = ("-1", "none", "")
"""Label values of a row that has no label."""
YAML_BOOLEANS = {"yes": "true", "on": "true", "no": "false", "off": "false"}
"""Words that YAML reads as a boolean where they have no quotes."""


@dataclass(frozen=True)
class RowAnswers:
    """The answers of one row."""

    texts: tuple[str, ...]
    """The choices, or the references."""
    index: int | None
    """Index of the right choice; None for references."""
    references: tuple[str, ...] = ()
    """All acceptable answers, where the task has references."""
    also_right: tuple[int, ...] = ()
    """Indices of further choices that are right."""

    @property
    def right(self) -> str:
        """The right choice, or the first reference."""
        return self.texts[self.index or 0]


def row_answers(task: TaskFile, row: Mapping[str, Any], wording: str, where: str, split: str = "") -> RowAnswers | None:
    """The row's answers, or None where it has none. Raises DataError for a label that the task does not list.

    wording   of fixed labels: `original` or `flan`
    where     file and number of the row, for errors
    split     train, dev or test, for references whose lists mean different things in different splits
    """
    if task.references is not None:
        texts = _with_target(task, row, _reference_texts(task.references, row, where, split), where)
        return RowAnswers(texts, None, texts) if texts else None
    if task.labels is not None:
        return _label_answers(task.labels, row, wording, where)
    assert task.choices is not None
    return _choice_answers(task.choices, row, where)


def _with_target(task: TaskFile, row: Mapping[str, Any], texts: tuple[str, ...], where: str) -> tuple[str, ...]:
    """The references; where a column of its own holds the text to learn, that text and then the others, or none without it."""
    if task.target is None:
        return texts
    if column_value(row, task.target.columns[0], where) is None:
        return ()
    target = task.target.read(row, where)
    first = target if isinstance(target, str) else (target or [""])[0]
    return tuple(dict.fromkeys((first, *texts))) if first.strip() else ()


def is_skipped(labels: Labels, row: Mapping[str, Any], where: str) -> bool:
    """Whether the task leaves out rows with this label."""
    return bool(labels.skip) and label_key(column_value(row, labels.column, where)) in labels.skip


def _label_answers(labels: Labels, row: Mapping[str, Any], wording: str, where: str) -> RowAnswers | None:
    values = [value for value, _ in labels.words[wording]]
    words = tuple(word for _, word in labels.words[wording])
    label = label_key(column_value(row, labels.column, where))
    if labels.round and label not in UNLABELLED:
        label = _rounded(label)
    index = _index_of_label(label, labels.column, values, where)
    return None if index is None else RowAnswers(words, index)


def _rounded(label: str) -> str:
    """A number as the nearest whole one; of two, the even one. What is no number stays, and is then refused."""
    try:
        return str(round(float(label)))
    except (ValueError, OverflowError):
        return label


def _choice_answers(choices: Choices, row: Mapping[str, Any], where: str) -> RowAnswers | None:
    texts: list[str] = []
    for one in choices.texts:
        value = one.read(row, where)
        texts += [value] if isinstance(value, str) else value
    around = [None if part is None else _one_text(part, row, where) for part in (choices.beginning, choices.ending)]
    shown = tuple(f"{around[0] or ''}{text}{around[1] or ''}" for text in texts)
    if choices.right is not None:
        return _given_as_text(choices.right, choices.texts[0], row, texts, shown, where)
    assert choices.label is not None
    if choices.keys is None:
        keys = [str(number) for number in range(choices.first, choices.first + len(texts))]
    else:
        keys = _keys(choices.keys, row, len(texts), where)
    index = _index_of_label(label_key(column_value(row, choices.label, where)), choices.label, keys, where)
    return None if index is None else RowAnswers(shown, index)


def _one_text(field: Field, row: Mapping[str, Any], where: str) -> str:
    value = field.read(row, where)
    return value if isinstance(value, str) else " ".join(value)


def _keys(column: str, row: Mapping[str, Any], count: int, where: str) -> list[str]:
    keys = column_value(row, column, where)
    if not isinstance(keys, list) or len(keys) != count:
        raise DataError(
            "the choices and their keys do not fit together",
            where=f"{where} column {column}",
            found=f"{len(keys)} keys" if isinstance(keys, list) else type(keys).__name__,
            expected=f"a list of {count}",
        )
    return [label_key(key) for key in keys]


def _given_as_text(
    column: str, rules: Field, row: Mapping[str, Any], texts: list[str], shown: tuple[str, ...], where: str
) -> RowAnswers | None:
    """Answers whose right ones are given as texts; those are cleaned as the choices are."""
    if column_value(row, column, where) in (None, [], ""):
        return None
    read = replace(rules, columns=(column,)).read(row, where)
    wanted = [read] if isinstance(read, str) else read
    indices = [number for number, text in enumerate(texts) if text in wanted]
    if not indices:
        raise DataError(
            "no right answer is among the choices",
            where=f"{where} column {column}",
            found=", ".join(wanted)[:120],
            expected="one of: " + ", ".join(texts)[:200],
        )
    return RowAnswers(shown, indices[0], also_right=tuple(indices[1:]))


def _index_of_label(label: str, column: str, values: list[str], where: str) -> int | None:
    if label in values:
        return values.index(label)
    if label in UNLABELLED:
        return None
    advice = None
    if YAML_BOOLEANS.get(label) in values:
        advice = f'quotes in the task file: "{label}", because YAML reads {label} as {YAML_BOOLEANS[label]}'
    raise DataError(
        "a label is not in the task's list",
        where=f"{where} column {column}",
        found=label,
        expected=", ".join(values) + " (-1 or empty: unlabelled)",
        try_=advice,
    )


def _reference_texts(references: Field, row: Mapping[str, Any], where: str, split: str) -> tuple[str, ...]:
    """The references of a row, each once; none where there is no text."""
    values = [column_value(row, column, where) for column in references.columns]
    if all(value is None for value in values):
        return ()
    if references.empty is not None and all(value == [] for value in values):
        return (references.wrap.replace("{}", references.empty),)
    value = references.of_split(split).read(row, where)
    return tuple(dict.fromkeys(t for t in ([value] if isinstance(value, str) else value) if t.strip()))


def reference_group(task: TaskFile, row: Mapping[str, Any], where: str) -> str | None:
    """The row's value of the column that groups references, or None where the task does not group them."""
    if task.references is None or task.references.group is None:
        return None
    return str(column_value(row, task.references.group, where))


def grouped_references(
    task: TaskFile, rows: Iterable[Mapping[str, Any]], location: RowLocation, split: str = ""
) -> dict[str, tuple[str, ...]]:
    """Group -> references of all its rows, in the order of the rows, each once; empty where the task has no groups."""
    groups: dict[str, dict[str, None]] = {}
    if task.references is None or task.references.group is None:
        return {}
    for number, row in enumerate(rows):
        row_where = location(number)
        texts = groups.setdefault(str(reference_group(task, row, row_where)), {})
        texts |= dict.fromkeys(_reference_texts(task.references, row, row_where, split))
    return {group: tuple(texts) for group, texts in groups.items()}
