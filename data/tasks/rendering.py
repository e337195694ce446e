"""Rows of a task become examples: fields are read, a template is chosen, options and the answer are put in words.

Which template an example gets depends on (seed, example id) alone: not on its neighbours, the limit, or the order,
and not on the Python version (a keyed digest, no generator state). `round-robin` takes them in turn, as the FLAN code
does; a number takes that one for every example, as evaluations do (index 0).

The suffix that lists the choices is FLAN's (Wei et al. 2022, arXiv:2109.01652, section 2.2): `OPTIONS:\\n- a\\n- b`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from kd.common.errors import DataError
from kd.data.data_settings import BOTH, InstructionConfig
from kd.data.rows.example import Example
from kd.data.tasks.task import ANSWER, Field, TaskFile, Template, column_value, fill, label_key

UNLABELLED = ("-1", "none", "")
"""Label values that say: nobody labelled this row."""


@dataclass(frozen=True)
class Rendered:
    """Examples of one task and what became of the rows."""

    examples: tuple[Example, ...]
    too_long: int = 0
    """Rows left out by `max_chars`."""
    unlabelled: int = 0
    """Rows without an answer."""


def keyed(seed: int, *parts: str | int) -> int:
    """A 256-bit number that depends on the seed and the parts, and on nothing else."""
    digest = hashlib.blake2b(digest_size=32, key=str(seed).encode()[:64])
    for part in parts:
        data = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little")


def options_text(choices: Sequence[str]) -> str:
    """`OPTIONS:\\n- a\\n- b`, no line end after it."""
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

    Too long and unlabelled rows are left out, then the first `cap` are kept; `rows` is gone through twice where
    references are grouped. Raises DataError where columns are missing, a label is not in the list, the template index
    does not exist, or no row has an answer.
    """
    check_template_index(task, config)
    if config.labels == BOTH:
        raise DataError(
            "examples are worded one way at a time",
            where=task.name,
            found="--labels both",
            expected="original or flan; both is for kd eval --tasks choices",
        )
    grouped = _grouped_references(task, rows, where) if task.references is not None and task.references.group else None
    examples: list[Example] = []
    too_long = unlabelled = 0
    for number, row in enumerate(rows, first):
        if cap is not None and len(examples) == cap:
            break
        place = f"{where} row {number}"
        missing = [c for c in task.columns if c not in row]
        if missing:
            raise DataError(
                "columns are missing",
                where=place,
                found=", ".join(map(str, row)) or "none",
                expected=", ".join(missing),
                try_="rows in the columns of the task's file: kd data templates TASK",
            )
        if _too_long(task, row, place):
            too_long += 1
            continue
        answers = _answers(task, row, config, place)
        if answers is None:
            unlabelled += 1
            continue
        if grouped is not None and task.references is not None:
            answers = _Answers(answers.texts, None, grouped[_group(task, row, place)])
        identity = f"{task.name}/{split}/{number}"
        template = task.templates[_template_index(task, config, identity, len(examples))]
        examples.append(_render(task, template, row, answers, config, identity, split, place))
    if not examples and unlabelled:
        raise DataError(
            "no row has an answer",
            where=where,
            found=f"{unlabelled} unlabelled rows",
            expected="labels or references",
            try_="another --split",
        )
    return Rendered(tuple(examples), too_long, unlabelled)


def _too_long(task: TaskFile, row: Mapping[str, Any], place: str) -> bool:
    values = ((column_value(row, column, place), size) for column, size in task.max_chars.items())
    return any(isinstance(value, str) and len(value) > size for value, size in values)


def check_template_index(task: TaskFile, config: InstructionConfig) -> None:
    """Raise DataError where a single template is asked for that the task does not have."""
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


@dataclass(frozen=True)
class _Answers:
    texts: tuple[str, ...]
    """Choices, or references."""
    index: int | None
    """Of the right choice; None for references."""
    references: tuple[str, ...] = ()

    @property
    def right(self) -> str:
        return self.texts[self.index or 0]


