"""`write_report`: numbers, marks, pictures and a page that asks for nothing."""

from __future__ import annotations

import base64
import csv
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from kd.common.errors import DataError
from kd.evaluation.report.comparison import Entry, compare, short_name, with_error
from kd.evaluation.report.figures import smooth
from kd.evaluation.report.page import Section, Table, markdown_table, render_page
from kd.evaluation.report.runs import collect_runs
from kd.evaluation.report.writing import write_report
from kd.evaluation.results import EvalReport, folders_of, refuse_other_scores
from kd.evaluation.statistics.estimates import standard_error


def evaluation(model: str, influences: list[float], perplexity: float, **changes) -> EvalReport:
    """A report of one task whose perplexity moves with each document as told."""
    figure = {
        "value": perplexity,
        "stderr": standard_error(np.array(influences)),
        "n": 900,
        "over": "token",
        "unit": "per token",
        "better": "lower",
        "title": "perplexity",
    }
    settings = {"text_digest": "d1", "seq_len": 24, "stride": 23, "bos": True, "limit_tokens": None}
    kept = {"digest": "same", "count": len(influences), "influence": {"perplexity": influences}}
    values: dict[str, Any] = {
        "model": model,
        "parameters": 12345,
        "identity": {},
        "tokenizer": "t1",
        "tasks": {"perplexity": {"perplexity": figure}},
        "settings": {"perplexity": settings},
        "data": {"spec": "prose.txt", "split": "heldout"},
        "cache": None,
        "versions": {},
        "documents": {"perplexity": kept},
    }
    return EvalReport(**values | changes)


HARD = [0.45, -0.35, 0.2, -0.3]
"""Documents that are hard for every model: standard error 0.78."""


def best_of(*reports: EvalReport) -> str | None:
    (comparison,) = compare([Entry(r.model, r) for r in reports])
    winner = comparison.best("perplexity")
    return None if winner is None else comparison.entries[winner].name


def test_a_small_difference_is_marked_when_documents_are_hard_for_both():
    easier = [h + e for h, e in zip(HARD, [0.01, -0.02, 0.02, -0.01], strict=True)]
    assert best_of(evaluation("a", HARD, 8.0), evaluation("b", easier, 7.9)) == "b"


def test_the_same_difference_is_not_marked_without_pairing():
    unpaired = evaluation("b", HARD, 7.9, documents={})
    assert best_of(evaluation("a", HARD, 8.0), unpaired) is None
    far = evaluation("b", HARD, 6.0, documents={})  # 2.0 against an error of 0.78 * sqrt(2)
    assert best_of(evaluation("a", HARD, 8.0), far) == "b"


def test_a_difference_within_its_error_is_not_marked():
    assert best_of(evaluation("a", HARD, 8.0), evaluation("b", [-h for h in HARD], 7.0)) is None


def test_one_close_rival_is_enough_to_mark_nothing():
    a, b, c = evaluation("a", HARD, 8.0), evaluation("b", HARD, 9.0), evaluation("c", [-h for h in HARD], 8.1)
    assert best_of(a, b) == "a"
    assert best_of(a, b, c) is None


@pytest.mark.parametrize(
    "changes",
    [
        {
            "settings": {
                "perplexity": {"text_digest": "d1", "seq_len": 48, "stride": 47, "bos": True, "limit_tokens": None}
            }
        },
        {"tokenizer": "t2"},
    ],
)
def test_other_settings_or_another_tokenizer_are_shown_and_not_compared(changes):
    assert best_of(evaluation("a", HARD, 8.0), evaluation("b", HARD, 1.0)) == "b"
    assert best_of(evaluation("a", HARD, 8.0), evaluation("b", HARD, 1.0, **changes)) is None


def test_a_single_document_marks_nothing():
    assert best_of(evaluation("a", [0.0], 8.0), evaluation("b", [0.0], 1.0)) is None


