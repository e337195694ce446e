"""Write docs/api.md, every public name of `kd` with its signature and docstring, and docs/settings.md, to which it points.

python scripts/write_api_docs.py
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import write_settings_docs
from docstring_blocks import docstring_blocks

import kd
from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_model import OF_NAMED_TEACHERS
from kd.common.setting_fields import field_docs, settings_of
from kd.student_trainer.configuration.score_settings import ScoreSettings

HEAD = """# Python

Everything that `import kd` gives; `kd.__version__` is its version. Names are imported when they are first used, so `import kd`
itself takes no time. The examples run as tests, in a folder that holds a small cache of the embedded teacher, `cache`. Every
error that a caller can cause is a `kd.KdError`.

This page is made from the docstrings by `scripts/write_api_docs.py`.
"""
WIDTH = 100


def named(cls: Any, fields: Iterable[str]) -> list[str]:
    """What files and Python call these settings of a class, in alphabetical order."""
    return sorted(write_settings_docs.name_of(settings_of(cls)[field]) for field in fields)


SETTINGS: dict[str, tuple[str, str, Collection[str]]] = {
    "build_cache": ("kd cache build", "for a model object all but ", named(BuildSettings, OF_NAMED_TEACHERS)),
    "evaluate": ("kd eval", "", ()),
    "import_cache": ("kd cache import", "", ()),
    "make_report": ("kd report", "", ()),
    "train": ("kd train", "all but the scores during training, ", named(ScoreSettings, settings_of(ScoreSettings))),
}
"""Function -> the command whose settings it takes by name, and those of them that it does not take."""


def settings_line(command: str, but: str, without: Collection[str]) -> str:
    """Where the settings are that a function takes by name."""
    names = ", ".join(f"`{name}`" for name in without)
    ending = f"; {but}{names}" if without else ""
    return f"Settings: those of [`{command}`](settings.md#{command.replace(' ', '-')}){ending}."


def signature(function: Any, name: str) -> str:
    """How `function` is called, with types; one parameter per line where a single line would be too long."""
    parts = inspect.signature(function)
    returned = "" if parts.return_annotation in (inspect.Signature.empty, "None") else f" -> {parts.return_annotation}"
    shown = list(parameters([p for p in parts.parameters.values() if p.name != "self"]))
    line = f"{name}({', '.join(shown)}){returned}"
    return line if len(line) <= WIDTH else f"{name}(\n" + "".join(f"    {p},\n" for p in shown) + f"){returned}"


def parameters(known: list[inspect.Parameter]) -> Iterator[str]:
    """Each parameter as in the source, and `*` before the first that is keyword-only."""
    starred = False
    for p in known:
        if p.kind is p.KEYWORD_ONLY and not starred:
            starred = True
            yield "*"
        stars = "**" if p.kind is p.VAR_KEYWORD else ""
        default = "" if p.default is p.empty else f" = {p.default!r}"
        yield f"{stars}{p.name}: {p.annotation}{default}"


def members(value: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties that a class defines itself."""
    for name, member in vars(value).items():
        if not name.startswith("_") and (isinstance(member, property) or inspect.isfunction(member)):
            yield name, member


def entry(name: str) -> str:
    """The section of one public name."""
    value = getattr(kd, name)
    bare = inspect.isclass(value) and (issubclass(value, Exception) or getattr(value, "_is_protocol", False))
    call = f"class {name}({value.__base__.__name__})" if bare else signature(value, f"kd.{name}")
    parts = [f"## `kd.{name}`", f"```python\n{call}\n```", *docstring_blocks(value.__doc__ or "")]
    if name in SETTINGS:
        parts.append(settings_line(*SETTINGS[name]))
    if inspect.isclass(value) and dataclasses.is_dataclass(value):
        docs = field_docs(value)
        parts.append("\n".join(f"- `{f.name}` {docs.get(f.name, '')}".rstrip() for f in dataclasses.fields(value)))
    for member, function in members(value) if inspect.isclass(value) else ():
        is_property = isinstance(function, property)
        called = member if is_property else signature(function, member)
        first = next(docstring_blocks((function.fget if is_property else function).__doc__ or ""))
        parts.append(f"**`{' '.join(called.split())}`** — {' '.join(first.split())}")
    return "\n\n".join(parts)


def render() -> str:
    """The whole page: functions first, then classes, then errors, each in alphabetical order."""

    def order(name: str) -> tuple[bool, bool, str]:
        value = getattr(kd, name)
        is_class = inspect.isclass(value)
        return is_class and issubclass(value, Exception), is_class, name

    names = sorted((name for name in kd.__all__ if name != "__version__"), key=order)
    return HEAD + "".join(f"\n{entry(name)}\n" for name in names)


if __name__ == "__main__":
    docs = Path(__file__).parents[1] / "docs"
    (docs / "api.md").write_text(render(), encoding="utf-8")
    (docs / "settings.md").write_text(write_settings_docs.render(), encoding="utf-8")
