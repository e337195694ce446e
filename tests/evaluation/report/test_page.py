"""The page and its Markdown twin: nothing from outside, and every text as text."""

from __future__ import annotations

import re

import pytest
from reported import Page

from kd.common.errors import DataError
from kd.evaluation.report.exports import report_markdown
from kd.evaluation.report.page import (
    Sample,
    Section,
    Table,
    markdown_samples,
    markdown_table,
    render_page,
    visible,
)


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


def test_a_long_page_has_contents_that_lead_to_its_sections():
    sections = [Section(f"Part {n} <b>", text="x") for n in range(5)]
    html = render_page("T", [], sections)
    targets = re.findall(r'<a href="#(s\d+)">', html)
    assert targets == re.findall(r'<section id="(s\d+)">', html) == [f"s{n}" for n in range(1, 6)]
    assert '<a href="#s1">Part 0 &lt;b&gt;</a>' in html
    assert "<nav" not in render_page("T", [], sections[:3])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", "(empty)"),
        ("  \n", "(white space alone: 2 spaces, 1 line end)"),
        ("\t\u00a0", "(white space alone: 1 tab, 1 other white space)"),
        (" yes", " yes"),
    ],
)
def test_an_answer_of_white_space_is_shown_as_such(text, shown):
    assert visible(text) == shown
    sample = Sample("Is it?", None, [("model", text)])
    assert f"<dd>{shown}</dd>" in render_page("T", [], [Section("S", samples=[sample])])
    assert shown.strip() in markdown_samples([sample])


def test_commands_are_shown_as_they_are_typed():
    lines = ["kd train --loss kl", "kd eval '<x>'"]
    assert "<pre>kd train --loss kl\nkd eval &#39;&lt;x&gt;&#39;\n</pre>" in render_page(
        "T", [], [Section("S", lines=lines)]
    )
    assert "    kd train --loss kl\n    kd eval '<x>'\n" in report_markdown("T", [], [Section("S", lines=lines)])
