"""GLUE's rows: the table, files of a folder, and specs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.data.instruction_tasks.glue import glue_tasks, is_glue, load_glue
from kd.data.sources import load_corpus


def test_the_table_holds_the_seven_tasks_in_order() -> None:
    tasks = glue_tasks()
    assert list(tasks) == ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2"]
    assert {n: len(t.labels) for n, t in tasks.items() if len(t.labels) != 2} == {"mnli": 3}
    assert tasks["rte"].labels[0] == tasks["qnli"].labels[0] == tasks["mnli"].labels[0] == "entailment"
    assert tasks["mnli"].dev == "validation_matched"


def test_every_file_name_of_the_real_folders_is_understood(shared: Path) -> None:
    for task in glue_tasks():
        for split, least in (("train", 2000), ("dev", 200)):
            labelled = load_glue(str(shared / "glue" / task), split=split)
            assert len(labelled.rows) >= least
            assert labelled.source["source"] == "local"
            assert {row.label for row in labelled.rows} == set(range(len(labelled.task.labels)))


def test_a_task_and_a_root_name_the_same_rows_as_a_folder(glue_root: Path) -> None:
    by_root, by_folder = load_glue(task="mnli", task_root=glue_root), load_glue(str(glue_root / "mnli"))
    assert by_root.rows == by_folder.rows
    assert by_root.digest == by_folder.digest
    assert load_glue(task="mnli", task_root=glue_root, limit=3).rows == by_root.rows[:3]
    assert load_glue(task="mnli", task_root=glue_root, split="validation").split == "dev"


def test_a_folder_called_glue_is_a_data_spec_of_pairs(glue_root: Path) -> None:
    corpus = load_corpus(str(glue_root / "mrpc"), split="dev")
    assert corpus.kind == "pairs"
    first = corpus.examples[0]
    assert first.choices == ("not_equivalent", "equivalent")
    assert first.target == first.choices[first.answer or 0]
    assert first.prompt.count("\n") == 1
    assert is_glue("glue/sst2")
    assert not is_glue("glue/wnli")
    assert not is_glue("superglue/rte")


def test_csv_and_jsonl_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [{"sentence": "good", "label": 1}, {"sentence": "bad, really", "label": 0}]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "b" / "train.csv").write_text('sentence,label\ngood,1\n"bad, really",0\n')
    assert load_glue(str(tmp_path / "a"), task="sst2").rows == load_glue(str(tmp_path / "b"), task="sst2").rows


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"sentence": "x", "label": -1}, "label is out of bounds"),
        ({"sentence": "x", "label": 2}, "label is out of bounds"),
        ({"sentence": None, "label": 1}, "not text"),
        ({"text": "x", "label": 1}, "columns are missing"),
    ],
)
def test_rows_that_cannot_be_are_refused(tmp_path: Path, row: dict[str, object], message: str) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=message):
        load_glue(str(tmp_path), task="cola")


def test_unknown_tasks_splits_and_folders_are_refused(glue_root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown GLUE task"):
        load_glue("glue/wnli")
    with pytest.raises(DataError) as caught:
        load_glue(str(glue_root / "cola"), split="test")
    assert "no labels" in str(caught.value)
    with pytest.raises(DataError, match="no such file"):
        load_glue(str(tmp_path / "absent"), task="cola")
    with pytest.raises(DataError, match="no file of the split"):
        load_glue(str(tmp_path), task="cola")
    with pytest.raises(DataError, match="no files of the task"):
        load_glue(task="cola", task_root=tmp_path)
