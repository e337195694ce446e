"""Turn the rows of a task into examples: read the fields, choose a template, and put options and answer into words.

The template of an example depends only on (seed, example id): not on its neighbours, the limit, the order, or the Python
version, because a keyed digest chooses it. `round-robin` uses the templates in turn, as the FLAN code does; a number uses
one template for every example, as evaluations do (index 0). `each` makes an example of a row in each template that asks for the
answer, and adds ` in template K` to its id: evaluations then give means over templates.

The suffix that lists the choices is FLAN's (Wei et al. 2022, arXiv:2109.01652, section 2.2): `OPTIONS:\\n- a\\n- b`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from kd.common.errors import DataError
from kd.common.strangers.braces import fill, template_fields
from kd.data.data_settings import BOTH, EACH, InstructionConfig
from kd.data.instruction_tasks.draws import drawing_order, first_rows_are_unlike, keyed
from kd.data.instruction_tasks.row_answers import (
    UNLABELLED,
    RowAnswers,
    grouped_references,
    reference_group,
    row_answers,
)
from kd.data.instruction_tasks.row_filter import left_out_for, left_out_for_answer
from kd.data.instruction_tasks.row_reading.row_field import Field, NullValueError, column_value, label_key
from kd.data.instruction_tasks.row_reading.row_order import one_row_per_item
from kd.data.instruction_tasks.task import ANSWER, TaskFile, Template
from kd.data.left_out import LeftOut, Reason
from kd.data.rows.example import IN_TEMPLATE, Example
from kd.data.rows.tables import RowLocation


@dataclass(frozen=True)
class Rendered:
    """Examples of one task."""

    examples: tuple[Example, ...]
    left_out: LeftOut
    """Rows that did not become examples."""
    drawn: bool = False
    """Whether a limit drew the rows that it kept, because they are in the order of their labels."""
    provenance: str = ""
    """Where the rows come from, in words."""


def options_text(choices: Sequence[str]) -> str:
    """The list of choices, `OPTIONS:\\n- a\\n- b`, without a line end after it."""
    return "OPTIONS:\n- " + "\n- ".join(choices)


def render_rows(
    task: TaskFile,
    rows: Sequence[Mapping[str, Any]],
    *,
    split: str,
    config: InstructionConfig,
    location: RowLocation,
    cap: int | None = None,
    first: int = 0,
    numbers: Sequence[int] | None = None,
    named: str | None = None,
) -> Rendered:
    """Examples of `rows` in their order; ids are `task/split/row`, counted from `first`.

    numbers   numbers of the rows at the source, where they are not `first`, `first + 1`, …
    named     name of the split in ids, where it is not `split`

    Rows that the task's rules leave out, that are too long, have no answer, or hold nothing in a field of their template are left
    out; then the first `cap` are kept, or drawn ones where the rows are in the order of their labels (`draws`). `rows` is read
    twice where references are grouped. Raises DataError for missing columns, an unknown label, a template index that does not
    exist, and where no row has an answer.
    """
    check_template_index(task, config)
    if config.labels == BOTH:
        raise DataError(
            "an example can have only one wording of its labels",
            where=task.name,
            found="--labels both",
            expected="original or flan; both is for kd eval --tasks choices",
        )
    templates = templates_in_use(task, config)
    numbers = range(first, first + len(rows)) if numbers is None else numbers
    ids = [f"{task.name}/{named or split}/{number}" for number in numbers]

    def location_of(index: int) -> str:
        return location(numbers[index])

    groups = grouped_references(task, rows, location_of, split)
    drawn = cap is not None and cap < len(rows) and first_rows_are_unlike(_labels(task, rows, location_of), cap)
    kept: dict[int, tuple[Mapping[str, Any], RowAnswers]] = {}
    left_out = LeftOut()
    seen = 0
    for index, row in ((n, rows[n]) for n in drawing_order(ids, config.data_seed)) if drawn else enumerate(rows):
        if cap is not None and len(kept) == cap:
            break
        seen += 1
        where = location_of(index)
        _check_columns(task, row, where)
        answers = _answers_or_reason(task, row, config, split, where)
        if isinstance(answers, RowAnswers):
            unknown = config.template == EACH or (drawn and config.template == "round-robin")
            chosen = templates if unknown else [templates[_template_index(templates, config, ids[index], len(kept))]]
            if _holds_nothing(task, chosen, row, where):
                answers = "null_value"
        if not isinstance(answers, RowAnswers):
            left_out.add(answers, ids[index])
            continue
        group = reference_group(task, row, where)
        kept[index] = (row, answers if group is None else replace(answers, references=groups[group]))
    left_out.add("beyond_limit", f"{task.name}/{named or split}", len(rows) - seen)
    examples: list[Example] = []
    for index in sorted(kept):
        row, answers = kept[index]
        for number, name in _templates_of_row(templates, config, ids[index], len(examples)):
            examples.append(_render(task, templates[number], row, answers, config, name, split, location_of(index)))
    if not examples and left_out.count("unlabelled"):
        raise DataError(
            "no row has an answer",
            where=location(first),
            found=f"{left_out.count('unlabelled')} unlabelled rows",
            expected="labels or references",
            try_="another --split",
        )
    return Rendered(tuple(examples), left_out, drawn)


def _answers_or_reason(
    task: TaskFile, row: Mapping[str, Any], config: InstructionConfig, split: str, where: str
) -> RowAnswers | Reason:
    """The answers of a row, or why it is left out. Raises DataError."""
    if (reason := left_out_for(task, row, where)) is not None:
        return reason
    try:
        answers = row_answers(task, row, config.labels, where, split)
    except NullValueError:
        return "null_value"
    if answers is None:
        return "unlabelled"
    return left_out_for_answer(task, row, answers, where) or answers


def _holds_nothing(task: TaskFile, templates: Sequence[Template], row: Mapping[str, Any], where: str) -> bool:
    """Whether a field that one of the templates names holds nothing in this row."""
    names = {name for template in templates for name in _used_fields(template)}
    return any(task.fields[name].holds_nothing(row, where) for name in names)


def templates_in_use(task: TaskFile, config: InstructionConfig) -> Sequence[Template]:
    """The templates of a task that the settings leave: all, the first few, or one without an instruction.

    Without an instruction a prompt holds the fields of template 0 that a row gives, one below the other.
    """
    if config.task_prompt == "template":
        return task.templates[: config.first_templates]
    names = [name for name in _used_fields(task.templates[0]) if task.fields[name].columns]
    inputs = "\n".join(f"{{{name}}}" for name in names)
    return [Template(f"[{task.title}] {inputs}" if config.task_prompt == "name" else inputs)]


def _labels(task: TaskFile, rows: Sequence[Mapping[str, Any]], location_of: RowLocation) -> list[str]:
    """The labels of all rows that have one; none where the answers are free text. Of a data set only that column is read."""
    column = task.choice_label
    if column is None:
        return []
    top = column.partition(".")[0]
    data_set: Any = rows
    seen = [{top: value} for value in data_set[top]] if hasattr(rows, "select_columns") else rows
    labels = (label_key(column_value(row, column, location_of(index))) for index, row in enumerate(seen))
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


def check_template_index(task: TaskFile, config: InstructionConfig) -> None:
    """Raise DataError where the settings name a template that the task does not have."""
    count = len(templates_in_use(task, config))
    if isinstance(config.template, int) and not 0 <= config.template < count:
        raise DataError(
            "no such template",
            where=task.name,
            found=config.template,
            expected=f"0..{count - 1}",
            try_=f"kd data templates {task.name}",
        )


def _templates_of_row(
    templates: Sequence[Template], config: InstructionConfig, identity: str, position: int
) -> list[tuple[int, str]]:
    """The numbers of the templates in which a row is rendered, each with the id of its example."""
    if config.template != EACH:
        return [(_template_index(templates, config, identity, position), identity)]
    return [(k, f"{identity}{IN_TEMPLATE}{k}") for k, template in enumerate(templates) if not template.inverted]


def _template_index(templates: Sequence[Template], config: InstructionConfig, identity: str, position: int) -> int:
    if isinstance(config.template, int):
        return config.template
    count = len(templates)
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
    return Example(
        identity,
        target,
        prompt,
        task.name,
        split,
        choices=texts,
        answer=answers.index,
        also_right=answers.also_right,
    )


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
    """The example row of a task in each of its templates; of a row that makes several examples, the first one.

    Raises DataError where the file has no such row.
    """
    if not task.example:
        raise DataError("the task file has no example row", where=task.path, expected="example: {column: value, …}")
    rows: Sequence[Mapping[str, Any]] = [task.example]

    def location(number: int) -> str:
        return f"{task.path} example row"

    if task.explode:
        rows = one_row_per_item(rows, task.explode, location)[0][:1]
    return [
        example
        for index in range(len(templates_in_use(task, config)))
        for example in render_rows(
            task, rows, split="example", config=replace(config, template=index), location=location
        ).examples
    ]
