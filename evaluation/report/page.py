"""Tables in Markdown and one self-contained HTML page: no script, no font, no request; figures are inside as PNG.

    page = render_page("Students", ["From one cache."], [Section("Scores", table=Table(...), image=Path("a.png"))])

The page follows the reader's colour scheme; figures keep a white card, because a PNG cannot. On a phone tables
scroll sideways on their own and the page does not. All text is escaped; nothing from a model's name or a run's
settings reaches the page as markup.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from kd.common.errors import DataError

STYLE = """
:root { color-scheme: light dark; --text: #1d2129; --soft: #5b6472; --line: #d9dde3; --back: #ffffff; --best: #e0f1e7;
        --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6e8eb; --soft: #a3abb8; --line: #3a404a; --back: #15181d; --best: #1f4a32; --card: #1d2127; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: var(--text); background: var(--back);
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; line-height: 1.3; margin-top: 2.5rem; }
p, figcaption { max-width: 45rem; } .soft, figcaption { color: var(--soft); font-size: .9rem; }
summary { cursor: pointer; margin-top: 2.5rem; } summary h2 { display: inline; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; margin-top: .75rem; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 4.5rem;
     overflow-wrap: normal; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--back); white-space: normal;
     min-width: 9rem; max-width: 14rem; overflow-wrap: anywhere; }
td.best { background: var(--best); font-weight: 700; }
figure { margin: 1rem 0; max-width: 42rem; } figure img { display: block; max-width: 100%; height: auto; background: #ffffff;
         padding: .5rem; border: 1px solid var(--line); border-radius: .5rem; }
dl.sample { margin: 1rem 0; padding: .75rem 1rem; background: var(--card); border: 1px solid var(--line);
            border-radius: .5rem; }
dl.sample dt { color: var(--soft); font-size: .85rem; font-weight: 600; }
dl.sample dd { margin: 0 0 .6rem; white-space: pre-wrap; }
@media (min-width: 48rem) {
  dl.sample { display: grid; grid-template-columns: 10rem 1fr; gap: .25rem 1rem; } dl.sample dd { margin: 0; }
}
@media (max-width: 30rem) {
  th, td { padding: .35rem .5rem; font-size: .9rem; } th:first-child, td:first-child { min-width: 7.5rem; max-width: 9rem; }
}
"""


@dataclass(frozen=True)
class Table:
    """Cells as they are shown."""

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Each as long as `headers`; the first cell names the row."""
    best: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of cells to emphasise."""

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
    """A reference, where there is one."""
    answers: Sequence[tuple[str, str]]
    """Model and text."""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in this order."""

    heading: str
    text: str | None = None
    """A paragraph."""
    table: Table | None = None
    samples: Sequence[Sample] = ()
    image: Path | None = None
    """A PNG file, taken into the page."""
    note: str | None = None
    """Small print under table and image; also the image's alternative text."""
    folded: bool = False
    """Shown on demand: a page of many models stays short. In Markdown it is not folded."""


def render_page(title: str, intro_lines: Sequence[str], sections: Sequence[Section]) -> str:
    """The whole HTML document. Raises DataError for an image that is not a PNG file."""
    intro = "\n".join(f"<p>{escape(line)}</p>" for line in intro_lines)
    body = "\n".join(_section(section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{intro}
{body}
</main>
</body>
</html>
"""


def markdown_table(table: Table) -> str:
    """The table in GitHub's Markdown, numbers to the right, best cells bold."""
    lines = [_markdown_row(table.headers), "|".join(["", " :-- ", *[" --: "] * (len(table.headers) - 1), ""])]
    for r, row in enumerate(table.rows):
        lines.append(_markdown_row([f"**{c}**" if (r, i) in table.best else c for i, c in enumerate(row)]))
    return "\n".join(lines) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    safe = [escape(" ".join(cell.split()), quote=False).replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(safe)} |"


def markdown_samples(samples: Sequence[Sample]) -> str:
    """Prompts and answers as code blocks, whose fences are longer than any in the text: nothing in them is markup."""
    parts = []
    for number, sample in enumerate(samples, 1):
        parts.append(f"{number}. prompt\n\n{_fenced(sample.prompt)}")
        if sample.expected is not None:
            parts.append(f"   expected\n\n{_fenced(sample.expected)}")
        parts += [
            f"   {' '.join(escape(name, quote=False).split())}\n\n{_fenced(text)}" for name, text in sample.answers
        ]
    return "\n\n".join(parts)


def _fenced(text: str) -> str:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return "\n".join(f"   {line}" for line in (f"{fence}text", *text.splitlines(), fence))


def _section(section: Section) -> str:
    heading = f"<h2>{escape(section.heading)}</h2>"
    parts = [f"<section>\n<details>\n<summary>{heading}</summary>" if section.folded else f"<section>\n{heading}"]
    if section.text is not None:
        parts.append(f"<p>{escape(section.text)}</p>")
    if section.table is not None:
        parts.append(_table(section.table))
    parts += [_sample(sample) for sample in section.samples]
    if section.image is not None:
        caption = f"\n<figcaption>{escape(section.note)}</figcaption>" if section.note else ""
        alternative = escape(section.note or section.heading)
        parts.append(f'<figure><img alt="{alternative}" src="{_data_uri(section.image)}">{caption}</figure>')
    elif section.note is not None:
        parts.append(f'<p class="soft">{escape(section.note)}</p>')
    return "\n".join([*parts, "</details>\n</section>" if section.folded else "</section>"])


def _sample(sample: Sample) -> str:
    lines = [("prompt", sample.prompt)] + ([] if sample.expected is None else [("expected", sample.expected)])
    shown = "".join(
        f"<dt{mark}>{escape(name)}</dt><dd{mark}>{escape(text)}</dd>"
        for lines_, mark in ((lines, ' class="given"'), (sample.answers, ""))
        for name, text in lines_
    )
    return f'<dl class="sample">{shown}</dl>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(h)}</th>' for h in table.headers)
    rows = []
    for r, row in enumerate(table.rows):
        cells = [
            f'<td class="best">{escape(c)}</td>' if (r, i) in table.best else f"<td>{escape(c)}</td>"
            for i, c in enumerate(row)
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    lines = "\n".join(rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table">\n<table>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody>\n</table>\n</div>"
    )


def _data_uri(path: Path) -> str:
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise DataError("an image of the page is not a PNG file", where=path, found=repr(data[:8]))
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")