def _answers(task: TaskFile, row: Mapping[str, Any], config: InstructionConfig, place: str) -> _Answers | None:
    """The row's answers; None where it has none."""
    if task.references is not None:
        texts = _reference_texts(task.references, row, place)
        return _Answers(texts, None, texts) if texts else None
    if task.labels is not None:
        key, pairs = label_key(column_value(row, task.labels.column, place)), task.labels.words[config.labels]
        keys, words = [k for k, _ in pairs], tuple(word for _, word in pairs)
        column = task.labels.column
    else:
        assert task.choices is not None
        words = tuple(_choice_texts(task, row, place))
        column, keys = task.choices.label, [str(i) for i in range(len(words))]
        key = label_key(column_value(row, column, place))
    if key not in keys:
        if key in UNLABELLED:
            return None
        raise DataError(
            "a label is not in the task's list",
            where=f"{place} column {column}",
            found=key,
            expected=", ".join(keys) + " (-1 or empty: unlabelled)",
        )
    return _Answers(words, keys.index(key))


def _choice_texts(task: TaskFile, row: Mapping[str, Any], place: str) -> list[str]:
    assert task.choices is not None
    texts: list[str] = []
    for column in task.choices.columns:
        value = Field((column,)).read(row, place)
        texts += [value] if isinstance(value, str) else value
    return texts


def _reference_texts(references: Field, row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """The row's references, each once; none where there is no text."""
    if all(column_value(row, column, place) is None for column in references.columns):
        return ()
    value = references.read(row, place)
    return tuple(dict.fromkeys(t for t in ([value] if isinstance(value, str) else value) if t.strip()))


def _group(task: TaskFile, row: Mapping[str, Any], place: str) -> str:
    assert task.references is not None
    assert task.references.group is not None
    return str(column_value(row, task.references.group, place))


def _grouped_references(task: TaskFile, rows: Iterable[Mapping[str, Any]], where: str) -> dict[str, tuple[str, ...]]:
    """Group value -> references of all rows that have it, in the rows' order, each once."""
    assert task.references is not None
    found: dict[str, dict[str, None]] = {}
    for number, row in enumerate(rows):
        place = f"{where} row {number}"
        texts = found.setdefault(_group(task, row, place), {})
        texts |= dict.fromkeys(_reference_texts(task.references, row, place))
    return {key: tuple(texts) for key, texts in found.items()}


def _render(
    task: TaskFile,
    template: Template,
    row: Mapping[str, Any],
    answers: _Answers,
    config: InstructionConfig,
    identity: str,
    split: str,
    place: str,
) -> Example:
    values: dict[str, str] = {}
    for name, field in task.fields.items():
        value = field.read(row, place)
        if not isinstance(value, str):
            raise DataError(
                "a field is a list",
                where=f"{place} field {name}",
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
            keywords=() if task.keywords is None else _keywords(task.keywords, row, place),
        )
    if template.options and config.options is not False:
        prompt = f"{prompt}\n\n{options_text(answers.texts)}"
    return Example(identity, target, prompt, task.name, split, choices=texts, answer=answers.index)


def _keywords(field: Field, row: Mapping[str, Any], place: str) -> tuple[str, ...]:
    """The words of a list, or of a text between white space."""
    value = field.read(row, place)
    return tuple(value.split() if isinstance(value, str) else value)


def show_templates(task: TaskFile, config: InstructionConfig) -> list[Example]:
    """Every template on the task file's own example row; raises DataError where there is no such row."""
    if not task.example:
        raise DataError("the task file has no example row", where=task.path, expected="example: {column: value, …}")
    return [
        example
        for index in range(len(task.templates))
        for example in render_rows(
            task, [task.example], split="example", config=replace(config, template=index), where=f"{task.path} example"
        ).examples
    ]
