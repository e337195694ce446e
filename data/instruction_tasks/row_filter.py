"""Which rows of a task are used: those that its rules let through, that are short enough, and that have an answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd.data.instruction_tasks.row_answers import RowAnswers, is_skipped
from kd.data.instruction_tasks.row_reading.row_field import column_value
from kd.data.instruction_tasks.task import TaskFile
from kd.data.instruction_tasks.text_rules import occurs
from kd.data.left_out import Reason
from kd.data.rows.tables import is_nothing


def left_out_for(task: TaskFile, row: Mapping[str, Any], where: str) -> Reason | None:
    """Why a row is left out before its answer is read; None where it is not. Raises DataError."""
    if any(not occurs(pattern, _text(row, column, where), where) for column, pattern in task.where.items()):
        return "filtered"
    if any(occurs(pattern, _text(row, column, where), where) for column, pattern in task.where_not.items()):
        return "filtered"
    if task.labels is not None and is_skipped(task.labels, row, where):
        return "filtered"
    lengths = ((column_value(row, column, where), size) for column, size in task.max_chars.items())
    return "over_max_chars" if any(isinstance(v, str) and len(v) > size for v, size in lengths) else None


def left_out_for_answer(task: TaskFile, row: Mapping[str, Any], answers: RowAnswers, where: str) -> Reason | None:
    """Why a row with these answers is left out; None where it is not. Raises DataError."""
    if task.choices is not None and task.choices.count not in (None, len(answers.texts)):
        return "filtered"
    fields = [task.fields[name] for name in task.differs]
    return "filtered" if any(field.read(row, where) == answers.right for field in fields) else None


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    """The value of a column as text: a list as lines, and nothing as the empty text."""
    value = column_value(row, column, where)
    return "\n".join(map(str, value)) if isinstance(value, list) else "" if is_nothing(value) else str(value)
