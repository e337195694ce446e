"""Read a task's YAML file: where its rows are, how a row becomes fields, and templates that turn fields into text.

The package's tasks are in `data/instruction_tasks/instructions/NAME.yaml`; `--data path/to/task.yaml` reads any other
file. Every key is checked when the file is read, so a misspelt field is an error that names the file, not a hole in a prompt.

    extends                    a task of the package; its keys are used where this file has none
    about, clusters, flan      a line about the task; its clusters and its name in the FLAN registry (see `clusters`)
    hub, files, url            where rows come from: a hub id, files beside the YAML or at an address, a page to get them from
    splits                     train, dev, test -> split at the source, with an optional slice `train[:90%]`
    fields                     name in templates -> column, `dotted.path`, or {column: …, join/numbered/replace/drop/wrap}
    labels | choices           the answer is one of fixed words | one of the texts in columns
    references                 the answer is free text: the column(s) of acceptable answers
    max_chars, cap             rows with a longer column are left out; then the first `cap` are kept (train only)
    keywords                   words that an answer has to use: a column that holds a list, or words between spaces
    metrics                    scores of a generated answer (kd.evaluation.answers.answer_metrics); accuracy with choices
    example                    a made-up row, which shows the templates without any data
    templates                  [{prompt, target: "{answer}", inverted: false, options: true}]

Fields have few settings on purpose: a data file holds no expressions and no code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files as package_files
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.common.strangers.yaml_file import parse_mapping, read_mapping
from kd.data.instruction_tasks.task import (
    SPLITS,
    WORDINGS,
    Choices,
    Field,
    HubDataset,
    Labels,
    SplitPart,
    TaskFile,
    Template,
    label_key,
)
from kd.data.instruction_tasks.task_rules import check_task
from kd.data.instruction_tasks.text_rules import check_pattern
from kd.data.instruction_tasks.typed_mapping import TypedMapping

HUB_ID = re.compile(r"(?!\.)[\w.-]{1,96}(/(?!\.)[\w.-]{1,96})?")
"""Ids of data sets; a path, which `datasets` would read as one, is none."""


def task_names() -> tuple[str, ...]:
    """Names of the tasks that come with the package, sorted."""
    return tuple(
        sorted(
            f.name.removesuffix(".yaml")
            for f in package_files("kd.data.instruction_tasks.instructions").iterdir()
            if f.name.endswith(".yaml")
        )
    )


def load_task(name: str) -> TaskFile:
    """A task by name, or by the path of a `.yaml` file. Raises DataError for an unknown name or a faulty file."""
    if name.endswith((".yaml", ".yml")):
        path = as_path(name)
        if not path.exists():
            raise DataError("no such task file", where=name, expected="a YAML file", try_="kd data ls")
        return task_of(read_mapping(path, "task file"), path.stem, str(path))
    if name not in task_names():
        raise unknown_name("task", name, task_names(), try_="kd data ls, or the path of a .yaml file")
    return _packaged_task(name)


@cache
def _packaged_task(name: str) -> TaskFile:
    return parse_task(_packaged_text(name), name, f"{name}.yaml")


def _packaged_text(name: str) -> str:
    return (package_files("kd.data.instruction_tasks.instructions") / f"{name}.yaml").read_text(encoding="utf-8")


def parse_task(text: str, name: str, where: str) -> TaskFile:
    """A task from YAML text, checked. `where` names the file in errors. Raises DataError."""
    return task_of(parse_mapping(text, "task file", where), name, where)


def task_of(data: Mapping[Any, Any], name: str, where: str) -> TaskFile:
    """A task from the keys of its file, checked. `where` names the file in errors. Raises DataError."""
    read = TypedMapping(_extended(data, where), where, KEYS)
    if re.fullmatch(r"[\w.-]+", name) is None:
        raise DataError("the file's name is not a task name", where=where, expected="letters, digits, _ . -")
    task = TaskFile(
        name=name,
        about=read.text("about", ""),
        path=where,
        clusters=tuple(read.texts("clusters")),
        flan=read.optional_text("flan"),
        hub=_hub(read),
        files=read.mapping_of_texts("files"),
        url=read.optional_text("url"),
        splits=_splits(read),
        fields={key: _field(value, f"{where} fields.{key}") for key, value in read.mapping("fields").items()},
        labels=_labels(read),
        choices=_choices(read),
        references=None
        if read.data.get("references") is None
        else _field(read.data["references"], f"{where} references"),
        keywords=None if read.data.get("keywords") is None else _field(read.data["keywords"], f"{where} keywords"),
        max_chars=_sizes(read),
        cap=read.optional_size("cap"),
        metrics=tuple(read.texts("metrics")),
        example=read.mapping("example"),
        templates=tuple(_templates(read)),
    )
    check_task(task)
    return task


def _extended(data: Any, where: str) -> dict[Any, Any]:
    """The keys of the file, added to those of the task that it extends."""
    base = (read := TypedMapping(data, where, KEYS)).optional_text("extends")
    if base is None:
        return read.data
    if base not in task_names():
        raise unknown_name("task to extend", base, task_names(), where=where)
    inherited = _extended(parse_mapping(_packaged_text(base), "task file", base), base)
    if read.data.get("files") and "splits" not in read.data:  # the slices of its data set do not hold for other files
        inherited["splits"] = {name: name for name in inherited.get("splits", SPLITS)}
    return inherited | read.data


def _hub(read: TypedMapping) -> HubDataset | None:
    if read.data.get("hub") is None:
        return None
    hub = TypedMapping(read.data["hub"], f"{read.where} hub", ("id", "config", "revision"))
    if HUB_ID.fullmatch(hub.text("id")) is None:
        raise DataError(
            "not the id of a data set on the hub",
            where=hub.where,
            found=repr(hub.text("id"))[:80],
            expected="OWNER/NAME or NAME",
        )
    return HubDataset(hub.text("id"), hub.optional_text("config"), hub.optional_text("revision"))


def _splits(read: TypedMapping) -> dict[str, SplitPart]:
    parts = {}
    for key, value in (read.mapping_of_texts("splits") or {s: s for s in SPLITS}).items():
        parsed = re.fullmatch(r"([\w.-]+)(?:\[(-?\d{1,12}%?)?:(-?\d{1,12}%?)?\])?", value)
        if key not in SPLITS:
            raise unknown_name("split", key, SPLITS, where=f"{read.where} splits")
        if parsed is None:
            raise DataError(
                "not a split",
                where=f"{read.where} splits.{key}",
                found=value,
                expected="validation, train[:90%], train[-200:], …",
            )
        parts[key] = SplitPart(parsed[1], parsed[2] or "", parsed[3] or "")
    return parts


def _field(value: Any, where: str) -> Field:
    if isinstance(value, str):
        return Field((value,))
    read = TypedMapping(value, where, ("column", "columns", "join", "numbered", "replace", "drop", "wrap", "group"))
    columns = read.texts("columns") or [read.text("column")]
    wrap, drop = read.text("wrap", "{}"), read.optional_text("drop")
    if wrap.count("{}") != 1:
        raise DataError(
            "a wrap must contain {} once, where the value goes", where=where, found=repr(wrap), expected="one {}"
        )
    if drop is not None:
        check_pattern(drop, f"{where} drop")
    return Field(
        tuple(columns),
        read.optional_text("join"),
        read.flag("numbered", False),
        tuple(read.mapping_of_texts("replace").items()),
        drop,
        wrap,
        read.optional_text("group"),
    )


def _labels(read: TypedMapping) -> Labels | None:
    if read.data.get("labels") is None:
        return None
    labels = TypedMapping(read.data["labels"], f"{read.where} labels", ("column", *WORDINGS))
    words: dict[str, tuple[tuple[str, str], ...]] = {}
    for wording in WORDINGS:
        pairs = labels.data.get(wording, labels.data.get("original"))
        if not isinstance(pairs, dict) or not all(isinstance(word, str) for word in pairs.values()) or len(pairs) < 2:
            raise DataError(
                "labels are a mapping from row values to words",
                where=f"{labels.where}.{wording}",
                found=repr(pairs),
                expected='{0: "entailment", 1: "neutral", …}, words in quotes',
            )
        words[wording] = tuple((label_key(key), word) for key, word in pairs.items())
    if {k for k, _ in words["flan"]} != {k for k, _ in words["original"]}:
        raise DataError(
            "the two wordings list different labels",
            where=labels.where,
            found=", ".join(k for k, _ in words["flan"]),
            expected=", ".join(k for k, _ in words["original"]),
        )
    return Labels(labels.text("column"), words)


def _choices(read: TypedMapping) -> Choices | None:
    if read.data.get("choices") is None:
        return None
    choices = TypedMapping(read.data["choices"], f"{read.where} choices", ("columns", "label"))
    columns = choices.texts("columns")
    if not columns:
        raise choices.wrong("columns", "a list of columns, or one column that holds a list")
    return Choices(tuple(columns), choices.text("label"))


def _sizes(read: TypedMapping) -> dict[str, int]:
    sizes = read.mapping("max_chars")
    if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in sizes.values()):
        raise read.wrong("max_chars", "column: characters")
    return sizes


def _templates(read: TypedMapping) -> Iterator[Template]:
    items = read.data.get("templates")
    if not isinstance(items, list) or not items:
        raise read.wrong("templates", "a list of at least one {prompt: …, target: …}")
    for index, item in enumerate(items):
        template = TypedMapping(item, f"{read.where} templates[{index}]", ("prompt", "target", "inverted", "options"))
        yield Template(
            template.text("prompt"),
            template.text("target", "{answer}"),
            template.flag("inverted", False),
            template.flag("options", True),
        )


KEYS = (
    "extends",
    "about",
    "clusters",
    "flan",
    "hub",
    "files",
    "url",
    "splits",
    "fields",
    "labels",
    "choices",
    "references",
    "keywords",
    "max_chars",
    "cap",
    "metrics",
    "example",
    "templates",
)
"""Keys of a task file."""
