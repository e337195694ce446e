"""What mkdocstrings shows of a docstring on the site: the same Markdown that docs/api.md has."""

from __future__ import annotations

from typing import Any

from docstring_blocks import docstring_blocks
from griffe import Extension, Object


class MarkdownDocstrings(Extension):  # type: ignore[misc]  # mypy does not read griffe
    """Rewrites the docstring of every object that is read; mkdocs.yml names it."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called by griffe."""
        if obj.docstring:
            obj.docstring.value = "\n\n".join(docstring_blocks(obj.docstring.value))
