"""Tables in a system's own form: every cell against a plain recomputation, the marks, and what was published."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from system_reports import FAMILY, STUDENTS, Scores, made_up_scores, save_student, save_system, system_report

from kd.common.errors import DataError
from kd.evaluation.report.systems.system_table import as_printed, millions
from kd.evaluation.report.systems.table_file import load_table
from kd.evaluation.report.writing import ReportFiles, write_report

ELEVEN = {
    "BoolQ": "accuracy/boolq",
    "SQuAD F1": "squad_f1/squad",
    "SAMSum R-L": "rougeL/samsum",
    "SAMSum BERTScore": "bertscore/samsum",
    "ANLI": "accuracy/anli_r1",
    "PAWS": "accuracy/paws",
    "XSum R-L": "rougeL/xsum",
    "XSum BERTScore": "bertscore/xsum",
    "CommonGen R-L": "rougeL/common_gen",
    "CommonGen coverage": "coverage/common_gen",
    "CosmosQA": "accuracy/cosmos_qa",
}
"""The columns of system 001, as it has them."""
FOUR = {
    "ANLI": "choice_match/anli_r1",
    "BoolQ": "choice_match/boolq",
    "CommonGen ROUGE-1": "rouge1/common_gen",
    "XSum ROUGE-Lsum": "rougeLsum/xsum",
}
Known = Mapping[tuple[str, str], Scores]


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ReportFiles, Known]:
    """The folder, the report with the table of system 001 and published figures, and the scores behind it."""
    root = tmp_path_factory.mktemp("system")
    folders, known = save_system(root / "runs")
    return root, write_report(folders, root / "report", table="oscarnav-ten", published=True), known


def name_of(label: str) -> str:
    """The folder of a measured row."""
    name = label.removeprefix("google/").removesuffix(" (4 bits)")
    return name.replace(" FT", "-ce").replace(" KD", "-uld")


def expected_cells(scores: Scores) -> dict[str, float]:
    """Every column of a row in percent, worked out from the scores of single examples."""
    cells = {title: 100 * sum(scores[metric].tolist()) / len(scores[metric]) for title, metric in ELEVEN.items()}
    by_task: dict[str, list[float]] = {}
    for title, metric in ELEVEN.items():
        by_task.setdefault(metric.partition("/")[2], []).append(cells[title])
    assert len(by_task) == 8
    means = {
        "mean of 11 metrics": sum(cells.values()) / 11,
        "mean of 8 tasks": sum(sum(values) / len(values) for values in by_task.values()) / 8,
    }
    return cells | means


def test_every_cell_is_the_mean_of_its_examples(system) -> None:
    _, files, known = system
    with files.system_csv.open(encoding="utf-8") as file:
        cells = [row for row in csv.DictReader(file) if row["published"] == "0"]
    assert len(cells) == 2 * 11 * 13  # blocks, models, columns
    for cell in cells:
        scores = known[(name_of(cell["model"]), cell["block"])]
        assert float(cell["value"]) == pytest.approx(expected_cells(scores)[cell["column"]], abs=1e-9)
        if cell["column"] in ELEVEN:
            values = scores[ELEVEN[cell["column"]]]
            assert float(cell["error"]) == pytest.approx(100 * np.std(values, ddof=1) / np.sqrt(len(values)), rel=1e-6)


def test_rows_are_the_family_and_then_the_pairs(system) -> None:
    _, files, _ = system
    blocks = json.loads(files.json.read_text("utf-8"))["system"]
    assert [block["split"] for block in blocks] == ["train", "test"]
    assert [block["columns"] for block in blocks] == [[*ELEVEN, "mean of 11 metrics", "mean of 8 tasks"]] * 2
    for block in blocks:
        labels = [row["label"] for row in block["rows"] if not row["published"]]
        students = [s.rpartition("/")[2] for s in STUDENTS]
        assert labels == [
            *(f"google/flan-t5-{size}" + (" (4 bits)" if "x" in size else "") for size in FAMILY),
            *(f"{student} {kind}" for student in students for kind in ("FT", "KD")),
        ]
        counts = [row["parameters"] for row in block["rows"] if not row["published"]]
        assert counts == [*FAMILY.values(), *(n for n in STUDENTS.values() for _ in range(2))]


def test_the_better_of_a_pair_is_bold_and_a_star_is_the_verdict_of_the_test(system) -> None:
    _, files, known = system
    for block in json.loads(files.json.read_text("utf-8"))["system"]:
        bold = {row["label"]: row["better_of_pair"] for row in block["rows"] if not row["published"]}
        for student in (s.rpartition("/")[2] for s in STUDENTS):
            ft, kd = (expected_cells(known[(f"{student}-{loss}", block["split"])]) for loss in ("ce", "uld"))
            assert bold[f"{student} KD"] == [title for title in ft if kd[title] >= ft[title]]
            assert bold[f"{student} FT"] == [title for title in ft if kd[title] <= ft[title]]
        assert not any(bold[label] for label in bold if "flan" in label)
    text = files.markdown.read_text("utf-8")
    (line,) = (line for line in text.splitlines() if line.startswith("| gpt2-medium KD") and "**62.5" in line)
    assert "**62.5 ± 7.8\\*** |" in line
    assert "gpt2-medium KD against gpt2-medium FT: ahead in 11 of 11 columns (11 beyond the error)" in text


def test_a_star_needs_the_corrected_interval(tmp_path: Path) -> None:
    """Two students that differ by less than their error: the better one is bold, and nobody has a star."""
    scores = {loss: made_up_scores(7, 0.5, examples=30) for loss in ("ce", "uld")}
    scores["uld"]["accuracy/boolq"] = np.roll(scores["ce"]["accuracy/boolq"], 1)
    scores["uld"]["accuracy/boolq"][0] = 1 - scores["uld"]["accuracy/boolq"][0]
    folders = [save_student(tmp_path / loss, "a/tiny", loss, {"test": s}, 5000) for loss, s in scores.items()]
    files = write_report(folders, tmp_path / "report", table="oscarnav-ten")
    (block,) = json.loads(files.json.read_text("utf-8"))["system"]
    marked = {row["label"]: row["better_of_pair"] for row in block["rows"]}
    assert sum("BoolQ" in titles for titles in marked.values()) == 1
    assert sum("PAWS" in titles for titles in marked.values()) == 2  # equal: both are the better one
    table = files.markdown.read_text("utf-8").partition("Figures are over")[0]
    assert "\\*" not in table
    assert "| 0.005 |" in table


def test_published_rows_stand_below_their_model_and_only_where_they_were_asked_for(system, tmp_path: Path) -> None:
    root, files, _ = system
    rows = json.loads(files.json.read_text("utf-8"))["system"][1]["rows"]
    labels = [row["label"] for row in rows]
    assert labels[labels.index("gpt2-medium KD") + 1] == "published: GPT-2-Med KD"
    row = rows[labels.index("published: GPT-2-Med KD")]
    assert (row["parameters"], row["published"], row["values"][-2:]) == (None, True, [54.24, 54.74])
    text = files.markdown.read_text("utf-8")
    assert "| published: Pythia-410M FT |" in text
    assert "they were worked out from its cells" in text
    plain = write_report([root / "runs"], tmp_path / "plain", table="oscarnav-ten")
    assert "published" not in plain.markdown.read_text("utf-8").lower()


def test_system_000_has_its_four_columns(system, tmp_path: Path) -> None:
    root, _, known = system
    files = write_report([root / "runs"], tmp_path / "four", table="oscarnav-four", published=True)
    for block in json.loads(files.json.read_text("utf-8"))["system"]:
        assert block["columns"] == list(FOUR)
        for row in block["rows"]:
            if not row["published"]:
                scores = known[(name_of(row["label"]), block["split"])]
                assert row["values"] == pytest.approx([scores[m].mean() for m in FOUR.values()])
    text = files.markdown.read_text("utf-8")
    assert "| published: FLAN-T5-Large |  | 0.298 | 0.634 | – | – |" in text


def test_a_published_row_of_a_model_that_was_not_measured_comes_last(tmp_path: Path) -> None:
    system_report("some/model", "test", made_up_scores(1, 0.5)).save(tmp_path / "one")
    files = write_report([tmp_path / "one"], tmp_path / "report", table="oscarnav-ten", published=True)
    rows = json.loads(files.json.read_text("utf-8"))["system"][0]["rows"]
    assert [row["published"] for row in rows] == [False] + [True] * 6


def test_a_mean_is_never_over_fewer_columns_than_it_says(tmp_path: Path) -> None:
    scores = {m: v for m, v in made_up_scores(1, 0.5).items() if not m.startswith("bertscore/")}
    system_report("some/model", "test", scores).save(tmp_path / "one")
    files = write_report([tmp_path / "one"], tmp_path / "report", table="oscarnav-ten")
    (row,) = json.loads(files.json.read_text("utf-8"))["system"][0]["rows"]
    assert row["values"][-2:] == [None, None]
    assert "Not measured: SAMSum BERTScore, XSum BERTScore, mean of 11 metrics, mean of 8 tasks." in (
        files.markdown.read_text("utf-8")
    )


def test_models_that_were_asked_other_rows_are_named_and_left_out(tmp_path: Path) -> None:
    for number, (model, digest) in enumerate((("a", "test"), ("b", "test"), ("c", "first hundred"))):
        settings = {task: {"text_digest": digest} for task in ("choices", "generation")}
        report = system_report(model, "test", made_up_scores(number, 0.5), settings=settings)
        report.save(tmp_path / model)
    files = write_report([tmp_path / m for m in "abc"], tmp_path / "report", table="oscarnav-ten")
    (block,) = json.loads(files.json.read_text("utf-8"))["system"]
    assert [row["label"] for row in block["rows"]] == ["a", "b"]
    assert "Measured on another reading of the text, and left out: c." in files.markdown.read_text("utf-8")


def test_a_table_of_which_nothing_was_measured_says_what_there_is(tmp_path: Path) -> None:
    scores = {m: v for m, v in made_up_scores(1, 0.5).items() if m in ("accuracy/boolq",)}
    for split, name in (("dev", "oscarnav-ten"), ("test", "neo-wikitext")):
        system_report("some/model", split, scores).save(tmp_path / split)
        with pytest.raises(DataError, match="nothing of the table was measured") as caught:
            write_report([tmp_path / split], tmp_path / "report", table=name)
        assert f"accuracy/boolq ({split})" in str(caught.value.details["found"])
        assert "accuracy" in str(caught.value.details["expected"]) or "acc_nanogpt" in str(caught.value)
    assert not (tmp_path / "report" / "report.md").exists()


def test_one_model_of_several_arms_may_beat_the_baseline_and_equal_names_are_told_apart(tmp_path: Path) -> None:
    qualities = {"ce": 0.4, "uld": 0.5, "kl": 0.8}
    folders = [
        save_student(tmp_path / loss, "a/tiny", loss, {"test": made_up_scores(3, quality)}, 2_000_000)
        for loss, quality in qualities.items()
    ]
    files = write_report(folders, tmp_path / "report", table="oscarnav-ten")
    (block,) = json.loads(files.json.read_text("utf-8"))["system"]
    bold = {row["label"]: len(row["better_of_pair"]) for row in block["rows"]}
    assert bold == {"tiny FT": 0, "tiny KD (uld)": 0, "tiny KD (kl)": 13}


@pytest.mark.parametrize(("count", "shown"), [(783_150_080, "783.2"), (11_135_332_352, "11,135.3"), (12_345, "0.0123")])
def test_parameters_are_in_millions(count: int, shown: str) -> None:
    assert millions(count) == shown


def test_published_figures_keep_their_digits() -> None:
    assert [as_printed(55.15, 1), as_printed(58.8, 1), as_printed(58.0, 1), as_printed(0.298, 3)] == [
        *("55.15", "58.8", "58.0", "0.298")
    ]


def test_the_tables_hold_the_published_figures_and_no_others() -> None:
    """Every figure of the package's tables, in one place: what a reader compares with the source."""
    ten = {(r.label, b): list(f.values()) for r in load_table("oscarnav-ten").published for b, f in r.figures.items()}
    assert ten == {
        ("GPT-2-Med FT", "train"): [55.15, 55.74],
        ("GPT-2-Med KD", "train"): [60.48, 60.94],
        ("Pythia-410M FT", "train"): [58.80, 59.71],
        ("Pythia-410M KD", "train"): [58.07, 59.34],
        ("SmolLM-360M FT", "train"): [58.94, 59.41],
        ("SmolLM-360M KD", "train"): [55.14, 56.63],
        ("GPT-2-Med FT", "test"): [50.26, 51.13],
        ("GPT-2-Med KD", "test"): [54.24, 54.74],
        ("Pythia-410M FT", "test"): [50.58, 50.07],
        ("Pythia-410M KD", "test"): [52.54, 52.33],
        ("SmolLM-360M FT", "test"): [51.84, 51.32],
        ("SmolLM-360M KD", "test"): [55.85, 54.93],
    }
    (row,) = load_table("oscarnav-four").published
    assert dict(row.figures) == {"test": {"ANLI": 0.298, "BoolQ": 0.634}}
    neo = {row.model: list(row.figures[""].values()) for row in load_table("neo-wikitext").published}
    assert neo == {"openai-community/gpt2": [0.2859, 0.2955], "openai-community/gpt2-xl": [0.3842, 0.4893]}
