"""`PartRows`: consecutive token rows of a text as columns, in memory or in a file that is mapped into it.

Ids are 4 bytes a token and ends 4 bytes; the text is stored beside them. As objects of Python a token took 27 bytes. A row becomes
a `TokenRows`, whose arrays are views of the columns, when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import pyarrow as pa

from kd.data.conversations.conversation import conversation_from_json
from kd.data.rows.example import Example
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.batching.gaps import NO_GAPS, Gaps

TEXTS = ("id", "task", "split", "prompt", "target")
"""Fields of an example that are stored as they are."""
NUMBERS = {
    "context_ids": pa.int32(),
    "target_ids": pa.int32(),
    "byte_end": pa.uint32(),
    "gap_rows": pa.int32(),
    "gap_lengths": pa.int32(),
    "gap_ids": pa.int32(),
    "ended": pa.uint8(),
    "messages": pa.int32(),
}
"""Columns of a number list for each row -> type of the numbers."""
SCHEMA = pa.schema(
    [
        *((name, pa.large_string()) for name in TEXTS),
        ("complete", pa.bool_()),
        ("conversation", pa.large_string()),
        *((name, pa.large_list(kind)) for name, kind in NUMBERS.items()),
    ]
)


BATCH_TOKENS = 1 << 20
"""Tokens after which columns end: a document of any length is never held as rows."""
HELD_ROWS = 2048
"""Rows that are objects of Python at a time. Of more, Python's search for cycles takes a tenth of the pass."""


def batches_of_rows(rows: Iterable[TokenRows]) -> Iterator[pa.RecordBatch]:
    """The rows as columns, about BATCH_TOKENS tokens at a time."""
    columns, held, size = list[pa.RecordBatch](), list[TokenRows](), 0
    for row in rows:
        held.append(row)
        size += len(row.target_ids) + row.read_only
        if size >= BATCH_TOKENS:
            yield joined_columns([*columns, columns_of_rows(held)])
            columns, held, size = [], [], 0
        elif len(held) == HELD_ROWS:
            columns.append(columns_of_rows(held))
            held = []
    if held or columns:
        yield joined_columns([*columns, columns_of_rows(held)] if held else columns)


def joined_columns(batches: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Rows that come one after another, as columns."""
    if len(batches) == 1:
        return batches[0]
    columns = [pa.concat_arrays([batch.column(name) for batch in batches]) for name in SCHEMA.names]
    return pa.record_batch(columns, schema=SCHEMA)


def columns_of_rows(rows: Sequence[TokenRows]) -> pa.RecordBatch:
    """The rows as columns."""
    numbers = {
        "context_ids": [r.context_ids for r in rows],
        "target_ids": [r.target_ids for r in rows],
        "byte_end": [r.byte_end for r in rows],
    }
    if any(r.example.conversation is not None for r in rows):
        numbers |= {
            "gap_rows": [r.gaps.rows for r in rows],
            "gap_lengths": [r.gaps.lengths for r in rows],
            "gap_ids": [r.gaps.ids for r in rows],
            "ended": [np.array(r.ended, dtype=np.uint8) for r in rows],
            "messages": [np.array(r.messages, dtype=np.int32) for r in rows],
        }
    talks = [None if r.example.conversation is None else r.example.conversation.to_json() for r in rows]
    return pa.record_batch(
        [
            *(pa.array([getattr(r.example, name) for r in rows], pa.large_string()) for name in TEXTS),
            pa.array([r.example.complete for r in rows], pa.bool_()),
            pa.array(talks, pa.large_string()),
            *(_lists(numbers.get(name), len(rows), kind) for name, kind in NUMBERS.items()),
        ],
        schema=SCHEMA,
    )


def _lists(arrays: Sequence[np.ndarray] | None, rows: int, kind: pa.DataType) -> pa.Array:
    """A column of the rows' arrays; None stands for empty ones."""
    dtype = kind.to_pandas_dtype()
    offsets, values = np.zeros(rows + 1, dtype=np.int64), np.zeros(0, dtype=dtype)
    if arrays:
        np.cumsum(np.fromiter(map(len, arrays), np.int64, rows), out=offsets[1:])
        values = np.concatenate(arrays, dtype=dtype, casting="unsafe")
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values, kind))


