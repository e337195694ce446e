"""Rows of files one after the other, for texts that are too large to be read whole.

`.jsonl` and `.parquet` are read piece by piece, also compressed `.jsonl`; the other types as `kd.data.rows.tables` reads them.
What is wrong in a row is the same error as there, raised when the row is reached.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kd.common.errors import DataError
from kd.data.rows.compressed import COMPRESSIONS, UNREADABLE, TextFile, file_type, open_text, parquet_source
from kd.data.rows.tables import UnreadRow, json_lines, read_table, unreadable

BATCH_ROWS = 1_000
"""Rows of a Parquet file in memory at once."""


@dataclass(frozen=True)
class StreamedRow:
    """A row and where it is."""

    number: int
    """Number of the row in its file, from 0."""
    row: Mapping[str, Any]
    location: str


def numbered_rows(rows: Iterable[Mapping[str, Any]], where: str) -> Iterator[StreamedRow]:
    """Rows from elsewhere, with their numbers."""
    for number, row in enumerate(rows):
        yield StreamedRow(number, row, f"{where} row {number + 1}")


def stream_rows(file: TextFile, columns: Collection[str]) -> Iterator[StreamedRow]:
    """The rows of a table file in its order; of Parquet, `columns` alone, as far as there are any of them. Raises DataError."""
    kind = file_type(file)
    try:
        if kind == ".jsonl":
            yield from _json_rows(file)
        elif kind == ".parquet" and file.suffix.lower() not in COMPRESSIONS:
            yield from _parquet_rows(file, columns)
        else:
            table = read_table(file)
            yield from (
                StreamedRow(number, _read(row), table.location(number)) for number, row in enumerate(table.rows)
            )
    except DataError:
        raise
    except UNREADABLE as error:
        raise unreadable(file, error) from error


def _json_rows(file: TextFile) -> Iterator[StreamedRow]:
    with open_text(file) as lines:
        for number, (line, row) in enumerate(json_lines(file, lines)):
            yield StreamedRow(number, _read(row), f"{file} line {line}")


def _read(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """The row. Raises DataError for one that could not be read."""
    if isinstance(row, UnreadRow):
        raise row.error
    return row


def _parquet_rows(file: TextFile, columns: Collection[str]) -> Iterator[StreamedRow]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(parquet_source(file)) as opened:
        names = [name for name in opened.schema_arrow.names if name in columns]
        number = 0
        for batch in opened.iter_batches(BATCH_ROWS, columns=names):
            for row in batch.to_pylist():
                yield StreamedRow(number, row, f"{file} row {number + 1}")
                number += 1
