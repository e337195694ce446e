"""Turn the rows of a task into examples: read the fields, choose a template, and put options and answer into words.

The template of an example depends only on (seed, example id): not on its neighbours, the limit, the order, or the Python
version, because a keyed digest chooses it. `round-robin` uses the templates in turn, as the FLAN code does; a number uses
one template for every example, as evaluations do (index 0).

The suffix that lists the choices is FLAN's (Wei et al. 2022, arXiv:2109.01652, section 2.2): `OPTIONS:\\n- a\\n- b`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kd.common.errors import DataError
from kd.data.data_settings import BOTH, InstructionConfig
from kd.data.instruction_tasks.row_answers import RowAnswers, grouped_references, reference_group, row_answers
from kd.data.instruction_tasks.task import ANSWER, Field, TaskFile, Template, column_value, fill
from kd.data.rows.example import Example


@dataclass(frozen=True)
class Rendered:
    """Examples of one task, and how many rows were left out."""

    examples: tuple[Example, ...]
    too_long: int = 0
    """Number of rows left out by `max_chars`."""
    unlabelled: int = 0
    """Number of rows left out because they have no answer."""


def keyed(seed: int, *parts: str | int) -> int:
    """A 256-bit number that depends only on the seed and the parts."""
    digest = hashlib.blake2b(digest_size=32, key=str(seed).encode()[:64])
    for part in parts:
        data = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def options_text(choices: Sequence[str]) -> str:
    """The list of choices, `OPTIONS:\\n- a\\n- b`, without a line end after it."""
    return "OPTIONS:\n- " + "\n- ".join(choices)


def render_rows(
    task: TaskFile,
    rows: Iterable[Mapping[str, Any]],
    *,
    split: str,
    config: InstructionConfig,
    where: str,
    cap: int | None = None,
    first: int = 0,
) -> Rendered:
    """Examples of `rows` in their order; ids are `task/split/row`, counted from `first`.

    Rows that are too long or have no answer are left out; then the first `cap` are kept. `rows` is read twice where
    references are grouped. Raises DataError for missing columns, an unknown label, a template index that does not exist,
    and where no row has an answer.
    """
    check_template_index(task, config)
    if config.labels == BOTH:
        raise DataError(
            "an example can have only one wording of its labels",
            where=task.name,
            found="--labels both",
            expected="original or flan; both is for kd eval --tasks choices",
        )
    groups = grouped_references(task, rows, where)
    examples: list[Example] = []
    too_long = unlabelled = 0
    for number, row in enumerate(rows, first):
        if cap is not None and len(examples) == cap:
            break
        row_where = f"{where} row {number}"
        missing = [c for c in task.columns if c not in row]
        if missing:
            raise DataError(
                "columns are missing",
                where=row_where,
                found=", ".join(map(str, row)) or "none",
                expected=", ".join(missing),
                try_="rows in the columns of the task's file: kd data templates TASK",
            )
        if _too_long(task, row, row_where):
            too_long += 1
            continue
        answers = row_answers(task, row, config.labels, row_where)
        if answers is None:
            unlabelled += 1
            continue
        group = reference_group(task, row, row_where)
        if group is not None:
            answers = replace(answers, references=groups[group])
        identity = f"{task.name}/{split}/{number}"
        template = task.templates[_template_index(task, config, identity, len(examples))]
        examples.append(_render(task, template, row, answers, config, identity, split, row_where))
    if not examples and unlabelled:
        raise DataError(
            "no row has an answer",
            where=where,
            found=f"{unlabelled} unlabelled rows",
            expected="labels or references",
            try_="another --split",
        )
    return Rendered(tuple(examples), too_long, unlabelled)


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
    for name, field in task.fields.items():
        value = field.read(row, where)
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
            task, [task.example], split="example", config=replace(config, template=index), where=f"{task.path} example"
        ).examples
    ]
