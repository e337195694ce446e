"""Rows read piece by piece are those that are read whole, and no more of a file is read than is asked for."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.common.errors import DataError
from kd.data.rows.row_streams import BATCH_ROWS, stream_rows
from kd.data.rows.tables import read_table

ROWS = [{"inputs": f"q{n}", "targets": f"a{n}", "other": n} for n in range(BATCH_ROWS + 7)]


def put(path: Path) -> Path:
    lines = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif path.suffix == ".csv":
        path.write_text("inputs,targets,other\n" + "".join(",".join(map(str, r.values())) + "\n" for r in ROWS))
    else:
        path.write_text(lines)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet", "a.csv"])
def test_streamed_rows_are_the_rows_of_the_table(tmp_path: Path, name: str) -> None:
    file = put(tmp_path / name)
    table = read_table(file)
    found = list(stream_rows(file, ["inputs", "targets", "other"]))
    assert [one.row for one in found] == table.rows
    assert [one.location for one in found] == [table.location(n) for n in range(len(table.rows))]
    assert [one.number for one in found] == list(range(len(ROWS)))


def test_of_parquet_only_the_columns_that_are_used_are_read(tmp_path: Path) -> None:
    [first] = islice(stream_rows(put(tmp_path / "a.parquet"), ["targets", "none"]), 1)
    assert first.row == {"targets": "a0"}


def test_a_fault_is_raised_where_it_is_and_rows_before_it_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\n{"a": 2}\nnot json\n')
    stream = stream_rows(file, ["a"])
    assert [next(stream).row, next(stream).row] == [{"a": 1}, {"a": 2}]
    with pytest.raises(DataError, match="not JSON") as caught:
        next(stream)
    assert str(caught.value.details["where"]).endswith("a.jsonl line 3")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 9)[:-12])
    with pytest.raises(DataError, match="cannot read the file"):
        list(stream_rows(tmp_path / "b.jsonl.gz", ["a"]))
