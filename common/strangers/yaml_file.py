"""Read a mapping from a YAML or JSON file that a stranger may have written: within bounds, with errors that name the line.

The one reader of tasks, recipes, experiments, pools and configurations. It is PyYAML's safe loader, which runs no code, with
less than YAML allows:

    size      at most `MAX_BYTES` in a plain file, `MAX_DEPTH` levels and `MAX_NODES` values, each alias counted as what it repeats
    names     plain ones; a name that stands twice in a mapping is an error (YAML keeps the last value)
    values    text, numbers of up to 64 bits, true, false and null. `2026-11-30` and `0:1:0.1` are texts: YAML 1.1 reads a date,
              and a number in base 60
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import yaml

from kd.common.errors import DataError
from kd.common.strangers.plain_files import NotPlainError, read_plain

MAX_BYTES = 2**19
"""Most bytes of a file. The longest task of the package has 8 kilobytes."""
MAX_DEPTH = 32
"""Most mappings and lists inside each other."""
MAX_NODES = 50_000
"""Most names and values, and hundreds of characters in them; what an alias repeats counts each time."""
MAX_INTEGER = 2**63
"""Bound on the size of whole numbers."""
CORE = "tag:yaml.org,2002:"
KINDS = {f"{CORE}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
"""Tags of the values that may stand in a file, and of `<<`; the others of YAML are dates, binary data and kinds of sets."""


def read_mapping(path: str | os.PathLike[str], kind: str) -> dict[Any, Any]:
    """The mapping in a file. Raises DataError.

    kind   what the file should be, for the error: `recipe`, `task file`, …
    """
    try:
        text = read_plain(path, MAX_BYTES).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, NotPlainError) else error
        raise DataError(f"cannot read the {kind}", where=path, found=reason, expected="a YAML file") from error
    return parse_mapping(text, kind, path)


def parse_mapping(text: str, kind: str, where: object) -> dict[Any, Any]:
    """The mapping in YAML text; `where` names its file in errors. Raises DataError."""
    try:
        document = _Loader(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        raise _cannot_read(kind, where, error.problem_mark, str(error.problem)) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise DataError(f"cannot read the {kind}", where=where, found=f"line {line}: {error.reason}") from error
    if not isinstance(document, dict):
        content = "an empty file" if document is None else type(document).__name__
        raise DataError(f"the {kind} is not a mapping", where=where, found=content, expected="name: value")
    return document


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a configuration file: their names and values. Raises DataError."""
    return {str(name): value for name, value in read_mapping(path, "configuration file").items()}


def _cannot_read(kind: str, where: object, mark: yaml.Mark | None, problem: str) -> DataError:
    line = "" if mark is None else f"line {mark.line + 1}: "
    return DataError(f"cannot read the {kind}", where=where, found=f"{line}{problem}")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader within bounds. Each method is called by PyYAML."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._count = 0
        """Nodes so far, with what the aliases repeat."""
        self._weights: dict[str, int] = {}
        """Anchor of a finished node -> nodes in it."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """The tag of a value that names none."""
        tag = super().resolve(kind, value, implicit)  # type: ignore[no-untyped-call]
        in_base_60 = tag in (f"{CORE}int", f"{CORE}float") and ":" in value
        return tag if tag in KINDS and not in_base_60 else f"{CORE}str"

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node, and count it."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if self.check_event(yaml.AliasEvent):
            if event.anchor in self.anchors and event.anchor not in self._weights:
                raise _problem("an alias stands inside of what it repeats", event)
            self._add(self._weights.get(event.anchor, 0), event)
            return super().compose_node(parent, index)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _problem(f"more than {MAX_DEPTH} levels", event)
        if (event.tag or "!") not in KINDS | {"!"}:
            raise _problem(f"values of the kind {event.tag!r:.60} are not read", event)
        before = self._count
        self._add(1 + len(getattr(event, "value", None) or "") // 100, event)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._weights[event.anchor] = self._count - before
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Compose a mapping whose names are plain and differ."""
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for name, _ in node.value:
            if not isinstance(name, yaml.ScalarNode):
                raise _problem("a name is not a text", name)
            if name.value in names:
                raise _problem(f"{name.value!r} is given twice", name)
            names.add(name.value)
        return node

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """The value of a node. Values that Python cannot make out of it, and texts that no file can hold, are errors."""
        try:
            value = super().construct_object(node, deep)
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise _problem(f"{str(node.value)[:60]!r} is no {node.tag.rpartition(':')[2]}", node) from error
        if isinstance(value, int) and abs(value) >= MAX_INTEGER:
            raise _problem("a number of more than 64 bits", node)
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise _problem("a text with half a character, or with the character 0", node)
        return value

    def _add(self, nodes: int, event: Any) -> None:
        self._count += nodes
        if self._count > MAX_NODES:
            raise _problem(f"more than {MAX_NODES:,} values, with what the aliases repeat", event)


def _problem(words: str, node: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=words, problem_mark=node.start_mark)
