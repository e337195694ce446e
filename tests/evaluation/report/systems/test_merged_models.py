"""The final table of merged classifiers, from the folders of merges and of a matrix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.common.errors import DataError
from kd.evaluation.merged.glue_figures import Score
from kd.evaluation.merged.glue_table import GlueTable
from kd.evaluation.report.writing import write_report

TASKS = ("cola", "mrpc")


def glue_table(title: str, rows: dict[str, list[float]]) -> GlueTable:
    scores = {
        label: {
            task: {"accuracy": Score(v, 0.03, 100), "loss": Score(1.0, 0.1, 100)}
            for task, v in zip(TASKS, values, strict=True)
        }
        for label, values in rows.items()
    }
    return GlueTable(title, TASKS, scores)


def save_merge(
    folder: Path, method: str, table: GlueTable | None, scaling: float | None, chosen_on: str | None
) -> Path:
    """`merge.json` as `kd merge` writes it."""
    folder.mkdir(parents=True)
    result: dict[str, Any] = {"method": method, "scaling": scaling, "table": table and table.to_dict()}
    (folder / "merge.json").write_text(json.dumps({"format": "kd-merge", "select_on": chosen_on, "result": result}))
    return folder


@pytest.fixture
def merges(tmp_path: Path) -> list[Path]:
    matrix = {"most frequent class": [0.6, 0.7], "_pretrained_": [0.5, 0.4], "cola": [0.8, 0.3], "mrpc": [0.2, 0.9]}
    (tmp_path / "matrix").mkdir()
    glue_table("backbone", matrix).save(tmp_path / "matrix", "matrix")
    sweep = glue_table("scaling", {"0": [0.5, 0.4], "0.5": [0.7, 0.75], "1": [0.6, 0.8]})
    return [
        save_merge(
            tmp_path / "average", "simple-average", glue_table("method", {"simple-average": [0.6, 0.5]}), None, None
        ),
        save_merge(tmp_path / "ties", "ties", sweep, 0.5, "dev"),
        tmp_path / "matrix",
    ]


def rows_of(markdown: str, heading: str) -> dict[str, list[str]]:
    section = markdown.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ") and ":--" not in line]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_the_final_table_has_a_row_per_method_and_the_best_average_in_bold(merges: list[Path], tmp_path: Path) -> None:
    files = write_report(merges, tmp_path / "report")
    text = files.markdown.read_text("utf-8")
    rows = rows_of(text, "Methods")
    assert rows["method"] == [*TASKS, "average"]
    error = f"± {100 * np.hypot(0.03, 0.03) / 2:.1f}"
    assert rows["fine-tuned, own backbone"] == ["80.0 ± 3.0", "90.0 ± 3.0", f"85.0 {error}"]
    assert rows["base, not fine-tuned"][-1] == f"45.0 {error}"
    assert rows["simple-average"] == ["60.0 ± 3.0", "50.0 ± 3.0", f"55.0 {error}"]
    assert rows["ties, λ = 0.5"] == ["70.0 ± 3.0", "75.0 ± 3.0", f"**72.5 {error}**"]
    assert list(rows)[1] == "most frequent class"
    assert "The λ of ties is the best of 3 on the rows that it is scored on here." in text
    assert list(rows_of(text, "Sweep of ties"))[1:] == ["0", "0.5", "1"]
    assert rows_of(text, "Every backbone under every head")["mrpc"][:2] == ["20.0 ± 3.0", "90.0 ± 3.0"]
    assert "2 merges and matrices" not in text
    assert "3 merges and matrices" in text


def test_merges_and_runs_may_stand_in_one_report(merges: list[Path], tmp_path: Path) -> None:
    from reported import HARD, evaluation

    evaluation("owner/m", HARD, 8.0).save(tmp_path / "scored")
    text = write_report([*merges, tmp_path / "scored"], tmp_path / "report").markdown.read_text("utf-8")
    assert "## Methods" in text
    assert "owner/m" in text


def test_a_merge_that_was_not_scored_and_a_strange_file_are_refused(merges: list[Path], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="without scores"):
        write_report([save_merge(tmp_path / "m", "regmean", None, None, None)], tmp_path / "report")
    (merges[0] / "merge.json").write_text('{"result": {}}')
    with pytest.raises(DataError, match="no table of merged classifiers"):
        write_report(merges, tmp_path / "report")
    with pytest.raises(DataError, match="nothing to report"):
        write_report([], tmp_path / "report")
