"""Tables in Markdown and one self-contained HTML page: no script, no font, no request; figures are inside as PNG.

    page = render_page("Students", ["From one cache."], [Section("Scores", table=Table(...), image=Path("a.png"))])

The page's markup and style are `page.html.j2`. It follows the reader's colour scheme; figures keep a white card, because
a PNG cannot follow. On a phone, tables scroll sideways on their own and the page does not. All text is escaped: nothing
from a model's name or a run's settings reaches the page as markup.
"""

from __future__ import annotations

import base64
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd.common.errors import DataError
from kd.common.shown_text import for_markdown, for_terminal

OTHER_WHITE = "other white space"
WHITE = {" ": "space", "\n": "line end", "\t": "tab"}
"""White space -> its name where a text holds nothing else."""
TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True)
class Table:
    """Cells as they are shown."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Rows, each as long as `headers`; the first cell names the row."""
    best: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the cells to emphasise."""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.headers):
                raise DataError(
                    "a table row does not fit its header",
                    where=f"row {number}",
                    found=f"{len(row)} cells",
                    expected=len(self.headers),
                )


@dataclass(frozen=True)
class Sample:
    """One prompt and what models wrote after it."""

    prompt: str
    expected: str | None
    """A reference; None where there is none."""
    answers: Sequence[tuple[str, str]]
    """Name of a model, and the text that it wrote."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in this order."""

    heading: str
    text: str | None = None
    """A paragraph under the heading; None for none."""
    table: Table | None = None
    samples: Sequence[Sample] = ()
    image: Path | None = None
    """A PNG file, which is taken into the page; None for none."""
    note: str | None = None
    """Small print under table and image; also the image's alternative text."""
    lines: Sequence[str] = ()
    """Commands, shown as they are typed."""
    folded: bool = False
    """Whether the section is shown on demand, so that a page of many models stays short. In Markdown it is not folded."""


@dataclass(frozen=True)
class ReportContent:
    """What a report says, before it is written in any form."""

    title: str
    intro: Sequence[str]
    sections: Sequence[Section]


def render_page(title: str, intro_lines: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole HTML document. Raises DataError for an image that is not a PNG file."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["data_uri"] = data_uri
    environment.filters["visible"] = visible
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, intro_lines=intro_lines, sections=sections)


def visible(text: str) -> str:
    """A text as people are to see it: one that holds nothing but white space is named for what it holds."""
    if text.strip():
        return text
    if not text:
        return "(empty)"
    counted = Counter(WHITE.get(character, OTHER_WHITE) for character in text)
    kinds = (f"{count} {name}{'s' if count > 1 and name != OTHER_WHITE else ''}" for name, count in counted.items())
    return f"(white space alone: {', '.join(kinds)})"


def markdown_table(table: Table) -> str:
    """The table in GitHub's Markdown, numbers to the right, best cells bold."""
    lines = [
        _markdown_row(list(map(for_markdown, table.headers))),
        "|".join(["", " :-- ", *[" --: "] * (len(table.headers) - 1), ""]),
    ]
    for r, row in enumerate(table.rows):
        cells = [f"**{for_markdown(c)}**" if (r, i) in table.best else for_markdown(c) for i, c in enumerate(row)]
        lines.append(_markdown_row(cells))
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def markdown_samples(samples: Sequence[Sample]) -> str:
    """Prompts and answers as code blocks, whose fences are longer than any in the text: nothing in them is markup."""
    parts = []
    for number, sample in enumerate(samples, 1):
        parts.append(f"{number}. prompt\n\n{_fenced(visible(sample.prompt))}")
        if sample.expected is not None:
            parts.append(f"   expected\n\n{_fenced(visible(sample.expected))}")
        parts += [f"   {for_markdown(name)}\n\n{_fenced(visible(text))}" for name, text in sample.answers]
    return "\n\n".join(parts)


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return "\n".join(f"   {line}" for line in (f"{fence}text", *for_terminal(text).splitlines(), fence))


def data_uri(path: Path) -> str:
    """A PNG file as the text of an address. Raises DataError for any other file."""
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise DataError("an image of the page is not a PNG file", where=path, found=repr(data[:8]))
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
