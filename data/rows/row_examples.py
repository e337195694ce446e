"""Map the columns of a table to examples: `text` makes documents, `prompt` and `target` make pairs.

Other column names are given by `--columns`, e.g. `--columns prompt=question,target=answer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.data.rows.example import Example

Columns = Mapping[str, str]
"""Field (one of FIELDS) -> name of the column that holds it."""
FIELDS = ("text", "prompt", "target", "id")


def rows_to_examples(
    rows: Iterable[Mapping[str, Any]],
    names: Sequence[str],
    columns: Columns,
    *,
    where: str,
    prefix: str,
    split: str,
) -> tuple[str, Iterator[Example]]:
    """The kind of the table, `documents` or `pairs`, and its rows as examples in their order.

    names    columns of the table
    columns  columns that are not called as their field is
    where    file or data set, for errors
    prefix   beginning of an example's id where no column holds it; what follows its last slash, up to a dot, is the task

    Raises DataError for a missing column, and, while the examples are read, for a value that is not text.
    """
    fields = _fields_of(names, columns, where)
    id_column = columns.get("id")
    task = prefix.rpartition("/")[2].partition(".")[0]

    def examples() -> Iterator[Example]:
        for number, row in enumerate(rows):
            texts = {
                field: _text(row, column, f"{where} row {number} column {column}") for field, column in fields.items()
            }
            identity = row.get(id_column) if id_column else f"{prefix}:{number}"
            if identity is None:
                raise DataError("an id is missing", where=f"{where} row {number} column {id_column}")
            yield Example(str(identity), texts["target"], texts.get("prompt", ""), task=task, split=split)

    return ("pairs" if "prompt" in fields else "documents"), examples()


def _fields_of(names: Sequence[str], columns: Columns, where: str) -> dict[str, str]:
    """Field of an example -> its column. Raises DataError for an unknown field or a missing column."""
    for field in columns:
        if field not in FIELDS:
            raise unknown_name("field in --columns", field, FIELDS)
    column_of = {field: columns.get(field, field) for field in FIELDS}
    missing = [column for field, column in column_of.items() if field in columns and column not in names]
    pairs = column_of["prompt"] in names and column_of["target"] in names and "text" not in columns
    if missing or not (pairs or column_of["text"] in names):
        raise DataError(
            "columns are missing",
            where=where,
            found=", ".join(names) or "none",
            expected=", ".join(missing) or "text, or prompt and target",
            try_="--columns text=NAME or --columns prompt=NAME,target=NAME",
        )
    if pairs:
        return {"prompt": column_of["prompt"], "target": column_of["target"]}
    return {"target": column_of["text"]}


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column; an empty cell is the empty text."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError("a value is not text", where=where, found=type(value).__name__, expected="a string")
    return value
