"""Read the parts of a task's YAML file: where rows are, fields, labels, choices, splits and templates.

Each function takes the typed mapping of the file and returns one part, or raises DataError that names the file and the key.
`kd.data.instruction_tasks.task_files` puts the parts together.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.data.instruction_tasks.row_reading.row_field import Field, label_key
from kd.data.instruction_tasks.task import SPLITS, WORDINGS, Choices, HubDataset, Labels, SplitPart, Template
from kd.data.instruction_tasks.text_rules import check_pattern
from kd.data.instruction_tasks.typed_mapping import TypedMapping

HUB_ID = re.compile(r"(?!\.)[\w.-]{1,96}(/(?!\.)[\w.-]{1,96})?")
"""Ids of data sets; a path, which `datasets` would read as one, is none."""
RULES = ("replace", "drop", "wrap", "unescape", "lower", "before", "after")
"""Keys of a field, and of choices, that change a text."""
FIELD_KEYS = (
    *("column", "columns", "text", "join", "inner_join", "numbered", "first", *RULES),
    *("group", "alternatives", "empty"),
)
CHOICE_KEYS = ("columns", "label", "keys", "first", "right", "beginning", "ending", "count", *RULES)


def hub_data_set(read: TypedMapping) -> HubDataset | None:
    """`hub: {id, config, revision, files}`."""
    if read.data.get("hub") is None:
        return None
    hub = TypedMapping(read.data["hub"], f"{read.where} hub", ("id", "config", "revision", "files"))
    if HUB_ID.fullmatch(hub.text("id")) is None:
        raise DataError(
            "not the id of a data set on the hub",
            where=hub.where,
            found=repr(hub.text("id"))[:80],
            expected="OWNER/NAME or NAME",
        )
    files = hub.mapping_of_lists("files")
    for path in (path for paths in files.values() for path in paths):
        if "://" in path or path.startswith(("/", "~")) or ".." in path.split("/"):
            raise DataError(
                "not a path in a repository of the hub",
                where=f"{hub.where} files",
                found=path[:80],
                expected="FOLDER/NAME.parquet, or a glob",
                try_="files: {SPLIT: ADDRESS}, beside hub",
            )
    if files and hub.optional_text("config") is not None:
        raise DataError(
            "files of a repository and one of its configurations are two ways to say the same",
            where=hub.where,
            found="config and files",
            expected="one of the two",
        )
    return HubDataset(hub.text("id"), hub.optional_text("config"), hub.optional_text("revision"), files)


def split_parts(read: TypedMapping, key: str) -> dict[str, SplitPart]:
    """`splits: {train: "train[:90%]", …}`; empty where the key is absent."""
    parts = {}
    for name, value in read.mapping_of_texts(key).items():
        parsed = re.fullmatch(r"([\w.-]+)(?:\[(-?\d{1,12}%?)?:(-?\d{1,12}%?)?\])?", value)
        if name not in SPLITS:
            raise unknown_name("split", name, SPLITS, where=f"{read.where} {key}")
        if parsed is None:
            raise DataError(
                "not a split",
                where=f"{read.where} {key}.{name}",
                found=value,
                expected="validation, train[:90%], train[-200:], …",
            )
        parts[name] = SplitPart(parsed[1], parsed[2] or "", parsed[3] or "")
    return parts


def task_field(value: Any, where: str) -> Field:
    """A column by name, or a mapping with a column and rules."""
    if isinstance(value, str):
        return Field((value,))
    read = TypedMapping(value, where, FIELD_KEYS)
    constant = read.optional_text("text")
    named = read.texts("columns")
    columns = named if named or constant is not None else [read.text("column")]
    if constant is not None and set(read.data) - {"text", "wrap"}:
        raise DataError("a text that is the same for every row has no column", where=where, found=", ".join(read.data))
    if read.data.get("before") is not None and read.data.get("after") is not None:
        raise DataError("a text is cut at one mark", where=where, found="before and after", expected="one of the two")
    alternatives = read.texts("alternatives")
    for name in alternatives:
        if name not in SPLITS:
            raise unknown_name("split", name, SPLITS, where=f"{where} alternatives")
    return Field(
        tuple(columns),
        read.optional_text("join"),
        read.flag("numbered", False),
        group=read.optional_text("group"),
        text=constant,
        inner_join=read.optional_text("inner_join"),
        first=read.optional_size("first"),
        alternatives=tuple(alternatives),
        empty=read.optional_text("empty"),
        **_rules(read),
    )


def optional_field(read: TypedMapping, key: str) -> Field | None:
    """The field under a key, or None where the key is absent."""
    return None if read.data.get(key) is None else task_field(read.data[key], f"{read.where} {key}")


def _rules(read: TypedMapping) -> dict[str, Any]:
    """The rules that change a text, as arguments of `Field`."""
    wrap, drop = read.text("wrap", "{}"), read.optional_text("drop")
    if wrap.count("{}") != 1:
        raise DataError(
            "a wrap must contain {} once, where the value goes", where=read.where, found=repr(wrap), expected="one {}"
        )
    if drop is not None:
        check_pattern(drop, f"{read.where} drop")
    for key in ("before", "after"):
        if read.data.get(key) == "":
            raise read.wrong(key, "a mark of at least one character")
    return {
        "replace": tuple(read.mapping_of_texts("replace").items()),
        "drop": drop,
        "wrap": wrap,
        "unescape": read.flag("unescape", False),
        "lower": read.flag("lower", False),
        "before": read.optional_text("before"),
        "after": read.optional_text("after"),
    }


def fixed_labels(read: TypedMapping) -> Labels | None:
    """`labels: {column, original, flan, round, skip}`."""
    if read.data.get("labels") is None:
        return None
    labels = TypedMapping(read.data["labels"], f"{read.where} labels", ("column", "round", "skip", *WORDINGS))
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
    skip = labels.data.get("skip", [])
    if not isinstance(skip, list) or any(isinstance(value, list | dict) for value in skip):
        raise labels.wrong("skip", "a list of row values")
    return Labels(labels.text("column"), words, labels.flag("round", False), tuple(label_key(v) for v in skip))


def row_choices(read: TypedMapping) -> Choices | None:
    """`choices: {columns, label, …}`."""
    if read.data.get("choices") is None:
        return None
    choices = TypedMapping(read.data["choices"], f"{read.where} choices", CHOICE_KEYS)
    columns = choices.texts("columns")
    if not columns:
        raise choices.wrong("columns", "a list of columns, or one column that holds a list")
    right, keys = choices.optional_text("right"), choices.optional_text("keys")
    label = choices.text("label") if right is None else choices.optional_text("label")
    first = choices.data.get("first", 0)
    if not isinstance(first, int) or isinstance(first, bool) or first < 0:
        raise choices.wrong("first", "the index of the first choice, 0 or 1")
    given = [name for name, value in (("label", label), ("right", right)) if value is not None]
    if len(given) > 1 or (keys is not None and (right is not None or first)):
        raise DataError(
            "the right choice is said in two ways",
            where=choices.where,
            found=", ".join(name for name in ("label", "keys", "first", "right") if choices.data.get(name) is not None),
            expected="label, with keys or first; or right",
        )
    rules = _rules(choices)
    return Choices(
        tuple(Field((column,), **rules) for column in columns),
        label,
        keys,
        first,
        right,
        optional_field(choices, "beginning"),
        optional_field(choices, "ending"),
        choices.optional_size("count"),
    )


def patterns(read: TypedMapping, key: str) -> dict[str, str]:
    """Column -> regular expression, checked."""
    pattern_of = read.mapping_of_texts(key)
    for column, pattern in pattern_of.items():
        check_pattern(pattern, f"{read.where} {key}.{column}")
    return pattern_of


def sizes(read: TypedMapping, key: str, what: str) -> dict[str, int]:
    """Name -> whole number of at least 1."""
    size_of = read.mapping(key)
    if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in size_of.values()):
        raise read.wrong(key, what)
    return size_of


def templates_of(read: TypedMapping) -> Iterator[Template]:
    """`templates: [{prompt, target, inverted, options}, …]`."""
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
