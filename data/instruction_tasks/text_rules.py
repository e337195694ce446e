"""The rules of a task's fields and rows, `drop`, `replace` and `where`, within bounds: the file and its rows may be a stranger's.

A regular expression such as `(a+)+$` takes longer than anyone waits on thirty characters. Rules run under the `regex` module,
which stops after `SECONDS` on one text; an expression is checked before, because compiling one can fill the memory too.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache
from typing import Any

from kd.common.errors import DataError
from kd.common.extras import needed

SECONDS = 1.0
"""Most processor seconds of one expression on one text. An honest one takes milliseconds on a megabyte."""
MAX_PATTERN = 500
"""Most characters of an expression."""
MAX_REPEATS = 10_000
"""Bound on the product of all numbers of repetitions, `{3}` or `{0,40}`: a compiled expression spells them out."""
MAX_TEXT = 2**24
"""Most characters of a field after its rules."""


def check_pattern(pattern: str, where: str) -> None:
    """Raise DataError for what is no regular expression, or one that is too large to compile."""
    repeats = [max(map(int, re.findall(r"\d{1,9}", part)), default=1) for part in re.findall(r"\{[\d,]*\}", pattern)]
    if len(pattern) > MAX_PATTERN or math.prod(max(1, count) for count in repeats) > MAX_REPEATS:
        raise DataError(
            "a regular expression is too large",
            where=where,
            found=f"{len(pattern)} characters, {math.prod(repeats):,} repetitions",
            expected=f"at most {MAX_PATTERN}, and {MAX_REPEATS:,} in all",
        )
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise DataError("not a regular expression", where=where, found=str(error)) from error


def without(pattern: str, text: str, where: str) -> str:
    """`text` without every match of a checked expression. Raises DataError where finding them takes too long."""
    try:
        result: str = _compiled(pattern).sub("", text, timeout=SECONDS)
    except TimeoutError as error:
        raise _too_slow(f"drop: {pattern}", text, where) from error
    return result


def occurs(pattern: str, text: str, where: str) -> bool:
    """Whether a checked expression is found in `text`. Raises DataError where finding it takes too long."""
    try:
        return _compiled(pattern).search(text, timeout=SECONDS) is not None
    except TimeoutError as error:
        raise _too_slow(pattern, text, where) from error


def _too_slow(rule: str, text: str, where: str) -> DataError:
    return DataError(
        "a regular expression takes too long",
        where=where,
        found=rule,
        expected=f"at most {SECONDS:g} s on a text of {len(text):,} characters",
        try_="an expression without repetitions inside of repetitions",
    )


@lru_cache(maxsize=256)
def _compiled(pattern: str) -> Any:
    with needed("regex", "a task with a regular expression"):
        import regex
    return regex.compile(pattern)


def refuse_long(characters: int, where: str) -> None:
    """Raise DataError for a field of so many characters, before it is made: each of a row of rules may double a text."""
    if characters > MAX_TEXT:
        raise DataError(
            "a field grows too long", where=where, found=f"{characters:,} characters", expected=f"at most {MAX_TEXT:,}"
        )
