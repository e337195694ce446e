"""A report as lines of a terminal: paragraphs are wrapped, and tables are aligned and cut to the width.

A table that is wider than the terminal is shown in parts, one below the other, each with some of the columns and the names of
the rows. Headers are broken into lines at their spaces. The marked cells are bold.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kd.evaluation.report.page import ReportContent, Table

GAP = "  "
NARROWEST = 40
"""Columns that a report needs; a narrower terminal breaks its lines."""

Line = list[tuple[str, bool]]
"""Pieces of text, and whether each is bold."""


def report_lines_for(report: ReportContent, width: int) -> Iterator[Line]:
    """The report on a terminal of `width` columns."""
    from kd.evaluation.report.page import markdown_samples

    width = max(width, NARROWEST)
    yield [(report.title, True)]
    for text in report.intro:
        yield from _paragraph(text, width)
    for section in report.sections:
        yield from ([], [(section.heading, True)])
        if section.text is not None:
            yield from _paragraph(section.text, width)
        if section.table is not None:
            yield []
            yield from table_lines(section.table, width)
        if section.samples:
            yield from ([(line, False)] for line in markdown_samples(section.samples).splitlines())
        if section.note is not None:
            yield from _paragraph(section.note, width)


def table_lines(table: Table, width: int) -> Iterator[Line]:
    """The table in as many parts as it needs; the first column stands in all of them."""
    widths = [_column_width(table, number) for number in range(len(table.headers))]
    for number, columns in enumerate(_parts(widths, width)):
        if number:
            yield []
        yield from _part(table, columns, widths)


def _parts(widths: Sequence[int], width: int) -> list[list[int]]:
    """Numbers of the columns of each part, the first column in each."""
    parts: list[list[int]] = []
    used = width + 1
    for number, width_of_column in enumerate(widths[1:], 1):
        if used + len(GAP) + width_of_column > width:
            parts.append([0])
            used = widths[0]
        parts[-1].append(number)
        used += len(GAP) + width_of_column
    return parts or [[0]]


def _part(table: Table, columns: Sequence[int], widths: Sequence[int]) -> Iterator[Line]:
    headers = [_header_lines(table.headers[number]) for number in columns]
    height = max(map(len, headers))
    for level in range(height):
        words = [(" " if level < height - len(h) else h[level - height + len(h)]) for h in headers]
        yield [(_aligned(word, widths[n], n), False) for word, n in zip(words, columns, strict=True)]
    yield [("─" * (sum(widths[n] for n in columns) + len(GAP) * (len(columns) - 1)), False)]
    for r, row in enumerate(table.rows):
        yield [(_aligned(row[n], widths[n], n), (r, n) in table.best) for n in columns]


def _aligned(text: str, width: int, number: int) -> str:
    """The names of the rows to the left, all other cells to the right."""
    return text.ljust(width) if number == 0 else GAP + text.rjust(width)


def _column_width(table: Table, number: int) -> int:
    return max(
        1, *(len(line) for line in _header_lines(table.headers[number])), *(len(row[number]) for row in table.rows)
    )


def _header_lines(header: str) -> list[str]:
    """The words of a header, one per line; an arrow or a short word stays with the one before it."""
    lines: list[str] = []
    for word in header.split():
        if lines and len(word) < 4 and not word.startswith("("):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines or [""]


def _paragraph(text: str, width: int) -> Iterator[Line]:
    for part in text.split("\n\n"):
        yield []
        yield from ([(line, False)] for line in textwrap.wrap(part, min(width, 120)))
