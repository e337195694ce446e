"""A task is one YAML file: where its rows are, how a row becomes fields, and templates that turn fields into text.

`data/tasks/instructions/NAME.yaml` holds ours; any other path works too (`--data path/to/task.yaml`). Every key is checked
when the file is read, so that a misspelt field is an error that names the file and not a hole in a prompt.

    extends                    name of one of our tasks, whose keys are taken where this file has none
    about, clusters, flan      what it is; clusters and name in the FLAN registry (kd.data.tasks.clusters)
    hub, files, url            where rows come from: hub id, files beside the YAML or at an address, a page to get them from
    splits                     train, dev, test -> split at the source, with an optional slice `train[:90%]`
    fields                     name in templates -> column, `dotted.path`, or {column: …, join/numbered/replace/drop/wrap}
    labels | choices           the answer is one of fixed words | of texts in columns
    references                 the answer is free text: the column(s) of acceptable ones
    max_chars, cap             rows with a longer column are left out; then the first `cap` are kept (train only)
    keywords                   words that an answer has to use: a column that holds a list, or words between spaces
    metrics                    scores of a generated answer (kd.evaluation.answers.answer_metrics); accuracy where there are choices
    example                    one row, made up, to show templates without any data
    templates                  [{prompt, target: "{answer}", inverted: false, options: true}]

The vocabulary of field settings is small on purpose: no expressions, no code in data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import yaml

from kd.common.errors import DataError, unknown_name
from kd.data.tasks.clusters import flan_clusters
from kd.data.tasks.task import (
    ANSWER,
    MAX_INVERTED,
    SPLITS,
    WORDINGS,
    Choices,
    Field,
    Hub,
    Labels,
    SplitPart,
    TaskFile,
    Template,
    label_key,
    template_fields,
)


def task_names() -> tuple[str, ...]:
    """Names of the tasks that come with the package, sorted."""
    return tuple(
        sorted(
            f.name.removesuffix(".yaml")
            for f in package_files("kd.data.tasks.instructions").iterdir()
            if f.name.endswith(".yaml")
        )
    )


def load_task(name: str) -> TaskFile:
    """A task by its name, or by the path of a `.yaml` file. Raises DataError for an unknown name or a faulty file."""
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser()
        if not path.is_file():
            raise DataError("no such task file", where=name, expected="a YAML file", try_="kd data ls")
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("cannot read the task file", where=name, found=str(error)) from error
        return parse_task(text, path.stem, str(path))
    if name not in task_names():
        raise unknown_name("task", name, task_names(), try_="kd data ls, or the path of a .yaml file")
    return _own_task(name)


@cache
def _own_task(name: str) -> TaskFile:
    return parse_task(_own_text(name), name, f"{name}.yaml")


def _own_text(name: str) -> str:
    return (package_files("kd.data.tasks.instructions") / f"{name}.yaml").read_text(encoding="utf-8")


def parse_task(text: str, name: str, where: str) -> TaskFile:
    """Read and check the YAML `text`; `where` stands in messages. Raises DataError."""
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError("the task file is not YAML", where=where, found=" ".join(str(error).split())) from error
    read = _Reader(_extended(data, where), where)
    if re.fullmatch(r"[\w.-]+", name) is None:
        raise DataError("a task's name is its file's name", where=where, expected="letters, digits, _ . -")
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
    _check(task)
    return task


def _extended(data: Any, where: str) -> dict[Any, Any]:
    """The keys of the task that `extends` names, ours replacing them one by one."""
    base = (read := _Reader(data, where)).optional_text("extends")
    if base is None:
        return read.data
    if base not in task_names():
        raise unknown_name("task to extend", base, task_names(), where=where)
    return _extended(yaml.safe_load(_own_text(base)), base) | read.data


class _Reader:
    """Typed access to a mapping, with errors that name file and key."""

    def __init__(self, data: Any, where: str, known: Sequence[str] | None = None) -> None:
        self.where = where
        if not isinstance(data, dict):
            raise DataError("a mapping is missing", where=where, found=_kind(data), expected="keys and values")
        self.data: dict[Any, Any] = data
        for key in data:
            if key not in (known or KEYS):
                raise unknown_name("key in a task file", str(key), known or KEYS, where=where)

    def wrong(self, key: str, expected: str) -> DataError:
        return DataError(
            "a setting has the wrong type",
            where=f"{self.where} {key}",
            found=_kind(self.data.get(key)),
            expected=expected,
        )

    def optional_text(self, key: str) -> str | None:
        value = self.data.get(key)
        if value is not None and not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self.optional_text(key)
        if value is None and default is None:
            raise self.wrong(key, "a string")
        return value if value is not None else default or ""

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def texts(self, key: str) -> list[str]:
        value = self.data.get(key, [])
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.wrong(key, "a list of strings")
        return value

    def optional_size(self, key: str) -> int | None:
        value = self.data.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise self.wrong(key, "a number from 1")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.data.get(key, {})
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value):
            raise self.wrong(key, "a mapping")
        return value

    def mapping_of_texts(self, key: str) -> dict[str, str]:
        value = self.mapping(key)
        if not all(isinstance(v, str) for v in value.values()):
            raise self.wrong(key, "a mapping of strings")
        return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


def _hub(read: _Reader) -> Hub | None:
    if read.data.get("hub") is None:
        return None
    hub = _Reader(read.data["hub"], f"{read.where} hub", ("id", "config", "revision"))
    return Hub(hub.text("id"), hub.optional_text("config"), hub.optional_text("revision"))


def _splits(read: _Reader) -> dict[str, SplitPart]:
    parts = {}
    for key, value in (read.mapping_of_texts("splits") or {s: s for s in SPLITS}).items():
        found = re.fullmatch(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", value)
        if key not in SPLITS:
            raise unknown_name("split", key, SPLITS, where=f"{read.where} splits")
        if found is None:
            raise DataError(
                "not a split",
                where=f"{read.where} splits.{key}",
                found=value,
                expected="validation, train[:90%], train[-200:], …",
            )
        parts[key] = SplitPart(found[1], found[2] or "", found[3] or "")
    return parts


def _field(value: Any, where: str) -> Field:
    if isinstance(value, str):
        return Field((value,))
    read = _Reader(value, where, ("column", "columns", "join", "numbered", "replace", "drop", "wrap", "group"))
    columns = read.texts("columns") or [read.text("column")]
    wrap, drop = read.text("wrap", "{}"), read.optional_text("drop")
    if wrap.count("{}") != 1:
        raise DataError("a wrap has no place for the value", where=where, found=repr(wrap), expected="one {}")
    try:
        re.compile(drop or "")
    except re.error as error:
        raise DataError("not a regular expression", where=f"{where} drop", found=str(error)) from error
    return Field(
        tuple(columns),
        read.optional_text("join"),
        read.flag("numbered", False),
        tuple(read.mapping_of_texts("replace").items()),
        drop,
        wrap,
        read.optional_text("group"),
    )


def _labels(read: _Reader) -> Labels | None:
    if read.data.get("labels") is None:
        return None
    labels = _Reader(read.data["labels"], f"{read.where} labels", ("column", *WORDINGS))
    words: dict[str, tuple[tuple[str, str], ...]] = {}
    for wording in WORDINGS:
        given = labels.data.get(wording, labels.data.get("original"))
        if not isinstance(given, dict) or not all(isinstance(word, str) for word in given.values()) or len(given) < 2:
            raise DataError(
                "labels are a mapping from row values to words",
                where=f"{labels.where}.{wording}",
                found=repr(given),
                expected='{0: "entailment", 1: "neutral", …}, words in quotes',
            )
        words[wording] = tuple((label_key(key), word) for key, word in given.items())
    if {k for k, _ in words["flan"]} != {k for k, _ in words["original"]}:
        raise DataError(
            "the two wordings name different labels",
            where=labels.where,
            found=", ".join(k for k, _ in words["flan"]),
            expected=", ".join(k for k, _ in words["original"]),
        )
    return Labels(labels.text("column"), words)


def _choices(read: _Reader) -> Choices | None:
    if read.data.get("choices") is None:
        return None
    choices = _Reader(read.data["choices"], f"{read.where} choices", ("columns", "label"))
    columns = choices.texts("columns")
    if not columns:
        raise choices.wrong("columns", "a list of columns, or one column that holds a list")
    return Choices(tuple(columns), choices.text("label"))


def _sizes(read: _Reader) -> dict[str, int]:
    sizes = read.mapping("max_chars")
    if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in sizes.values()):
        raise read.wrong("max_chars", "column: characters")
    return sizes


def _templates(read: _Reader) -> Iterator[Template]:
    given = read.data.get("templates")
    if not isinstance(given, list) or not given:
        raise read.wrong("templates", "a list of at least one {prompt: …, target: …}")
    for index, item in enumerate(given):
        template = _Reader(item, f"{read.where} templates[{index}]", ("prompt", "target", "inverted", "options"))
        yield Template(
            template.text("prompt"),
            template.text("target", "{answer}"),
            template.flag("inverted", False),
            template.flag("options", True),
        )


def _check(task: TaskFile) -> None:
    """What the parts must be to each other."""
    kinds = [n for n in ("labels", "choices", "references") if getattr(task, n) is not None]
    if len(kinds) != 1:
        raise DataError(
            "a task has one kind of answer",
            where=task.path,
            found=", ".join(kinds) or "none",
            expected="one of labels, choices, references",
        )
    if ANSWER in task.fields:
        raise DataError(
            "a field cannot be called answer",
            where=f"{task.path} fields",
            expected="another name",
            try_="labels, choices or references make {answer}",
        )
    for index, template in enumerate(task.templates):
        place = f"{task.path} templates[{index}]"
        for text in (template.prompt, template.target):
            for name in template_fields(text, place):
                if name not in (*task.fields, ANSWER):
                    raise unknown_name("field in a template", name, (*task.fields, ANSWER), where=place)
        answers = ANSWER in template_fields(template.target, place)
        if answers == template.inverted:
            raise DataError(
                "the target of a template does not fit its kind",
                where=place,
                found=template.target,
                expected="no {answer} (inverted)" if answers else "{answer}, or inverted: true",
            )
        if not answers and not template_fields(template.target, place):
            raise DataError("the target of a template is always the same", where=place, found=template.target)
        if not template.inverted and ANSWER in template_fields(template.prompt, place):
            raise DataError(
                "a prompt gives the answer away",
                where=place,
                found=template.prompt,
                expected="no {answer} in a prompt that is not inverted",
            )
    registry = flan_clusters()
    for cluster in task.clusters:
        if cluster not in registry.clusters:
            raise unknown_name("cluster", cluster, registry.clusters, where=f"{task.path} clusters")
    if task.flan is not None and not registry.clusters_of(task.flan) <= set(task.clusters):
        raise DataError(
            "a task of FLAN lacks a cluster",
            where=f"{task.path} clusters",
            found=", ".join(task.clusters),
            expected=", ".join(sorted(registry.clusters_of(task.flan))),
        )
    inverted = sum(t.inverted for t in task.templates)
    if inverted > MAX_INVERTED or inverted == len(task.templates):
        raise DataError(
            "too many inverted templates",
            where=task.path,
            found=f"{inverted} of {len(task.templates)}",
            expected=f"at most {MAX_INVERTED}, and one that is not",
        )
    if task.keywords is not None and task.has_choices:
        raise DataError(
            "keywords are for answers in free text",
            where=f"{task.path} keywords",
            expected="references, not labels or choices",
        )
    for name, field in task.fields.items():
        if field.group is not None:
            raise DataError(
                "only references are grouped", where=f"{task.path} fields.{name}", found=f"group: {field.group}"
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
