"""The format of a table: by its columns, or by name; and rows that cannot be read, stopped at or counted."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import kd
from kd.common.errors import DataError
from kd.data.corpus import Corpus
from kd.data.rows.row_reading import FORMATS, RowReading
from kd.data.sources import load_corpus

TALK = [{"role": "user", "content": "Two plus two?"}, {"role": "assistant", "content": "Four."}]
ALL = {
    "text": "A text.",
    "prompt": "2+2=",
    "target": "4",
    "messages": TALK,
    "conversations": [{"from": "human", "value": "Two plus two?"}, {"from": "gpt", "value": "Four."}],
    "instruction": "Two plus two?",
    "output": "Four.",
}
"""A row that is of every format but one."""


def write(file: Path, rows: list[Any]) -> Path:
    """Rows as JSON, compressed where the suffix says so."""
    data = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows).encode()
    if file.suffix == ".zst":
        data = pa.compress(data, codec="zstd", asbytes=True)
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def said(corpus: Corpus) -> list[str]:
    return [example.target for example in corpus.examples]


@pytest.mark.parametrize("form", [name for name in FORMATS if name != "prompt-completion"])
def test_the_format_says_what_a_row_of_many_columns_is(form: str, tmp_path: Path) -> None:
    corpus = load_corpus(str(write(tmp_path / "t.jsonl", [ALL])), form=form)
    expected = {"text": ("documents", "A text."), "pairs": ("pairs", "4")}
    kind, target = expected.get(form, ("conversations", "Four."))
    assert (corpus.kind, said(corpus)) == (kind, [target])


def test_prompt_and_completion_are_read_from_lists_alone(tmp_path: Path) -> None:
    file = write(tmp_path / "t.jsonl", [{"prompt": TALK[:1], "completion": TALK[1:]}])
    assert load_corpus(str(file)).kind == load_corpus(str(file), form="prompt-completion").kind == "conversations"
    texts = write(tmp_path / "u.jsonl", [{"prompt": "2+2=", "completion": "4"}])
    with pytest.raises(DataError, match=r"field prompt(.|\n)*a list as JSON"):
        load_corpus(str(texts), form="prompt-completion")
    pairs = load_corpus(str(texts), form="pairs", columns={"target": "completion"})
    assert (pairs.kind, said(pairs)) == ("pairs", ["4"])


def test_a_column_of_another_name_says_the_format(tmp_path: Path) -> None:
    rows = [{"dialogue": TALK, "functions": [{"name": "add"}], "key": "a", "text": "no"}]
    file = str(write(tmp_path / "t.jsonl", rows))
    columns = {"messages": "dialogue", "tools": "functions", "id": "key"}
    (example,) = load_corpus(file, columns=columns).examples
    assert (example.id, example.target) == ("a", "Four.")
    assert example.conversation is not None
    assert example.conversation.tools == ({"name": "add"},)
    with pytest.raises(DataError, match=r"an id is missing(.|\n)*column key"):
        load_corpus(
            str(write(tmp_path / "u.jsonl", [{"dialogue": TALK, "key": None}])), columns=columns | {"tools": "key"}
        )


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    file = str(write(tmp_path / "t.jsonl", [ALL]))
    with pytest.raises(DataError, match="unknown field in --columns"):
        load_corpus(file, form="messages", columns={"text": "text"})
    with pytest.raises(DataError, match="belong to several formats"):
        load_corpus(file, columns={"text": "text", "messages": "messages"})
    with pytest.raises(DataError, match=r"columns are missing(.|\n)*expected  completion"):
        load_corpus(file, form="prompt-completion")
    (tmp_path / "t.txt").write_text("A text.")
    with pytest.raises(DataError, match="a plain text has no columns"):
        load_corpus(str(tmp_path / "t.txt"), form="messages")
    assert load_corpus(str(tmp_path / "t.txt"), form="text").kind == "documents"
    for spec, form, bad_rows in (
        ("demo", "messages", "error"),
        ("flan:boolq", "pairs", "error"),
        ("flan:boolq", "auto", "skip"),
    ):
        with pytest.raises(DataError, match=r"several formats|--format|--bad-rows"):
            load_corpus(spec, form=form, bad_rows=bad_rows)


@pytest.mark.parametrize("name", ["t.jsonl", "t.json", "t.csv", "t.tsv", "t.parquet", "t.jsonl.gz", "t.json.zst"])
def test_conversations_are_the_same_in_every_kind_of_file(name: str, tmp_path: Path) -> None:
    import csv

    rows = [{"messages": TALK, "tools": [{"name": "add"}]}, {"messages": TALK[:1] * 2 + TALK[1:], "tools": None}]
    file = tmp_path / "talks" / name
    file.parent.mkdir()
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif name.endswith("sv"):
        with file.open("w", newline="") as opened:
            writer = csv.writer(opened, delimiter="\t" if name.endswith(".tsv") else ",")
            writer.writerow(["messages", "tools"])
            writer.writerows([json.dumps(row["messages"]), json.dumps(row["tools"])] for row in rows)
    else:
        write(file, rows)
    plain = load_corpus(str(write(tmp_path / "plain.jsonl", rows)))
    for spec in (file, file.parent, file.parent / "*.*"):
        corpus = load_corpus(str(spec))
        assert corpus.kind == "conversations"
        talks = [example.conversation for example in corpus.examples]
        assert [(t.messages, t.tools) for t in talks if t] == [
            (e.conversation.messages, e.conversation.tools) for e in plain.examples if e.conversation
        ]


def test_a_folder_that_datasets_saved_is_read(tmp_path: Path) -> None:
    import datasets

    rows = datasets.Dataset.from_list([{"messages": TALK}, {"messages": TALK}])
    rows.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": rows, "test": rows.select([0])}).save_to_disk(str(tmp_path / "several"))
    one = load_corpus(str(tmp_path / "one"))
    assert (one.kind, [e.id for e in one.examples]) == ("conversations", ["one:0", "one:1"])
    assert len(load_corpus(str(tmp_path / "several")).examples) == 2
    assert len(load_corpus(str(tmp_path / "several"), split="test").examples) == 1
    with pytest.raises(DataError, match="unknown split"):
        load_corpus(str(tmp_path / "several"), split="dev")
    with pytest.raises(DataError, match="has no splits"):
        load_corpus(str(tmp_path / "one"), split="test")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="cannot read the saved data set"):
        load_corpus(str(tmp_path / "one"))
    trl = datasets.Dataset.from_list([{"prompt": TALK[:1], "completion": TALK[1:]}])
    trl.save_to_disk(str(tmp_path / "trl"))
    assert load_corpus(str(tmp_path / "trl")).kind == "conversations"


BAD = {
    "a line that is not JSON": '{"messages": [',
    "a line that is no object": "[1, 2]",
    "an unknown role": {"messages": [{"role": "wizard", "content": "x"}]},
    "no turn of the assistant": {"messages": TALK[:1]},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image"}]}, TALK[1]]},
    "half a surrogate pair": '{"messages": [{"role": "assistant", "content": "\\ud83d"}]}',
    "no messages": {"text": "x"},
}


@pytest.mark.parametrize(
    ("bad", "first"), [(bad, first) for name, bad in BAD.items() for first in (False, name != "no messages")]
)
def test_a_bad_conversation_stops_or_is_counted(bad: Any, first: bool, tmp_path: Path) -> None:
    good = {"messages": TALK}
    rows = [bad, good, good] if first else [good, bad, good]
    file = str(write(tmp_path / "t.jsonl", rows))
    with pytest.raises(DataError, match=f"line {1 if first else 2}"):
        load_corpus(file)
    corpus = load_corpus(file, bad_rows="skip")
    assert [e.id for e in corpus.examples] == (["t.jsonl:1", "t.jsonl:2"] if first else ["t.jsonl:0", "t.jsonl:2"])
    assert corpus.left_out.count("bad_rows") == 1
    assert corpus.left_out.first["bad_rows"].startswith(f"t.jsonl:{0 if first else 1}, ")


@pytest.mark.parametrize("bad", ["{", {"text": 5}, {"prompt": "a"}, '{"text": "\\ud83d"}'])
def test_a_bad_document_is_counted(bad: Any, tmp_path: Path) -> None:
    file = str(write(tmp_path / "t.jsonl", [{"text": "one"}, bad, {"text": "two"}]))
    with pytest.raises(DataError):
        load_corpus(file)
    corpus = load_corpus(file, bad_rows="skip")
    assert said(corpus) == ["one", "two"]
    assert corpus.left_out.document()["bad_rows"]["count"] == 1


def test_rows_of_csv_and_pairs_are_counted_and_all_bad_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt,target\na,b\na,b,c\nd,e\n")
    with pytest.raises(DataError, match="line 3"):
        load_corpus(str(tmp_path / "t.csv"))
    corpus = load_corpus(str(tmp_path / "t.csv"), bad_rows="skip")
    assert [(e.prompt, e.target) for e in corpus.examples] == [("a", "b"), ("d", "e")]
    with pytest.raises(DataError, match=r"no text found(.|\n)*bad rows 2"):
        load_corpus(str(write(tmp_path / "t.jsonl", [{"messages": []}, {"messages": 7}])), bad_rows="skip")
    with pytest.raises(DataError, match="not JSON"):
        load_corpus(str(write(tmp_path / "u.jsonl", ["{", "["])), bad_rows="skip")


def test_columns_that_are_not_read_are_counted_once_for_each_file(tmp_path: Path) -> None:
    rows = [{"messages": TALK, "source": "a"}, {"messages": TALK, "source": "b", "quality": None}]
    write(tmp_path / "a.jsonl", rows)
    write(tmp_path / "b.jsonl", rows)
    left_out = load_corpus(str(tmp_path)).left_out
    assert left_out.document() == {"other_fields": {"count": 2, "first": "source in a.jsonl"}}


def test_rows_in_memory_take_the_same_settings(tmp_path: Path) -> None:
    model, tokenizer = kd.load_teacher("demo")
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    rows: list[dict[str, Any]] = [{"messages": TALK, "tools": []}, {"messages": TALK}, {"messages": TALK[:1]}]
    options: dict[str, Any] = {"out": tmp_path / "c", "top_k": 4, "chat_template": str(template)}
    with pytest.raises(DataError, match="no turn of the assistant"):
        kd.build_cache(model, tokenizer, rows, **options)
    cache = kd.build_cache(model, tokenizer, rows, bad_rows="skip", format="messages", **options)
    assert len(cache) == 2
    assert cache.manifest.provenance["left_out"]["bad_rows"]["count"] == 1


def test_the_fields_of_a_format_are_those_that_columns_may_name() -> None:
    assert RowReading({"history": "h"}, "instruction").used("instruction")["history"] == "h"
    with pytest.raises(DataError, match="unknown field in --columns"):
        RowReading({"history": "h"}, "messages")
