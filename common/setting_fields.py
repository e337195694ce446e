"""The settings of a class, read from its fields: names, types, choices, defaults, and the docstrings below them."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import types
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from kd.common.setting_values import Setting

METADATA = "kd.setting"


def settings_of(cls: Any) -> Mapping[str, Setting]:
    """Name -> setting, in the order of the fields; groups are entered."""
    return _settings_of(cls)


@cache
def _settings_of(cls: Any) -> Mapping[str, Setting]:
    settings: dict[str, Setting] = {}
    for one in _walk(cls, ()):
        assert one.name not in settings, f"{cls.__name__} has two settings called {one.name}"
        settings[one.name] = one
    return settings


def _walk(cls: Any, above: tuple[str, ...]) -> Iterator[Setting]:
    hints, docs = get_type_hints(cls), field_docs(cls)
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        kinds, optional, choices = kinds_of(hints[f.name])
        if len(kinds) == 1 and dataclasses.is_dataclass(kinds[0]):
            yield from _walk(kinds[0], (*above, f.name))
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        doc = docs.get(f.name, "")
        extra = {"choices": choices, **f.metadata.get(METADATA, {})}
        yield Setting(f.name, (*above, f.name), kinds, optional, default, doc, **extra)


def group_headings(cls: Any) -> Mapping[tuple[str, ...], str]:
    """Path of each group of settings -> the first sentence of its class's docstring; the path `()` is `cls` itself."""
    headings: dict[tuple[str, ...], str] = {}

    def enter(group: Any, path: tuple[str, ...]) -> None:
        headings[path] = " ".join(inspect.cleandoc(group.__doc__ or "Options").split()).partition(". ")[0].rstrip(".")
        hints = get_type_hints(group)
        for f in dataclasses.fields(group):
            kinds, _, _ = kinds_of(hints[f.name])
            if f.init and len(kinds) == 1 and dataclasses.is_dataclass(kinds[0]):
                enter(kinds[0], (*path, f.name))

    enter(cls, ())
    return headings


def kinds_of(hint: Any) -> tuple[tuple[Any, ...], bool, tuple[str, ...]]:
    """Types a value of this type hint may have, whether None is one, and the texts that a `Literal` lists."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    optional = type(None) in parts
    kinds: list[Any] = []
    choices: list[str] = []
    for part in parts:
        if get_origin(part) is Literal:
            choices += get_args(part)
            kinds += [type(value) for value in get_args(part)]
        elif part is not type(None):
            kinds.append(part)
    return tuple(dict.fromkeys(kinds)), optional, tuple(choices)


@cache
def field_docs(cls: Any) -> Mapping[str, str]:
    """Field -> the docstring below it, in one line; also of the classes it inherits from."""
    docs: dict[str, str] = {}
    bases: list[Any] = [base for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    for base in bases:
        body = _class_bodies(inspect.getsourcefile(base) or "").get(base.__name__, [])
        for statement, following in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name) and _is_text(following):
                docs[statement.target.id] = " ".join(inspect.cleandoc(following.value.value).split())  # type: ignore[attr-defined]
    return docs


@cache
def _class_bodies(file: str) -> Mapping[str, list[ast.stmt]]:
    if not Path(file).is_file():  # a class that was typed at a prompt has no docstrings below its fields
        return {}
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return {node.name: node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
