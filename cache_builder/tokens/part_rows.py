"""`PartRows`: the token rows of some consecutive examples as columns, in memory or in a file that is mapped into it.

Ids are 4 bytes a token and ends 4 bytes; the text is stored beside them. As objects of Python a token took 27 bytes. A row becomes
a `TokenRows`, whose arrays are views of the columns, when it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

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


def columns_of_rows(rows: Sequence[TokenRows]) -> pa.RecordBatch:
    """The rows as columns."""
    numbers = {
        "context_ids": [r.context_ids for r in rows],
        "target_ids": [r.target_ids for r in rows],
        "byte_end": [r.byte_end for r in rows],
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
            *(_lists(numbers[name], kind) for name, kind in NUMBERS.items()),
        ],
        schema=SCHEMA,
    )


def _lists(arrays: Sequence[np.ndarray], kind: pa.DataType) -> pa.Array:
    offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
    np.cumsum([len(a) for a in arrays], out=offsets[1:])
    values = np.concatenate([*arrays, np.zeros(0, dtype=np.int64)]).astype(kind.to_pandas_dtype())
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(values, kind))


class PartRows:
    """The rows of one part."""

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
        return [self._row(first + n, *fields) for n, fields in enumerate(zip(*texts, strict=True))]

    def name(self, row: int) -> str:
        """The id of a row's example."""
        return str(self._columns.column("id")[row].as_py())

    def _row(
        self, row: int, name: str, task: str, split: str, prompt: str, target: str, complete: bool, talk: str | None
    ) -> TokenRows:
        conversation = None if talk is None else replace(conversation_from_json(name, talk), task=task, split=split)
        example = Example(name, target, prompt, task, split, complete=complete, conversation=conversation)
        context, ids, ends = (self._of(c, row) for c in ("context_ids", "target_ids", "byte_end"))
        if talk is None:
            return TokenRows(example, context, ids, ends.astype(np.int64))
        gaps = Gaps(*(self._of(c, row) for c in ("gap_rows", "gap_lengths", "gap_ids")))
        ended, messages = self._of("ended", row).astype(bool), self._of("messages", row)
        return TokenRows(
            example,
            context,
            ids,
            ends.astype(np.int64),
            gaps if len(gaps) else NO_GAPS,
            tuple(ended.tolist()),
            tuple(messages.tolist()),
        )

    def _of(self, column: str, row: int) -> np.ndarray:
        values, offsets = self.numbers[column]
        return values[int(offsets[row]) : int(offsets[row + 1])]


def added(counts: np.ndarray, more: np.ndarray) -> np.ndarray:
    """The sum of two arrays of counts, of which one may be longer."""
    longer, shorter = (counts, more) if len(counts) >= len(more) else (more, counts)
    total = longer.astype(np.int64)
    total[: len(shorter)] += shorter
    return total
