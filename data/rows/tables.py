"""Read table files: `.jsonl`, `.json`, `.csv`, `.tsv` and `.parquet`, also compressed, give the same table of rows.

Files are read whole here, which is for tables of tasks; texts are read row by row (`kd.data.rows.table_streams`). CSV and TSV
values are always strings; the other formats keep the types they were written with. A `.json` file is a list of objects, or an
object per line.

A row with more or fewer fields than the header has columns, a column or key that occurs twice, and an empty file are errors:
each of them would otherwise cut a value or lose a row. A line that cannot be read is an error too, or, with `keep_unread`, a row
that holds the error in its place.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.data.rows.compressed import COMPRESSIONS, UNREADABLE, TextFile, file_type, open_bytes, open_text, size_of

Row = dict[str, Any]
RowLocation = Callable[[int], str]
"""Number of a row, from 0 -> where it is, for errors."""


class EmptyFileError(DataError):
    """A file without a single row."""


class UnreadRow(Row):
    """A row that cannot be read, without any column."""

    def __init__(self, error: DataError) -> None:
        super().__init__()
        self.error = error


@dataclass(frozen=True)
class RowTable:
    """The rows of one file, in its order."""

    file: str
    names: list[str]
    """Columns; of JSON rows, the keys of the first."""
    rows: list[Row]
    lines: Sequence[int] = ()
    """Line in which each row begins, from 1; empty where the format has no lines."""
    whole_file: bool = False
    """Whether the file is one JSON object, which may be anything but a row."""

    def location(self, number: int) -> str:
        """Where a row is, for errors: its line, or its number from 1."""
        return f"{self.file} line {self.lines[number]}" if self.lines else f"{self.file} row {number + 1}"


def rows_in(where: str) -> RowLocation:
    """Places of rows that have no lines: their numbers from 1."""
    return lambda number: f"{where} row {number + 1}"


def is_nothing(value: Any) -> bool:
    """Whether a value stands for no value: null, or the NaN that libraries write for it into a column of numbers."""
    return value is None or (isinstance(value, float) and value != value)


def read_table(file: TextFile, *, keep_unread: bool = False) -> RowTable:
    """The rows of one file. Raises DataError for an unknown suffix, unreadable content, or a file that is empty.

    keep_unread   whether a row that cannot be read stays in its place, as an `UnreadRow`; else it is an error
    """
    if file_type(file) not in TABLE_READERS:
        raise unknown_name("table file type", file_type(file) or file.name, TABLE_READERS, where=str(file))
    try:
        table = TABLE_READERS[file_type(file)](file)
    except DataError:
        raise
    except UNREADABLE as error:  # truncated Parquet, bad UTF-8
        raise unreadable(file, error) from error
    unread = [row for row in table.rows if isinstance(row, UnreadRow)]
    if unread and not keep_unread:
        raise unread[0].error
    refuse_repeated(table.names, file)
    return table


def refuse_repeated(names: Sequence[str], file: TextFile) -> None:
    """Raise DataError where two columns of a table have the same name."""
    repeated = _first_repeated(names)
    if repeated is not None:
        raise DataError(
            "two columns have the same name",
            where=str(file),
            found=repeated,
            expected="a name of its own for each column",
        )


def table_files(folder: Path) -> list[Path]:
    """The table files in a folder, in the order of their paths; hidden ones are none."""
    return sorted(
        p for p in folder.iterdir() if file_type(p) in TABLE_READERS and not p.name.startswith(".") and p.is_file()
    )


def unreadable(file: TextFile, error: Exception) -> DataError:
    """The error for a file that cannot be read as what its suffix says."""
    compressed = f", compressed as {file.suffix.lower()}" if file.suffix.lower() in COMPRESSIONS else ""
    return DataError(
        "cannot read the file",
        where=str(file),
        found=f"{type(error).__name__}: {error}",
        expected=f"a readable {file_type(file)} file{compressed}",
    )


def empty(file: TextFile) -> EmptyFileError:
    """The error for a file that holds nothing."""
    return EmptyFileError("the file is empty", where=str(file), expected="at least one row")


def _first_repeated(names: Iterable[str]) -> str | None:
    """The first name that occurs twice; columns without a name cannot be asked for, so that they may repeat."""
    seen: set[str] = set()
    for name in names:
        if name and name in seen:
            return name
        seen.add(name)
    return None


def _jsonl(file: TextFile) -> RowTable:
    with open_text(file) as lines:
        return _objects(file, lines)


def _objects(file: TextFile, lines: Iterable[str]) -> RowTable:
    """A table of one JSON object per line."""
    numbered = list(json_lines(file, lines))
    rows = [row for _, row in numbered]
    return RowTable(str(file), first_keys(file, rows), rows, [number for number, _ in numbered])


def json_lines(file: TextFile, lines: Iterable[str]) -> Iterator[tuple[int, Row]]:
    """Number of the line, from 1, and its object, for each line that is not empty; an `UnreadRow` for what is none."""
    number, name = 0, str(file)
    for line in lines:
        number += 1  # noqa: SIM113 (`enumerate` would hold the line)
        row = None if line.isspace() else _row_or_error(_line, line, f"{name} line {number}")
        del line  # it may be as large as the text that the row holds
        if row is not None:
            yield number, row


def _line(line: str, where: str) -> Row:
    return _object(_parsed(line, where), where)


def _row_or_error(read: Callable[[Any, str], Row], value: Any, where: str) -> Row:
    try:
        return read(value, where)
    except DataError as error:
        return UnreadRow(error)


def first_keys(file: TextFile, rows: Iterable[Row]) -> list[str]:
    """The keys of the first row that could be read. Raises the first row's error where there is none."""
    unread: UnreadRow | None = None
    for row in rows:
        if not isinstance(row, UnreadRow):
            return list(row)
        unread = row if unread is None else unread  # which is empty, and so false
    raise empty(file) if unread is None else unread.error


