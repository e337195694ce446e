"""Turn the rows of a task into examples: read the fields, choose a template, and put options and answer into words.

The template of an example depends only on (seed, example id): not on its neighbours, the limit, the order, or the Python
version, because a keyed digest chooses it. `round-robin` uses the templates in turn, as the FLAN code does; a number uses
one template for every example, as evaluations do (index 0).

The suffix that lists the choices is FLAN's (Wei et al. 2022, arXiv:2109.01652, section 2.2): `OPTIONS:\\n- a\\n- b`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from kd.common.errors import DataError
from kd.common.strangers.braces import fill, template_fields
from kd.data.data_settings import BOTH, InstructionConfig
from kd.data.instruction_tasks.draws import drawing_order, first_rows_are_unlike, keyed
from kd.data.instruction_tasks.row_answers import (
    UNLABELLED,
    RowAnswers,
    grouped_references,
    reference_group,
    row_answers,
)
from kd.data.instruction_tasks.task import (
    ANSWER,
    Field,
    TaskFile,
    Template,
    column_value,
    label_key,
)
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.rows.tables import Place


@dataclass(frozen=True)
class Rendered:
    """Examples of one task."""

    examples: tuple[Example, ...]
    left_out: LeftOut
    """Rows that did not become examples."""
    drawn: bool = False
    """Whether a limit drew the rows that it kept, because they are in the order of their labels."""


def options_text(choices: Sequence[str]) -> str:
    """The list of choices, `OPTIONS:\\n- a\\n- b`, without a line end after it."""
    return "OPTIONS:\n- " + "\n- ".join(choices)


def render_rows(
    task: TaskFile,
    rows: Sequence[Mapping[str, Any]],
    *,
    split: str,
    config: InstructionConfig,
    place: Place,
    cap: int | None = None,
    first: int = 0,
) -> Rendered:
    """Examples of `rows` in their order; ids are `task/split/row`, counted from `first`.

    Rows that are too long or have no answer are left out; then the first `cap` are kept, or drawn ones where the rows are in the
    order of their labels (`draws`). `rows` is read twice where references are grouped. Raises DataError for missing columns, an
    unknown label, a template index that does not exist, and where no row has an answer.
    """
    check_template_index(task, config)
    if config.labels == BOTH:
        raise DataError(
            "an example can have only one wording of its labels",
            where=task.name,
            found="--labels both",
            expected="original or flan; both is for kd eval --tasks choices",
        )
    groups = grouped_references(task, rows, lambda number: place(first + number))
    ids = [f"{task.name}/{split}/{number}" for number in range(first, first + len(rows))]
    drawn = cap is not None and cap < len(rows) and first_rows_are_unlike(_labels(task, rows, first, place), cap)
    kept: dict[int, tuple[Mapping[str, Any], RowAnswers]] = {}
    left_out = LeftOut()
    seen = 0
    for number, row in ((n, rows[n]) for n in drawing_order(ids, config.data_seed)) if drawn else enumerate(rows):
        if cap is not None and len(kept) == cap:
            break
        seen += 1
        row_where = place(first + number)
        _check_columns(task, row, row_where)
        if _too_long(task, row, row_where):
            left_out.add("over_max_chars", ids[number])
            continue
        answers = row_answers(task, row, config.labels, row_where)
        if answers is None:
            left_out.add("unlabelled", ids[number])
            continue
        group = reference_group(task, row, row_where)
        kept[number] = (row, answers if group is None else replace(answers, references=groups[group]))
    left_out.add("beyond_limit", f"{task.name}/{split}", len(rows) - seen)
    examples: list[Example] = []
    for number in sorted(kept):
        row, answers = kept[number]
        template = task.templates[_template_index(task, config, ids[number], len(examples))]
        examples.append(_render(task, template, row, answers, config, ids[number], split, place(first + number)))
    if not examples and left_out.count("unlabelled"):
        raise DataError(
            "no row has an answer",
            where=place(first),
            found=f"{left_out.count('unlabelled')} unlabelled rows",
            expected="labels or references",
            try_="another --split",
        )
    return Rendered(tuple(examples), left_out, drawn)


def _labels(task: TaskFile, rows: Sequence[Mapping[str, Any]], first: int, place: Place) -> list[str]:
    """The labels of all rows that have one; none where the answers are free text. Of a data set only that column is read."""
    column = task.labels.column if task.labels else task.choices.label if task.choices else ""
    if not column:
        return []
    top = column.partition(".")[0]
    data_set: Any = rows
    seen = [{top: value} for value in data_set[top]] if hasattr(rows, "select_columns") else rows
    labels = (label_key(column_value(row, column, place(first + number))) for number, row in enumerate(seen))
    return [label for label in labels if label not in UNLABELLED]


def _check_columns(task: TaskFile, row: Mapping[str, Any], where: str) -> None:
    missing = [c for c in task.columns if c not in row]
    if missing:
        raise DataError(
            "columns are missing",
            where=where,
            found=", ".join(map(str, row)) or "none",
            expected=", ".join(missing),
            try_="rows in the columns of the task's file: kd data templates TASK",
        )


def _too_long(task: TaskFile, row: Mapping[str, Any], where: str) -> bool:
    values = ((column_value(row, column, where), size) for column, size in task.max_chars.items())
    return any(isinstance(value, str) and len(value) > size for value, size in values)


def check_template_index(task: TaskFile, config: InstructionConfig) -> None:
    """Raise DataError where the settings name a template that the task does not have."""
    if isinstance(config.template, int) and not 0 <= config.template < len(task.templates):
        raise DataError(
            "no such template",
            where=task.name,
            found=config.template,
            expected=f"0..{len(task.templates) - 1}",
            try_=f"kd data templates {task.name}",
        )


def _template_index(task: TaskFile, config: InstructionConfig, identity: str, position: int) -> int:
    if isinstance(config.template, int):
        return config.template
    count = len(task.templates)
    return (
        position % count if config.template == "round-robin" else keyed(config.data_seed, "template", identity) % count
    )


def _render(
    task: TaskFile,
    template: Template,
    row: Mapping[str, Any],
    answers: RowAnswers,
    config: InstructionConfig,
    identity: str,
    split: str,
    where: str,
) -> Example:
    values: dict[str, str] = {}
    for name in _used_fields(template):  # a null in a field that the template does not name is no hole in its text
        value = task.fields[name].read(row, where)
        if not isinstance(value, str):
            raise DataError(
                "a field is a list",
                where=f"{where} field {name}",
                expected="text",
                try_=f"join or numbered in {task.path}",
            )
        values[name] = value

    def worded(text: str, answer: str) -> str:
        return fill(text, values | {ANSWER: answer})

    prompt, target = worded(template.prompt, answers.right), worded(template.target, answers.right)
    if template.inverted:
        return Example(identity, target, prompt, task.name, split)
    texts = tuple(worded(template.target, text) for text in answers.texts)
    if answers.index is None:
        references = tuple(worded(template.target, text) for text in answers.references)
        return Example(
            identity,
            target,
            prompt,
            task.name,
            split,
            references=references,
            keywords=() if task.keywords is None else _keywords(task.keywords, row, where),
        )
    if template.options and config.options is not False:
        prompt = f"{prompt}\n\n{options_text(answers.texts)}"
    return Example(identity, target, prompt, task.name, split, choices=texts, answer=answers.index)


@cache
def _used_fields(template: Template) -> tuple[str, ...]:
    """The fields that a template names, besides the answer."""
    names = (*template_fields(template.prompt, "prompt"), *template_fields(template.target, "target"))
    return tuple(name for name in dict.fromkeys(names) if name != ANSWER)


def _keywords(field: Field, row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """The items of a list, or the words of a text."""
    value = field.read(row, where)
    return tuple(value.split() if isinstance(value, str) else value)


def show_templates(task: TaskFile, config: InstructionConfig) -> list[Example]:
    """The example row of a task in each of its templates. Raises DataError where the file has no such row."""
    if not task.example:
        raise DataError("the task file has no example row", where=task.path, expected="example: {column: value, …}")
    return [
        example
        for index in range(len(task.templates))
        for example in render_rows(
            task,
            [task.example],
            split="example",
            config=replace(config, template=index),
            place=lambda number: f"{task.path} example row",
        ).examples
    ]
