"""Every row must have the columns that are read; an empty value is a value."""

from __future__ import annotations

from typing import Any

import pytest

from kd.common.errors import DataError
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.rows.row_examples import rows_to_examples
from kd.data.rows.row_reading import RowReading
from kd.data.rows.tables import rows_in


def examples(rows: list[dict[str, Any]], left_out: LeftOut | None = None, **columns: str) -> tuple[str, list[Example]]:
    kind, found = rows_to_examples(
        rows,
        list(rows[0]),
        RowReading(columns),
        where="t",
        location=rows_in("t"),
        prefix="t",
        split="train",
        left_out=LeftOut() if left_out is None else left_out,
    )
    return kind, list(found)


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "a", "target": "b"}, {"prompt": "c", "answer": "d"}],
        [{"prompt": "a", "target": "b"}, {"target": "d"}],  # it would become unconditional
        [{"text": "a"}, {"prompt": "a", "target": "b"}],
        [{"text": "a"}, {"text": "a", "prompt": "a", "target": "b"}],
        [{"prompt": "a", "target": "b"}, {"prompt": "a", "target": "b", "text": "c"}],
        [{"text": "a"}, {}],
    ],
)
def test_a_row_with_other_columns_is_an_error_that_names_it(rows: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match="other columns than the first row") as caught:
        examples(rows)
    assert caught.value.details["where"] == "t row 2"


def test_other_keys_may_come_and_go() -> None:
    assert [e.target for e in examples([{"text": "a", "meta": 1}, {"text": "b"}, {"text": "c", "more": 2}])[1]] == [
        "a",
        "b",
        "c",
    ]
    rows = [{"q": "a", "a": "b", "text": "x"}, {"q": "c", "a": "d"}]
    assert [e.prompt for e in examples(rows, prompt="q", target="a")[1]] == ["a", "c"]
    with pytest.raises(DataError, match="missing: a"):
        examples([*rows, {"q": "e"}], prompt="q", target="a")


def test_null_and_nan_are_the_empty_text_and_a_pair_without_a_prompt_is_counted() -> None:
    left_out = LeftOut()
    rows = [{"prompt": p, "target": "t"} for p in ("p", None, "", float("nan"))]
    assert [e.prompt for e in examples(rows, left_out)[1]] == ["p", "", "", ""]
    assert left_out.document() == {"without_prompt": {"count": 3, "first": "t:1"}}


def test_an_id_that_is_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="an id is missing") as caught:
        examples([{"text": "a", "key": float("nan")}], id="key")
    assert caught.value.details["where"] == "t row 1 column key"
