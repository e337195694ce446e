"""Every table format gives the same rows, and what would lose a row or cut a value is an error that names the place."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.data.rows.tables import TABLE_READERS, EmptyFileError, read_table, table_files

ROWS = [{"a": "x, y", "b": "1"}, {"a": 'z "q"\nline', "b": "é"}]
COMPRESSED = {"": bytes, ".gz": gzip.compress, ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True)}


def content(suffix: str) -> bytes:
    """ROWS in the format of a suffix."""
    if suffix == ".parquet":
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(ROWS), sink)
        return sink.getvalue().to_pybytes()
    if suffix == ".json":
        return json.dumps(ROWS, indent=1).encode()
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n\n" for row in ROWS).encode()
    text = 'a,b\n"x, y",1\n"z ""q""\nline",é\n' if suffix == ".csv" else 'a\tb\nx, y\t1\n"z ""q""\nline"\té\n'
    return text.encode()


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("suffix", TABLE_READERS)
def test_names_and_rows_are_the_same_in_every_format(tmp_path: Path, suffix: str, compression: str) -> None:
    for file in (tmp_path / f"t{suffix}{compression}", tmp_path / f"T{suffix}{compression}".upper()):
        file.write_bytes(COMPRESSED[compression](content(suffix)))
        table = read_table(file)
        assert (table.names, table.rows) == (["a", "b"], ROWS)


NAMES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1, max_size=4, unique=True
)


@settings(max_examples=60)
@given(NAMES, st.data())
def test_any_text_comes_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], data: st.DataObject
) -> None:
    value = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
    rows = data.draw(st.lists(st.fixed_dictionaries(dict.fromkeys(names, value)), min_size=1, max_size=4))
    folder = tmp_path_factory.mktemp("t")
    lines = io.StringIO()
    writer = csv.DictWriter(lines, names, quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(rows)
    (folder / "t.csv").write_bytes(lines.getvalue().encode())
    (folder / "t.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    objects = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "t.jsonl.zst").write_bytes(COMPRESSED[".zst"](objects.encode()))
    pq.write_table(pa.Table.from_pylist(rows), folder / "t.parquet")
    for file in folder.iterdir():
        table = read_table(file)
        assert (sorted(table.names), table.rows) == (sorted(names), rows), file.name


def test_places_are_lines_where_there_are_lines_and_row_numbers_elsewhere(tmp_path: Path) -> None:
    for suffix, places in {
        ".jsonl": ["line 1", "line 3"],
        ".csv": ["line 2", "line 3"],
        ".tsv": ["line 2", "line 3"],
        ".json": ["row 1", "row 2"],
        ".parquet": ["row 1", "row 2"],
    }.items():
        file = tmp_path / f"t{suffix}"
        file.write_bytes(content(suffix))
        assert [read_table(file).location(n) for n in range(2)] == [f"{file} {location}" for location in places]


@pytest.mark.parametrize("suffix", TABLE_READERS)
def test_what_cannot_be_read_names_the_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"t{suffix}"
    file.write_bytes(b"PAR1\xff\xfe\x00broken")
    with pytest.raises(DataError) as caught:
        read_table(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("compression", [".gz", ".zst"])
def test_a_compressed_file_that_was_cut_or_is_something_else_is_an_error(tmp_path: Path, compression: str) -> None:
    file = tmp_path / f"t.jsonl{compression}"
    whole = COMPRESSED[compression](b"".join(json.dumps({"text": str(i)}).encode() + b"\n" for i in range(20_000)))
    for data in (whole[: len(whole) // 2], whole[:-3], content(".jsonl")):
        file.write_bytes(data)
        with pytest.raises(DataError) as caught:
            read_table(file)
        assert str(file) in str(caught.value)
    file.write_bytes(whole + whole)  # members, or frames, one after the other
    assert len(read_table(file).rows) == 40_000


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("suffix", TABLE_READERS)
def test_an_empty_file_is_empty(tmp_path: Path, suffix: str, compression: str) -> None:
    file = tmp_path / f"t{suffix}{compression}"
    file.write_bytes(b"")
    with pytest.raises(EmptyFileError, match="the file is empty"):
        read_table(file)


@pytest.mark.parametrize(("suffix", "text"), [(".csv", "\n\n"), (".jsonl", " \n"), (".json", "[]"), (".json", "\n")])
def test_a_file_without_a_row_is_empty(tmp_path: Path, suffix: str, text: str) -> None:
    (tmp_path / f"t{suffix}").write_text(text)
    with pytest.raises(EmptyFileError):
        read_table(tmp_path / f"t{suffix}")


def test_an_unknown_suffix_lists_those_that_are_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown table file type") as caught:
        read_table(tmp_path / "t.jsonlx")
    assert caught.value.details["did you mean"] == ".jsonl"


@pytest.mark.parametrize(
    ("suffix", "text", "line", "found"),
    [
        (".csv", "prompt,target\nName two,red, blue and green\n", 2, "3 fields: Name two | red |  blue and green"),
        (".csv", "a,b\n1,2\n\n3\n", 4, "1 field: 3"),
        (".csv", 'a,b\n"1\n\n1",2\n3,4,\n', 5, "3 fields: 3 | 4 | "),
        (".tsv", "a\tb\n1\t2\t3\n", 2, "3 fields: 1 | 2 | 3"),
    ],
)
def test_another_number_of_fields_names_the_line(tmp_path: Path, suffix: str, text: str, line: int, found: str) -> None:
    file = tmp_path / f"t{suffix}"
    file.write_text(text)
    with pytest.raises(DataError, match="another number of fields") as caught:
        read_table(file)
    assert caught.value.details["where"] == f"{file} line {line}"
    assert caught.value.details["found"] == found
    assert str(caught.value.details["expected"]).startswith("2 columns: ")


def test_a_quote_that_is_not_closed_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('a,b\n1,2\n"3,4\n5,6\n')
    with pytest.raises(DataError, match="not CSV") as caught:
        read_table(tmp_path / "t.csv")
    assert str(caught.value.details["where"]).endswith("t.csv line 3")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet"])
def test_two_columns_of_one_name_are_an_error(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"]), file)
    else:
        mark = "," if suffix == ".csv" else "\t"
        file.write_text(f"text{mark}text\nx{mark}y\n")
    with pytest.raises(DataError, match="two columns have the same name") as caught:
        read_table(file)
    assert caught.value.details["found"] == "text"


def test_columns_without_a_name_may_repeat(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,,\na,,\n")
    assert read_table(tmp_path / "t.csv").rows[0]["text"] == "a"


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_key_that_occurs_twice_is_an_error(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"t{suffix}"
    file.write_text('{"text": "a"}\n{"text": "b", "text": "c"}\n')
    with pytest.raises(DataError, match="not JSON") as caught:
        read_table(file)
    assert caught.value.details["where"] == f"{file} line 2"
    assert "'text' occurs twice" in str(caught.value.details["found"])


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('[{"a": 1}, {"a": 2}]', [{"a": 1}, {"a": 2}]),
        ('{"a": 1}\n{"a": 2}\n', [{"a": 1}, {"a": 2}]),
        ('\n{"a":\n 1}', [{"a": 1}]),
    ],
)
def test_json_is_a_list_of_objects_or_an_object_per_line(tmp_path: Path, text: str, rows: list[dict]) -> None:
    (tmp_path / "t.json").write_text(text)
    assert read_table(tmp_path / "t.json").rows == rows


@pytest.mark.parametrize(
    ("text", "where"), [("[1]", "row 1"), ('[{"a": 1}, "x"]', "row 2"), ('{"a": 1}\n[1]', "line 2"), ("[", "t.json")]
)
def test_json_of_another_form_names_the_place(tmp_path: Path, text: str, where: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(DataError) as caught:
        read_table(tmp_path / "t.json")
    assert str(caught.value.details["where"]).endswith(where)


def test_a_folder_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    file = tmp_path / "split=train" / "t.parquet"
    file.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    assert read_table(file).names == ["a", "b"]


def test_table_files_are_those_of_a_known_type_that_are_not_hidden(tmp_path: Path) -> None:
    for name in ("b.CSV", "a.jsonl.gz", "._a.jsonl", "notes.md"):
        (tmp_path / name).write_text("")
    (tmp_path / "c.jsonl").mkdir()
    assert [file.name for file in table_files(tmp_path)] == ["a.jsonl.gz", "b.CSV"]
