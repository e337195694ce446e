"""`Setting`: one setting with its name, type, default and help, and the check of a value that is given for it."""

from __future__ import annotations

import dataclasses
import os
import reprlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

from kd.common.errors import DataError, unknown_name
from kd.common.paths import StoreAddress, output_folder, path_of


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
        if isinstance(value, StoreAddress):
            return value
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