def test_a_value_that_is_not_finite_marks_nothing():
    broken = evaluation("b", HARD, 1.0)
    broken.tasks["perplexity"]["perplexity"]["value"] = None
    (comparison,) = compare([Entry("a", evaluation("a", HARD, 8.0)), Entry("b", broken)])
    assert comparison.best("perplexity") is None
    assert comparison.table().rows[1][2] == "not finite"


def chooser(model: str, accuracy: float, influences: list[float], tokenizer: str = "t1") -> EvalReport:
    """A report of `choices` over six examples of two tasks."""
    figure = {
        "value": accuracy,
        "stderr": standard_error(np.array(influences)),
        "n": 6,
        "over": "example",
        "unit": "share of examples",
        "better": "higher",
        "title": "accuracy",
    }
    part = {**figure, "n": 1, "stderr": None, "title": "accuracy: nli"}
    rest = {**figure, "n": 5, "title": "accuracy: qa"}
    settings = {"text_digest": "d1", "choices_digest": "c1", "separator": "\n", "prompts_cut": 0}
    kept = {"digest": "same", "count": 6, "influence": {"accuracy": influences}, "samples": [{"prompt": "<b>"}]}
    return evaluation(
        model,
        [0.0],
        1.0,
        tokenizer=tokenizer,
        tasks={"choices": {"accuracy": figure, "accuracy/nli": part, "accuracy/qa": rest}},
        settings={"choices": settings},
        documents={"choices": kept},
    )


RIGHT, LESS = [1 / 36] * 5 + [-5 / 36], [1 / 12] * 3 + [-1 / 12] * 3
"""Influences of five right of six, and of three."""


def test_the_higher_accuracy_is_best_whatever_the_tokenizer():
    better, worse = chooser("a", 5 / 6, RIGHT), chooser("b", 1 / 2, LESS, tokenizer="t2")
    for reports in ((better, worse), (worse, better)):
        (comparison,) = compare([Entry(r.model, r) for r in reports])
        winner = comparison.best("accuracy")
        assert winner is not None
        assert comparison.entries[winner].name == "a"
        assert comparison.best("accuracy/nli") is None  # one example has no error


def test_parts_stand_in_the_table_and_not_in_the_note(tmp_path):
    (comparison,) = compare([Entry("a", chooser("a", 5 / 6, RIGHT)), Entry("b", chooser("b", 1 / 2, LESS))])
    assert comparison.table().headers[2:] == ["accuracy ↑", "accuracy: nli ↑", "accuracy: qa ↑"]
    assert comparison.note() == (
        'Over 6 examples, 6 documents, separator "\\n", prompts cut 0. Units: accuracy [share of examples].'
    )
    for name, report in (("a", chooser("a", 5 / 6, RIGHT)), ("b", chooser("b", 1 / 2, LESS))):
        report.save(tmp_path / name)
    files = write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "report")
    assert files.metrics_png is not None
    rows = list(csv.DictReader(files.csv.read_text("utf-8").splitlines()))
    assert [(r["model"], r["metric"], r["better"], r["best"]) for r in rows] == [
        ("a", "accuracy", "higher", "1"),
        ("b", "accuracy", "higher", "0"),
        ("a", "accuracy/nli", "higher", "0"),
        ("b", "accuracy/nli", "higher", "0"),
        ("a", "accuracy/qa", "higher", "1"),
        ("b", "accuracy/qa", "higher", "0"),
    ]


def test_parts_of_a_text_of_one_task_are_not_shown_a_second_time():
    report = chooser("a", 5 / 6, RIGHT)
    report.tasks["choices"]["accuracy_mean_of_tasks"] = report.tasks["choices"].pop("accuracy/qa")
    (comparison,) = compare([Entry("a", report)])
    assert comparison.table().headers[2:] == ["accuracy ↑"]
    assert comparison.metrics == ["accuracy", "accuracy_mean_of_tasks", "accuracy/nli"]  # CSV and JSON hold all


