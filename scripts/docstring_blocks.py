"""Docstrings of `kd` as Markdown: their tables of parameters and their examples become blocks of code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator


def docstring_blocks(docstring: str) -> Iterator[str]:
    """The paragraphs of a docstring, one after another."""
    for paragraph in re.split(r"\n{2,}", inspect.cleandoc(docstring)):
        if paragraph.startswith(">>>"):
            yield f"```python\n{paragraph}\n```"
        elif paragraph.startswith("    "):
            yield f"```python\n{inspect.cleandoc(paragraph)}\n```"
        elif all(re.match(r"\s|[\w, ]+ {2,}\S", line) for line in paragraph.splitlines()):
            yield f"```text\n{paragraph}\n```"
        else:
            yield paragraph
