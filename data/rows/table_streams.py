"""Tables whose rows are read one after another, so that a file of any size takes the memory of a few rows.

    table = open_table(Path("texts.jsonl.gz"))
    for row in table.rows: ...             # read again from the beginning each time

`.jsonl`, `.csv` and `.tsv` are read by line, also compressed, and `.parquet` by batches of a row group. `.json` and compressed
`.parquet` can only be read whole. What is wrong in a row stays in its place, as an `UnreadRow`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from kd.common.errors import DataError
from kd.data.rows.compressed import (
    COMPRESSIONS,
    UNREADABLE,
    TextFile,
    file_type,
    open_text,
    parquet_source,
    size_of,
)
from kd.data.rows.tables import Row, csv_rows, empty, first_keys, json_lines, read_table, refuse_repeated, unreadable

BATCH_ROWS = 256
"""Rows of a Parquet file in memory at once."""


class OpenedTable(Protocol):
    """What a table of either kind gives."""

    @property
    def names(self) -> list[str]:
        """Columns; of JSON rows, the keys of the first."""

    @property
    def rows(self) -> Iterable[Row]:
        """The rows in the file's order, from the beginning each time."""

    @property
    def whole_file(self) -> bool:
        """Whether the file is one JSON object, which may be anything but a row."""

    def location(self, number: int) -> str:
        """Where a row is, for errors."""


class StreamedRows:
    """Rows of a file and where the last of them was."""

    def __init__(self, file: TextFile, read: Callable[[TextFile], Iterator[tuple[int, Row]]]) -> None:
        self._file, self._read, self.at = file, read, 0

    def __iter__(self) -> Iterator[Row]:
        try:
            for at, row in self._read(self._file):
                self.at = at
                yield row
        except DataError:
            raise
        except UNREADABLE as error:  # truncated Parquet, bad UTF-8
            raise unreadable(self._file, error) from error


@dataclass(frozen=True)
class TableStream:
    """A table whose rows are read when they are asked for."""

    file: TextFile
    names: list[str]
    rows: StreamedRows
    counted_in: str
    """`line` or `row`."""

    whole_file = False

    def location(self, number: int) -> str:
        """Where the row is that was read last, for errors."""
        return f"{self.file} {self.counted_in} {self.rows.at}"


def open_table(file: TextFile) -> OpenedTable:
    """The table in a file. Raises DataError for content that cannot be read, and for a file that is empty."""
    kind, compressed = file_type(file), file.suffix.lower() in COMPRESSIONS
    if kind == ".json" or (kind == ".parquet" and compressed):
        return read_table(file, keep_unread=True)
    read, names_of, counted_in = STREAMS[kind]
    try:
        names = names_of(file)
    except DataError:
        raise
    except UNREADABLE as error:
        raise unreadable(file, error) from error
    refuse_repeated(names, file)
    return TableStream(file, names, StreamedRows(file, read), counted_in)


def _json_names(file: TextFile) -> list[str]:
    return first_keys(file, (row for _, row in _json_rows(file)))


def _json_rows(file: TextFile) -> Iterator[tuple[int, Row]]:
    with open_text(file) as lines:
        yield from json_lines(file, lines)


def _csv_names(file: TextFile) -> list[str]:
    with open_text(file, newline="") as lines:
        return csv_rows(file, lines)[0]


def _csv_rows(file: TextFile) -> Iterator[tuple[int, Row]]:
    with open_text(file, newline="") as lines:
        yield from csv_rows(file, lines)[1]


def _parquet_names(file: TextFile) -> list[str]:
    import pyarrow.parquet as pq

    if size_of(file) == 0:
        raise empty(file)
    names: Sequence[str] = pq.read_schema(parquet_source(file)).names
    return list(names)


def _parquet_rows(file: TextFile) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet as pq

    number = 0
    with pq.ParquetFile(parquet_source(file)) as opened:
        for batch in opened.iter_batches(BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield number, row


STREAMS: dict[str, tuple[Callable[[TextFile], Iterator[tuple[int, Row]]], Callable[[TextFile], list[str]], str]] = {
    ".jsonl": (_json_rows, _json_names, "line"),
    ".csv": (_csv_rows, _csv_names, "line"),
    ".tsv": (_csv_rows, _csv_names, "line"),
    ".parquet": (_parquet_rows, _parquet_names, "row"),
}
"""Type of a file -> its rows with their numbers from 1, its columns, and what the numbers count."""