def test_tables_keep_the_order_of_the_registry_whatever_a_file_sorts():
    figure = evaluation("a", HARD, 8.0).tasks["perplexity"]["perplexity"]
    tasks = {
        "agreement": {"top1_agreement": figure, "kl": figure},
        "perplexity": {"bits_per_byte": figure, "perplexity": figure},
    }
    report = evaluation(
        "a", HARD, 8.0, tasks=tasks, settings={"agreement": {"cache_fingerprint": "f"}, "perplexity": {}}
    )
    found = compare([Entry("a", report)])
    assert [(c.task, c.metrics) for c in found] == [
        ("perplexity", ["perplexity", "bits_per_byte"]),
        ("agreement", ["kl", "top1_agreement"]),
    ]


def test_texts_are_not_mixed_in_one_table():
    other = {"perplexity": {"text_digest": "d2", "seq_len": 24}}
    found = compare([Entry("a", evaluation("a", HARD, 8.0)), Entry("b", evaluation("b", HARD, 7.0, settings=other))])
    assert [len(c.entries) for c in found] == [1, 1]


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [(5.27149, 0.0831, "5.271 ± 0.083"), (1234.4, 56.0, "1234 ± 56"), (0.5, 0.0, "0.5"), (2.5, None, "2.5")],
)
def test_values_have_as_many_places_as_their_error_deserves(value, error, expected):
    assert with_error({"value": value, "stderr": error}) == expected


def test_paths_of_one_machine_are_shortened():
    assert [short_name(n) for n in ("/a/b/kl", "../kl/", "owner/name", "demo")] == ["kl", "kl", "owner/name", "demo"]


# --- the whole report -------------------------------------------------------------------------------------------------


def save_run(folder: Path, *, kd: bool, steps: int = 60, **facts) -> Path:
    rng = np.random.default_rng(7)
    folder.mkdir(parents=True)
    lines = []
    for step in range(1, steps + 1):
        ce = 2 + 4 * np.exp(-step / 20) + 0.1 * rng.normal()
        record = {
            "step": step,
            "loss": ce,
            "ce": ce,
            "kd": ce / 2 if kd else None,
            "lr": 1e-3,
            "tokens": 1000 * step,
            "grad_norm": 1.0,
        }
        lines.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    run = {
        "name": folder.name,
        "student": "/models/tiny",
        "loss": "kl" if kd else "ce",
        "teacher": "demo",
        "cache_fingerprint": "f" * 64,
        "settings": {"alpha": 0.5},
        **facts,
    }
    (folder / "run.json").write_text(json.dumps(run))
    return folder


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


