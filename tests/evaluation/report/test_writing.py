"""`write_report`: numbers, marks, pictures and a page that asks for nothing."""

from __future__ import annotations

import base64
import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from reported import HARD, Page, evaluation, save_run

from kd.evaluation.report.page import Section, Table
from kd.evaluation.report.runs import collect_runs
from kd.evaluation.report.writing import write_report
from kd.evaluation.statistics.estimates import standard_error


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory):
    """A report of two runs, one with its own evaluation, and one evaluation alone."""
    root = tmp_path_factory.mktemp("report")
    plain = save_run(root / "plain-ce", kd=False)
    distilled = save_run(root / "kl", kd=True, name="kl <b>bold</b> | pipe")
    evaluation("/somewhere/private/kl", HARD, 6.5).save(distilled / "eval")
    alone = root / "teacher"
    evaluation("owner/teacher", HARD, 5.25).save(alone)
    return write_report([plain, distilled, alone], root / "out")


def test_the_page_is_well_formed_and_refers_to_nothing_outside(written):
    text = written.page.read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    inside = [address for address in page.addresses if address.startswith("#")]
    assert [f'<section id="{address[1:]}">' in text for address in inside] == [True] * len(inside)
    page.addresses = [address for address in page.addresses if address not in inside]
    assert len(page.addresses) == 2
    assert all(a.startswith("data:image/png;base64,") for a in page.addresses)
    assert re.search(r"url\(|@import|https?://", re.sub(r"base64,[^\"]*", "", text)) is None
    assert base64.b64decode(page.addresses[0].partition(",")[2]) == written.metrics_png.read_bytes()
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


def test_names_reach_the_page_as_text_and_not_as_markup(written):
    page = Page(written.page.read_text("utf-8"))
    assert "b" not in page.tags
    assert "kl <b>bold</b> | pipe" in page.text


def test_every_file_holds_the_numbers(written):
    error = standard_error(np.array(HARD))
    shown = f"6.50 ± {error:.2f}"
    assert shown in written.markdown.read_text("utf-8")
    assert shown in Page(written.page.read_text("utf-8")).text
    with written.csv.open(encoding="utf-8", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert float(rows["owner/teacher"]["value"]) == 5.25
    assert float(rows["owner/teacher"]["stderr"]) == error
    assert [rows[m]["best"] for m in ("owner/teacher", "kl <b>bold</b> | pipe")] == ["1", "0"]
    document = json.loads(written.json.read_text("utf-8"))
    assert document["comparisons"][0]["best"] == {"perplexity": "owner/teacher"}
    assert [r["name"] for r in document["runs"]] == ["plain-ce", "kl <b>bold</b> | pipe"]
    assert document["runs"][0]["last"]["kd"] is None
    # the curve is 2 + 4 exp(-step/20) with noise of 0.1; its mean over a few steps at the end is near 2.2
    assert document["runs"][0]["last"]["ce"] == pytest.approx(2.2, abs=0.15)
    assert document["runs"][1]["last"]["kd"] == pytest.approx(document["runs"][1]["last"]["ce"] / 2)


def test_the_best_figure_is_bold_in_markdown_and_marked_in_the_page(written):
    assert "**5.25 ± 0.78**" in written.markdown.read_text("utf-8")
    assert '<td class="best">5.25 ± 0.78</td>' in written.page.read_text("utf-8")


def test_markdown_rows_have_equal_cells_whatever_the_names(written):
    lines = [line for line in written.markdown.read_text("utf-8").splitlines() if line.startswith("|")]
    cells = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    assert cells[:4] == [cells[0]] * 4


def test_no_path_of_this_machine_is_in_a_report(written):
    for path in (written.markdown, written.page, written.csv, written.json):
        text = path.read_text("utf-8")
        assert "/somewhere" not in text
        assert str(written.page.parent) not in text


def test_pictures_open_and_are_not_blank(written):
    for path in (written.loss_png, written.metrics_png):
        pixels = imread(path)
        assert pixels.shape[0] > 200
        assert pixels.shape[1] > 600
        assert pixels[..., :3].std() > 0.02
        assert pixels[0, 0, :3].tolist() == [1, 1, 1]  # white: the page shows it as a card


def test_a_report_is_the_same_bytes_when_written_again(written, tmp_path):
    folders = [written.page.parent.parent / name for name in ("plain-ce", "kl", "teacher")]
    again = write_report(folders, tmp_path)
    for name in ("markdown", "page", "csv", "json", "loss_png", "metrics_png"):
        assert getattr(again, name).read_bytes() == getattr(written, name).read_bytes()


def test_evaluations_alone_make_no_loss_curve_and_runs_alone_no_bars(tmp_path):
    evaluation("a", HARD, 8.0).save(tmp_path / "a")
    save_run(tmp_path / "r", kd=False)
    assert write_report([tmp_path / "a"], tmp_path / "out-a").loss_png is None
    only_run = write_report([tmp_path / "r"], tmp_path / "out-r")
    assert only_run.metrics_png is None
    assert only_run.loss_png.exists()


def test_sections_of_the_caller_lead_the_report(tmp_path):
    evaluation("a", HARD, 8.0).save(tmp_path / "a")
    lead = Section("What happened", text="Two students.", table=Table(["", "measured"], [["rows", "7"]]))
    files = write_report([tmp_path / "a"], tmp_path / "out", title="kd demo", lead=[lead])
    for text in (files.markdown.read_text("utf-8"), Page(files.page.read_text("utf-8")).text):
        assert (
            text.index("kd demo") < text.index("What happened") < text.index("Two students.") < text.rindex("prose.txt")
        )


def test_equal_names_are_told_apart(tmp_path):
    for folder in ("x", "y"):
        evaluation("/models/kl", HARD, 8.0).save(tmp_path / folder)
    assert [e.name for e in collect_runs([tmp_path / "x", tmp_path / "y"])[1]] == ["kl", "kl (2)"]


def test_names_of_strangers_are_neither_formulas_nor_markup_nor_escapes(tmp_path: Path):
    names = ["=cmd|' !A1", "[x](javascript:y)<script>z", "$\\frac{$ _a\x1b]0;b"]
    for number, name in enumerate(names):
        evaluation(name, HARD, 8.0 - number).save(tmp_path / name.replace("/", ""))
    files = write_report([tmp_path / name.replace("/", "") for name in names], tmp_path / "report")
    for file in (files.csv, files.reference_csv):
        for row in csv.reader(file.read_text().splitlines()):
            assert not any(cell[:1] in tuple("=+@\t") for cell in row), row
    text, page = files.markdown.read_text(), files.page.read_text()
    assert "<script" not in text + page
    assert "](javascript" not in text.replace("\\](", "")
    assert not set(text) & set("\x1b\x07")
    assert "'=cmd|' !A1" in [row[0] for row in csv.reader(files.csv.read_text().splitlines())]
