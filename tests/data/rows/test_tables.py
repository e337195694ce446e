"""Every table format gives the same rows, and what is broken is an error that names the file."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kd.common.errors import DataError
from kd.data.rows.tables import TABLE_READERS, read_table

ROWS = [{"a": "x, y", "b": "1"}, {"a": 'z "q"\nline', "b": "é"}]


@pytest.mark.parametrize("suffix", TABLE_READERS)
def test_names_and_rows_are_the_same_in_every_format(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"t{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n\n" for row in ROWS), encoding="utf-8")
    else:
        lines = ['a,b\n"x, y",1\n', '"z ""q""\nline",é\n']
        text = "".join(lines) if suffix == ".csv" else 'a\tb\nx, y\t1\n"z ""q""\nline"\té\n'
        file.write_text(text, encoding="utf-8")
    assert read_table(file) == (["a", "b"], ROWS)


@pytest.mark.parametrize("suffix", TABLE_READERS)
def test_what_cannot_be_read_names_the_file(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"t{suffix}"
    file.write_bytes(b"PAR1\xff\xfe\x00broken")
    with pytest.raises(DataError) as caught:
        read_table(file)
    assert str(file) in str(caught.value)


def test_an_unknown_suffix_lists_those_that_are_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown table file type") as caught:
        read_table(tmp_path / "t.json")
    assert caught.value.details["did you mean"] == ".jsonl"
