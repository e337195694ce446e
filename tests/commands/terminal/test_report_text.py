"""A report on a terminal: nothing is wider than it, nothing is lost, and marked cells are bold."""

from __future__ import annotations

import pytest

from kd.commands.terminal.report_text import report_lines_for, table_lines
from kd.evaluation.report.page import ReportContent, Sample, Section, Table

HEADERS = ["model", *(f"SAMSum metric {n} ↑" for n in range(11))]
ROWS = [[f"model-{r}", *(f"{r}{n}.5 ± 1.2" for n in range(11))] for r in range(3)]
TABLE = Table(HEADERS, ROWS, frozenset({(1, 4), (2, 11)}))


def text_of(line: list[tuple[str, bool]]) -> str:
    return "".join(text for text, _ in line)


@pytest.mark.parametrize("width", [40, 80, 140, 1000])
def test_a_table_fits_the_terminal_and_keeps_every_cell(width: int) -> None:
    lines = list(table_lines(TABLE, width))
    texts = [text_of(line) for line in lines]
    assert max(map(len, texts)) <= width
    for row in ROWS:
        shown = [text for text in texts if text.startswith(row[0])]
        assert [cell for text in shown for cell in text.removeprefix(row[0]).split("  ") if cell.strip()] == row[1:]
    assert len([text for text in texts if text.startswith("─")]) == {40: 6, 80: 2, 140: 1, 1000: 1}[width]
    bold = [text.strip() for line in lines for text, is_bold in line if is_bold]
    assert sorted(bold) == sorted([ROWS[1][4], ROWS[2][11]])


def test_a_column_that_is_wider_than_the_terminal_is_still_shown() -> None:
    lines = list(table_lines(Table(["a", "b", "c"], [["x", "y" * 99, "z"]]), 40))
    assert any("y" * 99 in text_of(line) for line in lines)
    assert text_of(lines[-1]).split() == ["x", "z"]


def test_tables_without_rows_or_columns_have_a_header() -> None:
    assert [text_of(line).strip() for line in table_lines(Table(["only"], []), 80)] == ["only", "─" * 4]


def test_paragraphs_are_wrapped_and_all_parts_are_there() -> None:
    sections = [
        Section("First", text="word " * 60, table=TABLE, note="a note\n\nanother"),
        Section("Second", samples=[Sample("asked", "wanted", [("m", "got")])]),
    ]
    lines = list(report_lines_for(ReportContent("Title", ["intro"], sections), 80))
    texts = [text_of(line) for line in lines]
    assert max(map(len, texts)) <= 80
    assert [text_of(line) for line in lines if line and line[0][1]] == ["Title", "First", "Second"]
    assert " ".join(texts).count("word") == 60
    assert {"intro", "a note", "another"} <= set(texts)
    assert {"asked", "wanted", "got"} <= {text.strip() for text in texts}
