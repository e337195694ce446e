"""Texts with `{name}` in braces: the templates of tasks, and the options of recipes.

`str.format` would do more than a stranger's file may ask for: `{v.__class__}` reads attributes, `{v:>9999999999}` fills the
memory. Here a name in braces is replaced, `{{` and `}}` are braces, and anything else is an error.
"""

from __future__ import annotations

import string
from collections.abc import Mapping

from kd.common.errors import DataError

MAX_FIELDS = 64
"""Most names in one text. Each may stand for a long one."""


def template_fields(text: str, where: str) -> tuple[str, ...]:
    """Names in braces, in order; `{{` and `}}` are braces. Raises DataError for anything but plain `{name}`s, or for too many."""
    try:
        parts = list(string.Formatter().parse(text))
    except ValueError as error:
        raise DataError("a template has a stray brace", where=where, found=str(error), try_="{{ or }}") from error
    names = []
    for _, name, spec, conversion in parts:
        if name is None:
            continue
        if spec or conversion or not name.replace("-", "_").isidentifier():
            raise DataError(
                "a template may contain only plain field names", where=where, found=f"{{{name}}}", expected="{name}"
            )
        names.append(name)
    if len(names) > MAX_FIELDS:
        raise DataError(
            "a template has too many fields", where=where, found=len(names), expected=f"at most {MAX_FIELDS}"
        )
    return tuple(names)


def fill(text: str, values: Mapping[str, str]) -> str:
    """Put values into a checked template; braces inside values stay as they are."""
    return "".join(
        literal + ("" if name is None else values[name]) for literal, name, _, _ in string.Formatter().parse(text)
    )
