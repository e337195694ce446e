"""Settings as frozen dataclasses: the one place that says what a setting is called, may be, and means.

    @dataclass(frozen=True)
    class Objective:
        temperature: float = 1.0
        \"\"\"Temperature of the softmaxes that are compared.\"\"\"

    @dataclass(frozen=True)
    class Training:
        student: str
        \"\"\"Model to train.\"\"\"
        objective: Objective = field(default_factory=Objective)

    make(Training, {"student": "demo", "temperature": 2})       # nested settings from flat names

The command line (`commands.terminal.settings_options`), configuration files, saved settings and the Python API are made
from such a class: from its fields' names, types, defaults and docstrings. A field whose type is a dataclass is a group: its fields
are settings too. A name must be unique among all groups. `setting` adds what a type cannot say.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import os
import reprlib
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from kd.common.errors import DataError, unknown_name
from kd.common.paths import output_folder, path_of

T = TypeVar("T")
METADATA = "kd.setting"


class MissingSettings(DataError):
    """Settings without a default were not given."""


def setting(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Any = dataclasses.MISSING,
    flag: str | None = None,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    typed: Callable[[str], str] | None = None,
    choices: Collection[str] | None = None,
    shown: str | None = None,
    minimum: float | None = None,
    above: float | None = None,
    multiple: bool = False,
    hidden: bool = False,
    folder: bool = False,
    hint: str | None = None,
) -> Any:
    """A field of a settings class, with what its type cannot say.

    flag      spelling on the command line, where it is not the field's name (`--data` for `spec`)
    metavar   what the help shows in place of the value's type
    parse     text -> value; raises ValueError or DataError for text that means nothing
    typed     text as typed in a shell -> text; values of files and of Python are taken as they are
    choices   the texts that the value may be, where they are the names of a registry and not a `Literal`
    shown     what the help names as the default, where the default's own text says little
    minimum   smallest value
    above     bound that the value must exceed
    multiple  on the command line: the option may be repeated, and the values make a tuple (joined, where `parse` makes tuples);
              where the type is text, they, or a list in a file, make one text with commas between them
    hidden    not an option of the command line
    folder    a folder that the command writes: an address and a file are refused
    hint      what to try where a value is none of the choices
    """
    extra: dict[str, Any] = {
        "flag": flag,
        "metavar": metavar,
        "parse": parse,
        "typed": typed,
        "shown": shown,
        "minimum": minimum,
        "above": above,
        "multiple": multiple,
        "hidden": hidden,
        "folder": folder,
        "hint": hint,
    }
    if choices is not None:
        extra["choices"] = tuple(choices)
    return field(default=default, default_factory=default_factory, metadata={METADATA: extra})


@dataclass(frozen=True)
class Setting:
    """One setting of a class or of its groups."""

    name: str
    """Name of the field, unique in the class: what files and Python call it."""
    path: tuple[str, ...]
    """Fields from the outermost class to this one; the last is `name`."""
    kinds: tuple[Any, ...]
    """Types a value may have, without None: classes, or `tuple[X, ...]`."""
    optional: bool
    """Whether None is a value."""
    default: Any
    """`dataclasses.MISSING` where a value must be given."""
    doc: str
    choices: tuple[str, ...] = ()
    """Texts that the value may be; empty where any text will do."""
    flag: str | None = None
    metavar: str | None = None
    parse: Callable[[str], Any] | None = None
    typed: Callable[[str], str] | None = None
    shown: str | None = None
    minimum: float | None = None
    above: float | None = None
    multiple: bool = False
    hidden: bool = False
    folder: bool = False
    hint: str | None = None

    @property
    def option(self) -> str:
        """How the command line spells it, without `no-`."""
        return self.flag or "--" + self.name.replace("_", "-")

    @property
    def required(self) -> bool:
        """Whether there is no default."""
        return self.default is dataclasses.MISSING

    def checked(self, value: Any, where: object = None, *, typed: bool = False) -> Any:
        """`value` as a value of this setting. Raises DataError.

        Text is parsed where the type is none of text, as a configuration file or an environment may hold it; so is each
        text of a list. A path is text where the type is text. `typed`: the value was typed in a shell.
        """
        if typed and self.typed is not None and isinstance(value, str):
            value = self.typed(value)
        if value is None and self.optional:
            return None
        if isinstance(value, os.PathLike) and Path not in self.kinds:
            value = os.fspath(value)
        if isinstance(value, str) and (self.parse is not None or self._is_no_text(value)):
            value = self._parsed(value, where)
        elif isinstance(value, Mapping) and self.multiple:
            value = self._joined([f"{key}={one}" for key, one in value.items()], where)
        elif isinstance(value, list | tuple) and self.multiple and self.kinds == (str,):
            value = ",".join(map(str, value))
        elif isinstance(value, list | tuple) and self.parse is not None:
            value = self._joined(value, where)
        value = self._as_kind(value)
        if not self._fits(value):
            raise DataError(
                "a setting has the wrong type",
                where=where,
                found=f"{self.name} {reprlib.repr(value)}",
                expected=self._expected(),
            )
        if self.choices and isinstance(value, str) and value not in self.choices:
            raise unknown_name(self.name.replace("_", " "), str(value), self.choices, where=where, try_=self.hint)
        self._bounded(value, where)
        return self._as_place(value)

    def _as_place(self, value: Any) -> Any:
        """A path on this machine, with the home folder spelled out; other values as they are."""
        if self.folder and isinstance(value, str | Path):
            path = output_folder(value)
            return str(path) if isinstance(value, str) else path
        return path_of(value) if isinstance(value, Path) else value

    def _is_no_text(self, text: str) -> bool:
        """Whether the text stands for a value of another type: `5` does for `int | Literal["epoch"]`."""
        return str not in self.kinds or (len(self.kinds) > 1 and bool(self.choices) and text not in self.choices)

    def _parsed(self, text: str, where: object) -> Any:
        if self.parse is not None:
            try:
                return self.parse(text)
            except ValueError as error:
                raise DataError(f"cannot read {self.name}", where=where, found=repr(text), expected=error) from error
        if Path in self.kinds:
            return path_of(text)
        for kind in (k for k in (int, float) if k in self.kinds):
            with suppress(ValueError):  # to YAML 1.1, 5e-4 is text: it wants 5.0e-4
                return kind(text)
        item = next((get_args(k)[0] for k in self.kinds if get_origin(k) is tuple), None)
        if item is not None:
            with suppress(ValueError):
                return tuple(item(part.strip()) for part in text.split(",") if part.strip())
        return text

    def _joined(self, values: Sequence[Any], where: object) -> tuple[Any, ...]:
        """The values of a list, texts parsed; a text that stands for several values adds them all."""
        joined: list[Any] = []
        for value in values:
            parsed = self._parsed(value, where) if isinstance(value, str) else value
            joined += parsed if isinstance(parsed, tuple) else [parsed]
        return tuple(joined)

    def _as_kind(self, value: Any) -> Any:
        """Lists of a file are tuples here; a whole number will do for a fraction."""
        for kind in self.kinds:
            if get_origin(kind) is tuple and isinstance(value, Sequence) and not isinstance(value, str | bytes):
                item = get_args(kind)[0]
                return tuple(float(v) if item is float and type(v) is int else v for v in value)
        return value

    def _fits(self, value: Any) -> bool:
        if isinstance(value, bool):
            return bool in self.kinds
        for kind in self.kinds:
            if get_origin(kind) is tuple:
                item = get_args(kind)[0]
                if isinstance(value, tuple) and all(isinstance(v, item) for v in value):
                    return True
            elif get_origin(kind) is not None:
                if isinstance(value, get_origin(kind)):
                    return True
            elif isinstance(value, kind) or (kind is float and isinstance(value, int)):
                return True
        return False

    def _expected(self) -> str:
        names = [k.__name__ if isinstance(k, type) and get_origin(k) is None else str(k) for k in self.kinds]
        return " or ".join([*names, *(["none"] if self.optional else [])])

    def _bounded(self, value: Any, where: object) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return
        label = f"{self.option} {value:g}"
        if self.minimum is not None and not value >= self.minimum:
            raise DataError(f"{self.option} must be at least {self.minimum:g}", where=where, found=label)
        if self.above is not None and not value > self.above:
            raise DataError(f"{self.option} must be greater than {self.above:g}", where=where, found=label)


def settings_of(cls: Any) -> Mapping[str, Setting]:
    """Name -> setting, in the order of the fields; groups are entered."""
    return _settings_of(cls)


@cache
def _settings_of(cls: Any) -> Mapping[str, Setting]:
    found: dict[str, Setting] = {}
    for one in _walk(cls, ()):
        assert one.name not in found, f"{cls.__name__} has two settings called {one.name}"
        found[one.name] = one
    return found


def _walk(cls: Any, above: tuple[str, ...]) -> Iterator[Setting]:
    hints, docs = get_type_hints(cls), field_docs(cls)
    for f in dataclasses.fields(cls):
        if not f.init:
            continue
        kinds, optional, choices = _kinds(hints[f.name])
        if len(kinds) == 1 and dataclasses.is_dataclass(kinds[0]):
            yield from _walk(kinds[0], (*above, f.name))
            continue
        default = f.default_factory() if f.default_factory is not dataclasses.MISSING else f.default
        doc = docs.get(f.name, "")
        extra = {"choices": choices, **f.metadata.get(METADATA, {})}
        yield Setting(f.name, (*above, f.name), kinds, optional, default, doc, **extra)


def _kinds(hint: Any) -> tuple[tuple[Any, ...], bool, tuple[str, ...]]:
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


def make(cls: type[T], values: Mapping[str, Any], *, where: object = None, typed: bool = False) -> T:
    """Settings of class `cls` from flat names (or groups, as nested mappings). Raises DataError.

    Names may be spelled with hyphens. An unknown one is refused, with the nearest known one; so is a value of another type.
    `typed`: texts are as typed in a shell, where `\\n` stands for a line end.
    """
    known = settings_of(cls)
    given = flattened(cls, values, where=where)
    checked = {name: known[name].checked(value, where, typed=typed) for name, value in given.items()}
    missing = [one.option for one in known.values() if one.required and one.name not in checked]
    if missing:
        raise MissingSettings("settings are missing", where=where, expected=", ".join(missing))
    return _built(cls, (), checked, known)


def flattened(cls: Any, values: Mapping[str, Any], *, where: object = None) -> dict[str, Any]:
    """Groups of `values` are opened and names spelled as fields. Raises DataError for an unknown name, or one given twice."""
    known = settings_of(cls)
    groups = {part for one in known.values() for part in one.path[:-1]}
    by_flag = {one.option.removeprefix("--").replace("-", "_"): name for name, one in known.items()}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        inner: Mapping[str, Any]
        if name in groups and isinstance(value, Mapping):
            inner = flattened(cls, value, where=where)
        else:
            name = by_flag.get(name, name)
            if name not in known:
                raise unknown_name("setting", str(key), {*by_flag} | groups, where=where)
            inner = {name: value}
        for inner_name, inner_value in inner.items():
            if inner_name in flat:
                raise DataError("a setting is given twice", where=where, found=inner_name)
            flat[inner_name] = inner_value
    return flat


def _built(cls: type[T], above: tuple[str, ...], values: Mapping[str, Any], known: Mapping[str, Setting]) -> T:
    arguments: dict[str, Any] = {}
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        path = (*above, f.name)
        if f.name in known and known[f.name].path == path:
            if f.name in values:
                arguments[f.name] = values[f.name]
        elif f.init:
            kinds, _, _ = _kinds(get_type_hints(cls)[f.name])
            arguments[f.name] = _built(kinds[0], path, values, known)
    return cls(**arguments)


def flat(settings: Any) -> dict[str, Any]:
    """Name -> value of every setting: the inverse of `make`."""
    values: dict[str, Any] = {}
    for one in settings_of(type(settings)).values():
        value = settings
        for part in one.path:
            value = getattr(value, part)
        values[one.name] = value
    return values


def changed(settings: T, **values: Any) -> T:
    """`settings` with other values, by flat names. Raises DataError."""
    return make(type(settings), {**flat(settings), **values})


def check(settings: Any) -> None:
    """Check every value of `settings` against its type, choices and bounds: for `__post_init__`. Raises DataError.

    Text that stands for a value of another type is replaced by that value. Only the fields of the class itself are checked:
    groups check theirs.
    """
    for one in settings_of(type(settings)).values():
        if len(one.path) == 1:
            object.__setattr__(settings, one.name, one.checked(getattr(settings, one.name)))


def as_text(value: Any) -> str | bool:
    """A value as one would type it: what `Setting.checked` reads back. Switches stay true or false."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return ",".join(f"{key}={one}" for key, one in value.items())
    if isinstance(value, tuple | list):
        return ",".join(str(one) for one in value)
    return str(value)


def unescaped(text: str) -> str:
    """The text with \\n and \\t as a line end and a tab, for values that are typed in a shell."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


def saved(settings: Any) -> dict[str, Any]:
    """Flat settings as JSON holds them: paths as text, tuples as lists."""
    document: dict[str, Any] = json.loads(json.dumps(flat(settings), default=str))
    return document
