"""Read table files: `.jsonl`, `.csv`, `.tsv` and `.parquet` give the same list of dicts.

Files are read whole, because the corpora of this project have at most a few hundred MB. CSV and TSV values are always
strings; the other formats keep the types they were written with.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name

ENCODING = "utf-8-sig"
"""UTF-8. A byte order mark, which spreadsheets write first, is dropped."""

Row = dict[str, Any]
Table = tuple[list[str], list[Row]]
"""Column names and rows, in the file's order."""


def read_table(file: Path) -> Table:
    """Column names and rows of one file. Raises DataError for an unknown suffix or unreadable content."""
    if file.suffix not in TABLE_READERS:
        raise unknown_name("table file type", file.suffix or file.name, TABLE_READERS, where=str(file))
    try:
        return TABLE_READERS[file.suffix](file)
    except DataError:
        raise
    except (OSError, ValueError, csv.Error) as error:  # truncated Parquet, bad UTF-8, broken CSV
        raise unreadable(file, error) from error


def unreadable(file: Path, error: Exception) -> DataError:
    """The error for a file that cannot be read as what its suffix says."""
    return DataError(
        "cannot read the file",
        where=str(file),
        found=f"{type(error).__name__}: {error}",
        expected=f"a readable {file.suffix} file",
    )


def _jsonl(file: Path) -> Table:
    rows = []
    with file.open(encoding=ENCODING) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise DataError("not JSON", where=f"{file} line {number}", found=str(error)) from error
            if not isinstance(row, dict):
                raise DataError("a line is not a JSON object", where=f"{file} line {number}", found=type(row).__name__)
            rows.append(row)
    return (list(rows[0]) if rows else []), rows


def _csv(file: Path) -> Table:
    csv.field_size_limit(2**31 - 1)  # some articles are longer than the default, 128 KiB
    with file.open(encoding=ENCODING, newline="") as lines:
        reader = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",", strict=True)
        rows: list[Row] = list(reader)
    return list(reader.fieldnames or []), rows


def _parquet(file: Path) -> Table:
    import pyarrow.parquet as pq

    table = pq.read_table(file)
    return table.column_names, table.to_pylist()


TABLE_READERS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