def _json(file: TextFile) -> RowTable:
    with open_text(file) as opened:
        text = opened.read()
    if not text.strip():
        raise empty(file)
    if text.lstrip().startswith("["):
        items = _parsed(text, str(file))
        rows = [_row_or_error(_object, item, f"{file} row {number}") for number, item in enumerate(items, 1)]
        return RowTable(str(file), first_keys(file, rows), rows)
    try:
        row = _object(_parsed(text, str(file)), str(file))
    except DataError:  # an object per line, or not JSON: then the error names the line
        return _objects(file, io.StringIO(text))
    return RowTable(str(file), list(row), [row], whole_file=True)


def _parsed(text: str, where: str) -> Any:
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError) as error:
        raise DataError("not JSON", where=where, found=str(error)) from error


def _with_each_key_once(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"the key {_first_repeated(key for key, _ in pairs)!r} occurs twice in an object")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_with_each_key_once)


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError("a row is not a JSON object", where=where, found=type(value).__name__)
    return value


def _csv(file: TextFile) -> RowTable:
    with open_text(file, newline="") as lines:
        names, numbered = csv_rows(file, lines)
        rows = list(numbered)
    return RowTable(str(file), names, [row for _, row in rows], [line for line, _ in rows])


def csv_rows(file: TextFile, lines: Iterable[str]) -> tuple[list[str], Iterator[tuple[int, Row]]]:
    """The header, and the line in which each row begins with the row; an `UnreadRow` for one of another number of fields."""
    csv.field_size_limit(2**31 - 1)  # some articles are longer than the default, 128 KiB
    records = _csv_records(file, lines)
    header = next(records, None)
    if header is None:
        raise empty(file)
    read = partial(_fields, header[1])
    return header[1], ((line, _row_or_error(read, fields, f"{file} line {line}")) for line, fields in records)


def _csv_records(file: TextFile, lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """The line in which each record begins, and its fields, for each that is not empty."""
    reader = csv.reader(lines, delimiter="\t" if file_type(file) == ".tsv" else ",", strict=True)
    line = 1
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError("not CSV", where=f"{file} line {line}", found=str(error)) from error


def _fields(names: Sequence[str], fields: Sequence[str], where: str) -> Row:
    """A row of a CSV file. Raises DataError where it has another number of fields than the header."""
    if len(fields) != len(names):
        raise DataError(
            "a row has another number of fields than the header",
            where=where,
            found=f"{_counted(len(fields), 'field')}: {' | '.join(fields):.200}",
            expected=f"{_counted(len(names), 'column')}: {' | '.join(names):.200}",
            try_='quotes around a value that holds the separator, as in "red, blue and green"',
        )
    return dict(zip(names, fields, strict=True))


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _parquet(file: TextFile) -> RowTable:
    import pyarrow.parquet as pq

    if size_of(file) == 0:
        raise empty(file)
    with open_bytes(file) as opened:
        source = io.BytesIO(opened.read()) if file.suffix.lower() in COMPRESSIONS else opened
        table = pq.ParquetFile(source).read()
    return RowTable(str(file), table.column_names, table.to_pylist())


TABLE_READERS: dict[str, Callable[[TextFile], RowTable]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
}
"""Type of a file -> its reader."""
