"""The rows of a split before any is cut: a row for each item of its lists, and an order that a seed fixes.

Both come before the parts of a split (`train[:-200]`) and before a cap. A row keeps its number at the source, so that its id does
not depend on the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kd.common.errors import DataError
from kd.data.instruction_tasks.draws import keyed
from kd.data.instruction_tasks.row_reading.row_field import column_value
from kd.data.rows.tables import RowLocation


def seeded_order(rows: int, seed: int) -> list[int]:
    """The numbers 0..rows-1 in an order that depends on `seed` and `rows` alone."""
    return sorted(range(rows), key=lambda number: keyed(seed, "shuffle", number))


def one_row_per_item(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], location: RowLocation
) -> tuple[list[dict[str, Any]], RowLocation]:
    """A row for each item of the lists in `columns`, which are cut to that item; and the places of the new rows.

    Raises DataError where a column holds no list, or the lists of a row have different lengths.
    """
    items: list[dict[str, Any]] = []
    origins: list[tuple[int, int]] = []
    for number, row in enumerate(rows):
        lists = {column: column_value(row, column, location(number)) for column in columns}
        if all(
            value is None for value in lists.values()
        ):  # it stays one row, which is left out and counted where it is read
            items.append(dict(row))
            origins.append((number, 0))
            continue
        for column, value in lists.items():
            if not isinstance(value, list):
                raise DataError(
                    "a row has no list to make one example of each item",
                    where=f"{location(number)} column {column}",
                    found=type(value).__name__,
                    expected="a list",
                )
        lengths = {column: len(value) for column, value in lists.items()}
        if len(set(lengths.values())) > 1:
            raise DataError(
                "the lists of a row have different lengths",
                where=location(number),
                found=", ".join(f"{column} {length}" for column, length in lengths.items()),
                expected="one item of each for every example",
            )
        for item in range(next(iter(lengths.values()))):
            changed: Mapping[str, Any] = row
            for column, value in lists.items():
                changed = _with_value(changed, column.split("."), value[item])
            items.append(dict(changed))
            origins.append((number, item))

    def item_place(index: int) -> str:
        number, item = origins[index]
        return f"{location(number)} item {item + 1}"

    return items, item_place


def _with_value(row: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of the row with another value at a path."""
    name, *rest = path
    return dict(row) | {name: _with_value(row[name], rest, value) if rest else value}