class Page(HTMLParser):
    """Tags that are open, links out, pictures, text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "srcset", "action", "data", "poster")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data


def test_the_page_is_well_formed_and_refers_to_nothing_outside(written):
    text = written.page.read_text("utf-8")
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
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
            text.index("kd demo") < text.index("What happened") < text.index("Two students.") < text.index("prose.txt")
        )


def test_equal_names_are_told_apart(tmp_path):
    for folder in ("x", "y"):
        evaluation("/models/kl", HARD, 8.0).save(tmp_path / folder)
    assert [e.name for e in collect_runs([tmp_path / "x", tmp_path / "y"])[1]] == ["kl", "kl (2)"]


def test_an_unfinished_run_is_reported_from_its_configuration(tmp_path):
    folder = save_run(tmp_path / "r", kd=True)
    (folder / "run.json").write_text(json.dumps({"identity": {"student": "tiny", "loss": "kl"}, "complete": False}))
    (run,), _ = collect_runs([folder])
    assert (run.name, run.fact("student"), run.fact("loss"), run.fact("teacher")) == ("r", "tiny", "kl", None)


def test_a_torn_last_line_is_left_out_and_a_torn_middle_line_is_an_error(tmp_path):
    folder = save_run(tmp_path / "r", kd=False)
    path = folder / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    (run,), _ = collect_runs([folder])
    assert [r["step"] for r in run.records] == [1, 2]
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "lo\n{"step": 3, "loss": 1.0}\n')
    with pytest.raises(DataError, match="step record") as error:
        collect_runs([folder])
    assert str(error.value.details["where"]).endswith("line 2")


def test_a_step_logged_twice_counts_once_the_later(tmp_path):
    folder = save_run(tmp_path / "r", kd=False)
    (folder / "metrics.jsonl").write_text(
        '{"step": 2, "loss": 9.0}\n{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.0}\n'
    )
    (run,), _ = collect_runs([folder])
    assert [(r["step"], r["loss"]) for r in run.records] == [(1, 3.0), (2, 2.0)]


def test_losses_that_are_not_finite_are_left_out_of_the_curve(tmp_path):
    folder = save_run(tmp_path / "r", kd=False, steps=3)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": 2.0}\n')
    (run,), _ = collect_runs([folder])
    assert run.series("loss").values.tolist() == [2.0]
    assert write_report([folder], tmp_path / "out").loss_png.exists()


def test_the_folder_of_several_models_evaluations_stands_for_them_in_their_order(tmp_path):
    models = [f"m{i}" for i in range(11)]
    for model, folder in zip(models, folders_of(tmp_path, models), strict=True):
        evaluation(model, HARD, 8.0).save(folder)
    _, entries = collect_runs([tmp_path])
    assert [e.name for e in entries] == models  # 10 after 9
    assert folders_of(tmp_path, ["one"]) == [tmp_path]


def test_scores_of_other_models_or_tasks_are_not_overwritten_or_mixed(tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    evaluation("a", HARD, 8.0).save(alone)
    for model, folder in zip("ab", folders_of(both, ["a", "b"]), strict=True):
        evaluation(model, HARD, 8.0).save(folder)
    refuse_other_scores(alone, ["a"], ["perplexity", "hellaswag"])  # the same again
    refuse_other_scores(both, ["a", "b"], ["perplexity"])
    refuse_other_scores(tmp_path / "new", ["a", "b"], ["perplexity"])
    for out, models, tasks in (
        (alone, ["b"], ["perplexity"]),
        (alone, ["a"], ["samples"]),
        (alone, ["a", "b"], ["perplexity"]),
        (both, ["a"], ["perplexity"]),
        (both, ["a", "c"], ["perplexity"]),
        (both, ["c", "b"], ["perplexity"]),
    ):
        with pytest.raises(DataError, match="other scores"):
            refuse_other_scores(out, models, tasks)
    report = evaluation("a", HARD, 8.0)
    replace(report, tasks=report.tasks | {"hellaswag": report.tasks["perplexity"]}).save(alone)
    with pytest.raises(DataError, match="hellaswag"):  # it would be lost
        refuse_other_scores(alone, ["a"], ["perplexity"])
    refuse_other_scores(alone, ["a"], ["hellaswag", "perplexity"])


@pytest.mark.parametrize("make", [lambda p: p / "absent", lambda p: p])
def test_a_directory_that_is_neither_is_refused(tmp_path, make):
    with pytest.raises(DataError, match="neither an evaluation nor a training run"):
        write_report([make(tmp_path)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_smoothing_keeps_a_constant_and_calms_noise():
    assert smooth(np.full(50, 3.25)) == pytest.approx(np.full(50, 3.25), rel=1e-12)
    assert smooth(np.array([7.0])).tolist() == [7.0]
    values = np.random.default_rng(0).normal(size=400)
    assert smooth(values).std() < 0.5 * values.std()  # weights fall by half every 4 records: about 11 of them count


def test_smoothing_does_not_lag_behind_a_slope():
    line = np.linspace(7.0, 2.0, 500)
    assert smooth(line)[100:400] == pytest.approx(line[100:400], abs=1e-6)  # the window's ends are 2^-20 of its middle
    values = np.random.default_rng(0).normal(size=80)
    assert smooth(values[::-1]) == pytest.approx(smooth(values)[::-1], rel=1e-9)


def test_smoothing_equals_a_double_loop():
    values = np.random.default_rng(1).normal(size=30)
    keep = 0.5  # 1 % of 30 records is less than one: the half-life is a record
    weights = keep ** np.abs(np.arange(30)[:, None] - np.arange(30)[None, :])
    assert smooth(values) == pytest.approx(weights @ values / weights.sum(1), rel=1e-12)


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
