"""A field of a template: the column of a row that it is read from, and the rules that make it text.

The rules run in this order: `before` and `after` cut, `unescape`, `drop`, `replace`, `lower`; then the items of a list are joined,
and `wrap` goes around the whole.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from kd.common.errors import DataError
from kd.data.instruction_tasks.text_rules import refuse_long, without
from kd.data.rows.tables import is_nothing


class NullValueError(DataError):
    """A column that a text needs holds nothing: null, or NaN."""


@dataclass(frozen=True)
class Field:
    """A field of a template, and how it is read from a row."""

    columns: tuple[str, ...] = ()
    """Columns; dots descend into mappings. Several columns are joined, and empty ones left out."""
    join: str | None = None
    """Text between the items of a list, the values of a mapping, or several columns. Without it, a list becomes several
    references."""
    numbered: bool = False
    """Turn a list into the lines `1. …`, `2. …`."""
    replace: tuple[tuple[str, str], ...] = ()
    """Pairs (old, new) of texts to replace."""
    drop: str | None = None
    """Regular expression of text to remove, before `replace`."""
    wrap: str = "{}"
    """Text around the value `{}`, e.g. a code fence."""
    group: str | None = None
    """Column of a group: rows with the same value share their references. For references only."""
    text: str | None = None
    """A text that is the same for every row, such as the name of a language; there are no columns then."""
    inner_join: str | None = None
    """Text between the items of each list of a list of lists; empty ones are left out."""
    first: int | None = None
    """Number of items of a list that are used, from the first; None uses all."""
    before: str | None = None
    """Keep what stands before the first of these marks, without white space at its end."""
    after: str | None = None
    """Keep what stands after the first of these marks."""
    unescape: bool = False
    """Turn HTML's names and numbers of characters, such as `&amp;`, into the characters."""
    lower: bool = False
    """Turn the text into lower case."""
    alternatives: tuple[str, ...] = ()
    """Splits in which the items of the list are alternatives; in others `join` makes one answer of them. For references only."""
    empty: str | None = None
    """The text where a list is empty, such as `unanswerable`. For references only."""

    def of_split(self, split: str) -> Field:
        """The field as it is read in a split: without `join` where the items are alternatives."""
        return replace(self, join=None) if split in self.alternatives else self

    def read(self, row: Mapping[str, Any], where: str) -> str | list[str]:
        """The field's text, or its texts where the column holds a list.

        Raises NullValueError for a value that is nothing, and DataError for one that is not text.
        """
        if self.text is not None:
            return self.wrap.replace("{}", self.text)
        values = [column_value(row, column, where) for column in self.columns]
        value = values[0] if len(values) == 1 else [v for v in values if v not in (None, "")]
        if isinstance(value, dict) and (self.join is not None or self.numbered):
            value = list(value.values())
        if isinstance(value, list):
            texts = [self._item(item, where) for item in value[: self.first]]
            if self.numbered:
                return self._wrapped("\n", [f"{i}. {text}" for i, text in enumerate(texts, 1)], where)
            if self.join is None and len(values) == 1:
                return [self._wrapped("", [text], where) for text in texts]
            return self._wrapped(self.join if self.join is not None else "\n", texts, where)
        return self._wrapped("", [self._clean(value, where)], where)

    def holds_nothing(self, row: Mapping[str, Any], where: str) -> bool:
        """Whether the column, or an item of its list, is null or NaN; among several columns such a one is only left out."""
        if len(self.columns) != 1:
            return False
        value = column_value(row, self.columns[0], where)
        items = value[: self.first] if isinstance(value, list) else [value]
        return any(is_nothing(item) for item in items)

    def _wrapped(self, join: str, texts: list[str], where: str) -> str:
        refuse_long(sum(map(len, texts)) + len(texts) * len(join) + len(self.wrap), where)
        return self.wrap.replace("{}", join.join(texts))

    def _item(self, item: Any, where: str) -> str:
        """An item of a list; one that is a list itself is joined by `inner_join`."""
        if isinstance(item, list) and self.inner_join is not None:
            return self.inner_join.join(part for one in item if (part := self._clean(one, where)))
        return self._clean(item, where)

    def _clean(self, value: Any, where: str) -> str:
        if is_nothing(value) or isinstance(value, list | dict):
            error = NullValueError if is_nothing(value) else DataError
            raise error(
                "a value is not text",
                where=f"{where} column {', '.join(self.columns)}",
                found="nothing" if is_nothing(value) else type(value).__name__,
                expected="a string",
            )
        text = self._cut(str(value), where)
        if self.unescape:
            text = html.unescape(text)
        if self.drop is not None:
            text = without(self.drop, text, where)
        for old, new in self.replace:
            times = text.count(old)
            refuse_long(len(text) + times * (len(new) - len(old)), where)
            text = text.replace(old, new) if times else text
        return text.lower() if self.lower else text

    def _cut(self, text: str, where: str) -> str:
        mark = self.before if self.before is not None else self.after
        if mark is None:
            return text
        start, mark_there, end = text.partition(mark)
        if not mark_there:
            raise DataError(
                "a text lacks the mark at which it is cut",
                where=f"{where} column {', '.join(self.columns)}",
                found=text[:80],
                expected=mark,
                try_="where: {COLUMN: EXPRESSION}, which leaves such rows out",
            )
        return start.rstrip() if self.before is not None else end


def label_key(value: Any) -> str:
    """A label in the form in which labels are compared: `True` -> true, `1` -> 1, ` Yes` -> yes, null and NaN -> none.

    CSV and Parquet then agree.
    """
    return "none" if is_nothing(value) else str(value).strip().lower()


def column_value(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The value at a column or dotted path; None for null and for NaN. Raises DataError where there is none."""
    value: Any = row
    for key in column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            names: Iterable[str] = value if isinstance(value, Mapping) else [type(value).__name__]
            raise DataError("columns are missing", where=where, found=", ".join(map(str, names)), expected=column)
        value = value[key]
    return None if is_nothing(value) else value
