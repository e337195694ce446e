"""Read a task's YAML file: where its rows are, how a row becomes fields, and templates that turn fields into text.

The package's tasks are in `data/instruction_tasks/instructions/CLUSTER/NAME.yaml`; `--data path/to/task.yaml` reads any other
file. Every key is checked when the file is read, so a misspelt field is an error that names the file, not a hole in a prompt.

    extends                    a task of the package; its keys are used where this file has none
    about, clusters, flan      a line about the task; its clusters and its name in the FLAN registry (see `clusters`)
    hub, files, url            where rows come from: a hub id, files beside the YAML or at addresses, a page to get them from
    made                       or the rule that makes them (kd.data.demo.mini_flan)
    rows, licence, sure        facts about the source: rows of its splits, licence, how sure these are (A, B or C)
    explode, shuffle           one example per item of these lists; the seed of an order other than the source's
    splits, flan_splits        train, dev, test -> split at the source, with an optional slice `train[:90%]`; those of FLAN
    where, where_not           column -> regular expression: only rows in which it is found, or is not found, are kept
    fields                     name in templates -> column, `dotted.path`, or {column: …} with rules (see `row_field`)
    labels | choices           the answer is one of fixed words | one of the texts in columns
    references, target         the answer is free text: the column(s) of acceptable answers; the one to learn, if another
    differs                    fields that must not equal the answer
    max_chars, cap             rows with a longer column are left out; then the first `cap` are kept (train only)
    keywords                   words that an answer has to use: a column that holds a list, or words between spaces
    metrics                    scores of a generated answer (kd.evaluation.answers.answer_metrics); accuracy with choices
    example                    a made-up row, which shows the templates without any data
    templates                  [{prompt, target: "{answer}", inverted: false, options: true}]

Fields have few settings on purpose: a data file holds no expressions and no code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.common.strangers.yaml_file import parse_mapping, read_mapping
from kd.data.instruction_tasks.task import SPLITS, SplitPart, TaskFile
from kd.data.instruction_tasks.task_parts import (
    fixed_labels,
    hub_data_set,
    optional_field,
    patterns,
    row_choices,
    sizes,
    split_parts,
    task_field,
    templates_of,
)
from kd.data.instruction_tasks.task_rules import check_task
from kd.data.instruction_tasks.typed_mapping import TypedMapping

MINI = "mini_"
"""Beginning of the names of the tasks that are made up by rules."""


def task_names() -> tuple[str, ...]:
    """Names of the real tasks that come with the package, sorted."""
    return tuple(sorted(name for name in _packaged_files() if not name.startswith(MINI)))


def mini_task_names() -> tuple[str, ...]:
    """Names of the tasks of `mini-flan`, which are made up by rules, sorted."""
    return tuple(sorted(name for name in _packaged_files() if name.startswith(MINI)))


@cache
def _packaged_files() -> Mapping[str, Traversable]:
    """Name of a task -> its file. They lie in a folder per cluster."""
    root = package_files("kd.data.instruction_tasks.instructions")
    folders = [entry for entry in root.iterdir() if entry.is_dir()]
    files = [file for folder in folders for file in folder.iterdir() if file.name.endswith(".yaml")]
    return {file.name.removesuffix(".yaml"): file for file in files}


def load_task(name: str) -> TaskFile:
    """A task by name, or by the path of a `.yaml` file. Raises DataError for an unknown name or a faulty file."""
    if name.endswith((".yaml", ".yml")):
        path = as_path(name)
        if not path.exists():
            raise DataError("no such task file", where=name, expected="a YAML file", try_="kd data ls")
        return task_of(read_mapping(path, "task file"), path.stem, str(path))
    if name not in _packaged_files():
        raise unknown_name("task", name, task_names(), try_="kd data ls, or the path of a .yaml file")
    return _packaged_task(name)


@cache
def _packaged_task(name: str) -> TaskFile:
    return parse_task(_packaged_text(name), name, f"{name}.yaml")


def _packaged_text(name: str) -> str:
    return _packaged_files()[name].read_text(encoding="utf-8")


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
        hub=hub_data_set(read),
        files=read.mapping_of_lists("files"),
        url=read.optional_text("url"),
        splits=split_parts(read, "splits") or {split: SplitPart(split) for split in SPLITS},
        fields={key: task_field(value, f"{where} fields.{key}") for key, value in read.mapping("fields").items()},
        labels=fixed_labels(read),
        choices=row_choices(read),
        references=optional_field(read, "references"),
        keywords=optional_field(read, "keywords"),
        max_chars=sizes(read, "max_chars", "column: characters"),
        cap=read.optional_size("cap"),
        metrics=tuple(read.texts("metrics")),
        example=read.mapping("example"),
        templates=tuple(templates_of(read)),
        target=optional_field(read, "target"),
        where=patterns(read, "where"),
        where_not=patterns(read, "where_not"),
        differs=tuple(read.texts("differs")),
        shuffle=read.optional_seed("shuffle"),
        explode=tuple(read.texts("explode")),
        flan_splits=split_parts(read, "flan_splits"),
        rows=sizes(read, "rows", "split at the source: number of rows"),
        licence=read.optional_text("licence"),
        sure=read.optional_text("sure"),
        made=read.optional_text("made"),
    )
    check_task(task)
    return task


def _extended(data: Any, where: str) -> dict[Any, Any]:
    """The keys of the file, added to those of the task that it extends."""
    base = (read := TypedMapping(data, where, KEYS)).optional_text("extends")
    if base is None:
        return read.data
    if base not in _packaged_files():
        raise unknown_name("task to extend", base, task_names(), where=where)
    inherited = _extended(parse_mapping(_packaged_text(base), "task file", base), base)
    if read.data.get("files") and "splits" not in read.data:  # the slices of its data set do not hold for other files
        inherited["splits"] = {name: name for name in inherited.get("splits", SPLITS)}
        for key in ("flan_splits", "rows"):
            inherited.pop(key, None)
    return inherited | read.data


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
    "target",
    "where",
    "where_not",
    "differs",
    "shuffle",
    "explode",
    "flan_splits",
    "rows",
    "licence",
    "sure",
    "made",
)
"""Keys of a task file."""
