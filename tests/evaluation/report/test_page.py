"""The page and its Markdown twin: nothing from outside, and every text as text."""

from __future__ import annotations

import pytest
from reported import Page

from kd.common.errors import DataError
from kd.evaluation.report.page import Section, Table, markdown_table, render_page


def test_a_page_with_text_and_a_table_alone():
    text = render_page(
        "A & B", ["first", "<second>"], [Section("Part", text="1 < 2", table=Table(["n", "x"], [["a", "1"]]))]
    )
    page = Page(text)
    assert page.open == []
    for part in ("A & B", "first", "<second>", "Part", "1 < 2"):
        assert part in page.text
    assert "second" not in page.tags


def test_an_image_that_is_no_png_is_refused(tmp_path):
    (tmp_path / "x.png").write_bytes(b"<svg onload=alert(1)>")
    with pytest.raises(DataError, match="not a PNG"):
        render_page("t", [], [Section("s", image=tmp_path / "x.png")])


def test_a_ragged_table_is_refused():
    with pytest.raises(DataError, match="does not fit its header"):
        Table(["a", "b"], [["1"]])


def test_markdown_escapes_pipes_newlines_and_tags():
    row = markdown_table(Table(["a", "b"], [["x|y\nz", "<img>"]])).splitlines()[2]
    assert row == "| x\\|y z | &lt;img&gt; |"