class PartRows:
    """The rows of a part, or of a stretch of a long one."""

    def __init__(self, columns: pa.RecordBatch) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return int(self._columns.num_rows)

    @cached_property
    def numbers(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Column -> (numbers of all rows, `[rows + 1]` where each row's begin): views, nothing is copied."""
        numbers = {}
        for name in NUMBERS:
            column = self._columns.column(name)
            numbers[name] = (column.values.to_numpy(zero_copy_only=True), column.offsets.to_numpy(zero_copy_only=True))
        return numbers

    @property
    def targets(self) -> np.ndarray:
        """`[rows]` scored tokens of each row."""
        return np.diff(self.numbers["target_ids"][1])

    @property
    def read_only(self) -> np.ndarray:
        """`[rows]` tokens of each row that are read and not scored."""
        return np.diff(self.numbers["context_ids"][1]) + np.diff(self.numbers["gap_ids"][1])

    @property
    def text_bytes(self) -> int:
        """Bytes of all scored texts."""
        size = self._columns.column("target").buffers()[2]
        offsets = np.frombuffer(self._columns.column("target").buffers()[1], dtype=np.int64)
        return 0 if size is None else int(offsets[len(self)] - offsets[0])

    def counts(self) -> np.ndarray:
        """`[largest id + 1]` how often each id is read or scored."""
        totals = np.zeros(0, dtype=np.int64)
        for name in ("context_ids", "target_ids", "gap_ids"):
            totals = added(totals, np.bincount(self.numbers[name][0]))
        return totals

    def rows(self, first: int, stop: int) -> list[TokenRows]:
        """Rows `[first, stop)`."""
        part = self._columns.slice(first, stop - first)
        texts = [part.column(name).to_pylist() for name in (*TEXTS, "complete", "conversation")]
        tokens = [self._of(name, first, stop) for name in ("context_ids", "target_ids", "byte_end")]
        return [self._row(first + number, *fields) for number, fields in enumerate(zip(*texts, *tokens, strict=True))]

    def name(self, row: int) -> str:
        """The id of a row's example."""
        return str(self._columns.column("id")[row].as_py())

    def _row(
        self,
        row: int,
        name: str,
        task: str,
        split: str,
        prompt: str,
        target: str,
        complete: bool,
        talk: str | None,
        context: np.ndarray,
        ids: np.ndarray,
        ends: np.ndarray,
    ) -> TokenRows:
        conversation = None if talk is None else replace(conversation_from_json(name, talk), task=task, split=split)
        example = Example(name, target, prompt, task, split, complete=complete, conversation=conversation)
        if talk is None:
            return TokenRows(example, context, ids, ends.astype(np.int64))
        of_talk = {c: self._of(c, row, row + 1)[0] for c in ("gap_rows", "gap_lengths", "gap_ids", "ended", "messages")}
        gaps = Gaps(of_talk["gap_rows"], of_talk["gap_lengths"], of_talk["gap_ids"])
        ended, messages = of_talk["ended"].astype(bool), of_talk["messages"]
        return TokenRows(
            example,
            context,
            ids,
            ends.astype(np.int64),
            gaps if len(gaps) else NO_GAPS,
            tuple(ended.tolist()),
            tuple(messages.tolist()),
        )

    def _of(self, column: str, first: int, stop: int) -> list[np.ndarray]:
        """A column's numbers of each of the rows `[first, stop)`."""
        values, offsets = self.numbers[column]
        return [values[a:b] for a, b in pairwise(offsets[first : stop + 1].tolist())]


def added(counts: np.ndarray, more: np.ndarray) -> np.ndarray:
    """The sum of two arrays of counts, of which one may be longer."""
    longer, shorter = (counts, more) if len(counts) >= len(more) else (more, counts)
    total = longer.astype(np.int64)
    total[: len(shorter)] += shorter
    return total
