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

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import field
from typing import Any, TypeVar, get_type_hints

from kd.common.errors import DataError, unknown_name
from kd.common.setting_fields import METADATA, kinds_of, settings_of
from kd.common.setting_values import Setting

T = TypeVar("T")


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
            kinds, _, _ = kinds_of(get_type_hints(cls)[f.name])
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


def saved(settings: Any) -> dict[str, Any]:
    """Flat settings as JSON holds them: paths as text, tuples as lists."""
    document: dict[str, Any] = json.loads(json.dumps(flat(settings), default=str))
    return document
