"""Every kind of file gives the same ordered list of examples, and every broken one says where and what."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from table_files import ARTICLES, PAIRS, ROWS, targets, write

from kd.common.errors import DataError
from kd.data.sources import load_corpus


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_table_format_gives_the_same_documents(tmp_path: Path, suffix: str):
    corpus = load_corpus(str(write(tmp_path / f"t{suffix}", ROWS)))
    assert corpus.kind == "documents"
    assert targets(corpus) == [row["text"] for row in ROWS]
    assert [e.id for e in corpus.examples] == [f"t{suffix}:{i}" for i in range(3)]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_prompt_and_target_columns_make_pairs(tmp_path: Path, suffix: str):
    corpus = load_corpus(str(write(tmp_path / f"t{suffix}", PAIRS)))
    assert corpus.kind == "pairs"
    assert [(e.prompt, e.target) for e in corpus.examples] == [("2+2=", "4"), ("3+3=", "6")]


def test_columns_map_other_names(tmp_path: Path):
    rows = [{"q": "2+2=", "a": "4", "key": 17, "text": "not this"}]
    path = write(tmp_path / "t.jsonl", rows)
    pair = load_corpus(str(path), columns={"prompt": "q", "target": "a", "id": "key"}).examples[0]
    assert (pair.id, pair.prompt, pair.target) == ("17", "2+2=", "4")
    document = load_corpus(str(path), columns={"text": "a"})
    assert (document.kind, targets(document)) == ("documents", ["4"])


def test_a_text_column_that_is_asked_for_wins_over_pairs(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"prompt": "p", "target": "t", "text": "whole"}])
    assert load_corpus(str(path)).kind == "pairs"
    assert targets(load_corpus(str(path), columns={"text": "text"})) == ["whole"]


def test_a_plain_text_file_is_one_document(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    corpus = load_corpus(str(tmp_path / "a.txt"))
    assert [(e.id, e.target) for e in corpus.examples] == [("a.txt", "one\n\ntwo")]


def test_end_of_text_lines_separate_documents(tmp_path: Path):
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo <|endoftext|>three\n<|endoftext|>\n")
    corpus = load_corpus(str(tmp_path / "a.txt"))
    assert [(e.id, e.target) for e in corpus.examples] == [
        ("a.txt:0", "one"),
        ("a.txt:1", "two "),
        ("a.txt:2", "three"),
    ]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".csv"])
def test_a_byte_order_mark_is_not_text(tmp_path: Path, suffix: str):
    plain = {".txt": "word", ".jsonl": '{"text": "word"}\n', ".csv": "text\nword\n"}[suffix]
    path = tmp_path / f"t{suffix}"
    path.write_bytes(b"\xef\xbb\xbf" + plain.encode())
    assert targets(load_corpus(str(path))) == ["word"]


def test_a_csv_cell_may_be_longer_than_the_csv_modules_default(tmp_path: Path):
    text = "word " * 40_000  # 200 kB; the module's limit is 128 KiB
    assert targets(load_corpus(str(write(tmp_path / "t.csv", [{"text": text}])))) == [text]


def test_a_folder_is_its_files_in_the_order_of_their_paths(tmp_path: Path):
    write(tmp_path / "b.jsonl", [{"text": "B"}])
    write(tmp_path / "a" / "z.csv", [{"text": "Z"}])
    (tmp_path / "c.txt").write_text("C")
    (tmp_path / "notes.md").write_text("not read")
    corpus = load_corpus(str(tmp_path))
    assert [(e.id, e.target) for e in corpus.examples] == [("a/z.csv:0", "Z"), ("b.jsonl:0", "B"), ("c.txt", "C")]
    assert load_corpus(str(tmp_path)) == corpus


def test_a_folder_that_mixes_documents_and_pairs_is_refused(tmp_path: Path):
    write(tmp_path / "a.jsonl", PAIRS)
    write(tmp_path / "b.jsonl", ROWS)
    with pytest.raises(DataError, match="mix texts of several kinds"):
        load_corpus(str(tmp_path))


def test_a_folder_without_readable_files_is_refused(tmp_path: Path):
    (tmp_path / "notes.md").write_text("no")
    with pytest.raises(DataError, match="no readable files") as caught:
        load_corpus(str(tmp_path))
    assert ".parquet" in str(caught.value)


def test_missing_columns_are_named_with_those_that_are_there(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"body": "x", "title": "y"}])
    with pytest.raises(DataError) as caught:
        load_corpus(str(path))
    message = str(caught.value)
    assert "columns are missing" in message
    assert "body, title" in message
    assert "--columns text=NAME" in message
    with pytest.raises(DataError) as caught:
        load_corpus(str(path), columns={"text": "boddy"})
    assert "boddy" in str(caught.value.details["expected"])


def test_an_unknown_field_in_columns_suggests_the_nearest(tmp_path: Path):
    with pytest.raises(DataError) as caught:
        load_corpus(str(write(tmp_path / "t.jsonl", ROWS)), columns={"targets": "text"})
    assert caught.value.details["did you mean"] == "target"


def test_broken_json_names_the_line(tmp_path: Path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b"\n')
    with pytest.raises(DataError) as caught:
        load_corpus(str(path))
    assert str(caught.value.details["where"]).endswith("t.jsonl line 3")


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "[" * 100_000])
def test_a_line_that_is_no_object_names_the_line(tmp_path: Path, line: str):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(DataError) as caught:
        load_corpus(str(tmp_path / "t.jsonl"))
    assert "line 2" in str(caught.value)


@pytest.mark.parametrize("keep", [3, 200])
def test_truncated_parquet_is_a_clear_error(tmp_path: Path, keep: int):
    path = write(tmp_path / "t.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="cannot read the file") as caught:
        load_corpus(str(path))
    assert str(path) in str(caught.value)


def test_text_that_is_not_utf8_is_a_clear_error(tmp_path: Path):
    (tmp_path / "t.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(DataError, match="cannot read the file"):
        load_corpus(str(tmp_path / "t.txt"))


def test_half_a_surrogate_pair_names_the_example(tmp_path: Path):
    (tmp_path / "t.jsonl").write_text('{"text": "fine"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(DataError, match="not valid Unicode") as caught:
        load_corpus(str(tmp_path / "t.jsonl"))
    assert "t.jsonl:1" in str(caught.value)


def test_a_value_that_is_not_text_names_row_and_column(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"text": "a"}, {"text": 5}])
    with pytest.raises(DataError, match="not text") as caught:
        load_corpus(str(path))
    assert "t.jsonl line 2 column text" in str(caught.value)
    assert caught.value.details["found"] == "int"


@pytest.mark.parametrize("row", [{"text": "b"}, {"text": "b", "key": None}])
def test_a_missing_id_names_its_row(tmp_path: Path, row: dict):
    path = write(tmp_path / "t.jsonl", [{"text": "a", "key": "x"}, row])
    with pytest.raises(DataError, match="an id is missing") as caught:
        load_corpus(str(path), columns={"id": "key"})
    assert "t.jsonl line 2 column key" in str(caught.value)


def test_two_examples_of_one_id_are_refused(tmp_path: Path):
    path = write(tmp_path / "t.jsonl", [{"text": "a", "key": "x"}, {"text": "b", "key": "x"}])
    with pytest.raises(DataError, match="same id") as caught:
        load_corpus(str(path), columns={"id": "key"})
    assert caught.value.details["found"] == "x"


def test_an_unknown_file_type_lists_those_that_are_read(tmp_path: Path):
    (tmp_path / "t.jsom").write_text("{}")
    with pytest.raises(DataError, match="unknown file type") as caught:
        load_corpus(str(tmp_path / "t.jsom"))
    assert caught.value.details["did you mean"] == ".json"


def test_a_tokens_file_is_wikitext(tmp_path: Path):
    (tmp_path / "wiki.tokens").write_text(ARTICLES)
    corpus = load_corpus(str(tmp_path / "wiki.tokens"))
    assert [e.id for e in corpus.examples] == ["wiki.tokens:0", "wiki.tokens:1"]


def test_real_wikitext_has_sixty_validation_articles(shared: Path):
    corpus = load_corpus(str(shared / "wikitext-2" / "wiki.valid.tokens"))
    assert len(corpus.examples) == 60  # the number of articles the data set's own page gives
    assert all(e.target.startswith("= ") for e in corpus.examples)


def test_a_folder_reads_compressed_json_and_upper_case_and_says_what_it_left_out(tmp_path: Path):
    import gzip

    write(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[1]).encode()))
    (tmp_path / "c.TXT.zst").write_bytes(pa.compress(b"Zstandard", codec="zstd", asbytes=True))
    (tmp_path / "d.json").write_text(json.dumps([{"text": "a list"}]))
    (tmp_path / "dataset_info.json").write_text('{"description": "facts about the other files"}')
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "notes.md").write_text("not text to learn from")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a-checkpoint.txt").write_text("a copy")
    (tmp_path / "._x.txt").write_bytes(b"\x00\x05\x16\x07\xff")
    corpus = load_corpus(str(tmp_path))
    assert [(e.id, e.target) for e in corpus.examples] == [
        ("a.jsonl:0", ROWS[0]["text"]),
        ("b.jsonl.gz:0", ROWS[1]["text"]),
        ("c.TXT.zst", "Zstandard"),
        ("d.json:0", "a list"),
    ]
    assert corpus.left_out.counts == {"other_files": 2, "hidden_files": 2, "empty_files": 1}
    assert load_corpus(str(tmp_path / "[ab].json*")).examples == corpus.examples[:2]
    assert targets(load_corpus(f"{tmp_path}/d.json,{tmp_path}/a.jsonl")) == ["a list", ROWS[0]["text"]]


@pytest.mark.parametrize("name", ["dataset_info.json", "empty.csv", "empty.txt"])
def test_a_file_that_is_asked_for_by_name_is_not_left_out(tmp_path: Path, name: str):
    (tmp_path / "dataset_info.json").write_text('{"description": "facts"}')
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "empty.txt").write_text("")
    words = "columns are missing" if name.endswith("json") else "the file is empty"
    for spec in (f"{tmp_path}/{name}", f"{tmp_path}/{name},{write(tmp_path / 'a.jsonl', ROWS)}"):
        with pytest.raises(DataError, match=words):
            load_corpus(spec)


@pytest.mark.parametrize("suffix", [".txt", ".tokens", ".jsonl"])
def test_a_compressed_file_is_the_text_of_the_plain_one(tmp_path: Path, suffix: str):
    import gzip

    plain = '{"text": "one\\r\\ntwo"}\n' if suffix == ".jsonl" else "\ufeff = One = \r\n\r\ntwo\r\n"
    (tmp_path / f"a{suffix}").write_bytes(plain.encode())
    (tmp_path / f"b{suffix}.gz").write_bytes(gzip.compress(plain.encode()))
    (tmp_path / f"c{suffix}.zst").write_bytes(pa.compress(plain.encode(), codec="zstd", asbytes=True))
    one, two, three = (targets(load_corpus(str(path))) for path in sorted(tmp_path.iterdir()))
    assert one == two == three


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("comma.csv", ["another number of fields", "comma.csv line 2", "3 fields", "2 columns"]),
        ("sometarget.jsonl", ["other columns than the first row", "sometarget.jsonl line 2", "missing: target"]),
        ("mixedkeys.jsonl", ["other columns than the first row", "mixedkeys.jsonl line 2"]),
        ("zero.csv", ["the file is empty", "zero.csv"]),
    ],
)
def test_the_shared_cases_are_errors_that_name_the_row(shared: Path, name: str, words: list[str]):
    with pytest.raises(DataError) as caught:
        load_corpus(str(shared / "cases" / name))
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("split", ["dev", "validation", "heldout"])
def test_a_split_of_files_is_what_their_names_say_or_an_error(tmp_path: Path, split: str):
    write(tmp_path / f"{split}.jsonl", ROWS)
    write(tmp_path / "rows.jsonl", ROWS)
    assert load_corpus(str(tmp_path / f"{split}.jsonl"), split=split).split == split
    assert load_corpus(str(tmp_path / "rows.jsonl"), split="train").split == "train"
    write(tmp_path / split / "rows.jsonl", ROWS)
    assert len(load_corpus(str(tmp_path / split), split=split).examples) == 3
    for spec in (tmp_path / "rows.jsonl", tmp_path / "*.jsonl"):
        with pytest.raises(DataError, match="files have no splits") as caught:
            load_corpus(str(spec), split=split)
        assert "rows.jsonl would be read whole" in str(caught.value)
