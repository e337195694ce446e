"""Of the examples of a source, those without text and those beyond the limit are left out and counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from table_files import ROWS, write

from kd.common.errors import DataError
from kd.data.sources import load_corpus


def test_empty_examples_are_left_out_and_nothing_else(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"text": " \n"}, {"text": "a"}, {"text": None}, {"text": ""}, {"text": "b"}])
    corpus = load_corpus(str(path))
    assert [(e.id, e.target) for e in corpus.examples] == [("t.jsonl:1", "a"), ("t.jsonl:4", "b")]
    assert corpus.left_out.document() == {"without_text": {"count": 3, "first": "t.jsonl:0"}}
    assert load_corpus(str(path), limit=1).left_out.counts == {"without_text": 3, "beyond_limit": 1}


def test_a_pair_needs_no_target_where_the_teacher_answers(tmp_path: Path):
    rows: list[dict[str, str | None]] = [
        {"prompt": "p", "target": ""},
        {"prompt": "q", "target": "answer"},
        {"prompt": "r", "target": None},
    ]
    path = str(write(tmp_path / "t.jsonl", [*rows, {"prompt": " ", "target": ""}]))
    asked = load_corpus(path, prompts=True)
    assert [e.prompt for e in asked.examples] == ["p", "q", "r"]
    assert asked.left_out.counts == {"without_text": 1}
    assert [e.prompt for e in load_corpus(path).examples] == ["q"]


def test_no_text_at_all_is_refused(tmp_path: Path):
    (tmp_path / "t.txt").write_text(" \n\n")
    with pytest.raises(DataError, match="no text found"):
        load_corpus(str(tmp_path / "t.txt"))


def test_limit_keeps_the_first_examples(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", ROWS)
    assert load_corpus(str(path), limit=2).examples == load_corpus(str(path)).examples[:2]


def test_a_limit_does_not_take_one_label_of_rows_sorted_by_label(tmp_path: Path):
    from kd.data.sources import load_classes

    rows = [{"sentence": f"s{i}", "label": int(i >= 200)} for i in range(400)]
    write(tmp_path / "glue" / "sst2" / "train.jsonl", rows)
    spec = str(tmp_path / "glue" / "sst2")
    assert {e.target for e in load_corpus(spec).examples[:100]} == {"negative"}
    for load in (load_corpus, load_classes):
        corpus = load(spec, limit=100)
        assert {e.target for e in corpus.examples} == {"negative", "positive"}
        assert corpus.left_out.counts == {"beyond_limit": 300}
