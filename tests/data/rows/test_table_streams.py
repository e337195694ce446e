"""A table that is read row by row gives what the table gives that is read whole."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.common.errors import DataError
from kd.data.rows.table_streams import BATCH_ROWS, open_table
from kd.data.rows.tables import TABLE_READERS, EmptyFileError, UnreadRow, read_table

ROWS = [{"text": f"line {n}\nand more", "id": str(n)} for n in range(BATCH_ROWS + 3)]


def put(path: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    """The rows in a file of the type that its suffix names."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    lines = [json.dumps(row) for row in rows]
    if ".json" in path.suffixes:
        path.write_text("[" + ",".join(lines) + "]")
        return path
    if ".jsonl" in path.suffixes:
        text = "\n".join([lines[0], "", *lines[1:]])
    else:
        sign = "\t" if ".tsv" in path.suffixes else ","
        text = "\n".join([sign.join(rows[0]), "", *(sign.join(f'"{v}"' for v in row.values()) for row in rows)])
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("suffix", [*TABLE_READERS, ".jsonl.gz", ".csv.gz"])
def test_rows_and_their_places_are_those_of_the_whole_table(tmp_path: Path, suffix: str):
    file = put(tmp_path / f"t{suffix}")
    stream, table = open_table(file), read_table(file)
    assert stream.names == table.names
    for _ in range(2):  # from the beginning each time
        found = [(row, stream.location(number)) for number, row in enumerate(stream.rows)]
        assert found == [(row, table.location(number)) for number, row in enumerate(table.rows)]


def test_a_line_that_cannot_be_read_stays_in_its_place(tmp_path: Path):
    file = tmp_path / "t.jsonl"
    file.write_text('not json\n{"text": "a"}\n[1]\n')
    table = open_table(file)
    assert table.names == ["text"]
    assert [isinstance(row, UnreadRow) for row in table.rows] == [True, False, True]
    file.write_text("not json\nnor this\n")
    with pytest.raises(DataError, match="not JSON"):
        open_table(file)


@pytest.mark.parametrize("suffix", TABLE_READERS)
def test_an_empty_file_is_an_error(tmp_path: Path, suffix: str):
    (tmp_path / f"t{suffix}").touch()
    with pytest.raises(EmptyFileError):
        open_table(tmp_path / f"t{suffix}")


def test_a_file_that_is_cut_short_is_an_error_where_it_ends(tmp_path: Path):
    file = put(tmp_path / "t.jsonl.gz")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot read the file"):
        list(open_table(file).rows)


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
def test_a_column_that_occurs_twice_is_an_error(tmp_path: Path, suffix: str):
    file = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), file)
    else:
        file.write_text("text,text\na,b\n" if suffix == ".csv" else '{"text": "a", "text": "b"}\n')
    with pytest.raises(DataError, match=r"same name|not JSON"):
        open_table(file)
