"""The table of a shard's examples: its columns, and the tokens between scored tokens that a conversation has.

In memory each example has `row_start` and `row_end`, its rows counted from the shard's first one. From format version 3 on the file
holds `rows`, the number of them; before, it held the addresses in the arrays, and the number of tokens.

Format version 3 holds conversations. There an example has several runs of scored tokens, and six columns more:

    gap_rows, gap_lengths, gap_ids   the tokens between the runs, see `kd.models.batching.gaps`
    ended                            for each run, whether its last token is the control token that ends a turn
    messages                         for each run, the number of the message that it is
    conversation                     the messages as JSON

`target` is then the text of all runs, one after another, and `byte_end` counts in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from kd.data.conversations.conversation import CONVERSATIONS
from kd.models.batching.gaps import NO_GAPS, Gaps

EXAMPLE_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("task", pa.string()),
        ("split", pa.string()),
        ("prompt", pa.string()),
        ("target", pa.string()),
        ("context_ids", pa.list_(pa.int32())),
        ("rows", pa.int32()),
        ("tokens_digest", pa.binary(16)),
    ]
)
"""Columns of documents, pairs and classes."""
OLD_SCHEMA = pa.schema(
    [
        *(EXAMPLE_SCHEMA.field(i) for i in range(EXAMPLE_SCHEMA.get_field_index("rows"))),
        ("n_tokens", pa.int32()),
        ("row_start", pa.int64()),
        ("row_end", pa.int64()),
        ("tokens_digest", pa.binary(16)),
    ]
)
"""The same before format version 3."""
GAP_COLUMNS = {"gap_rows": "rows", "gap_lengths": "lengths", "gap_ids": "ids"}
"""Column -> the field of `Gaps` that it holds."""
CONVERSATION_SCHEMA = pa.schema(
    [
        *EXAMPLE_SCHEMA,
        *((name, pa.list_(pa.int32())) for name in GAP_COLUMNS),
        ("ended", pa.list_(pa.bool_())),
        ("messages", pa.list_(pa.int32())),
        ("conversation", pa.string()),
    ]
)
"""Columns of conversations, which format version 3 was the first to hold."""
LISTS = ("context_ids", *GAP_COLUMNS)
"""Columns with a list of numbers for each example."""

Columns = dict[str, list[Any]]
"""Column -> its values, one for each example; lists of numbers are arrays."""


def example_schema(kind: str, version: int) -> pa.Schema:
    """The columns in the files of a cache of this kind of corpus and format version."""
    if version < 3:
        return OLD_SCHEMA
    return CONVERSATION_SCHEMA if kind == CONVERSATIONS else EXAMPLE_SCHEMA


def table_of_examples(examples: Sequence[Mapping[str, Any]], kind: str, version: int, row_start: int) -> pa.Table:
    """A shard's table as it is written.

    examples    for each example the columns of version 3
    row_start   address of the shard's first row in the arrays, which older versions record
    """
    schema = example_schema(kind, version)
    columns: dict[str, Any] = {name: [e[name] for e in examples] for name in schema.names if name in examples[0]}
    if version < 3:
        ends = row_start + np.cumsum([e["rows"] for e in examples])
        columns |= {"row_start": ends - [e["rows"] for e in examples], "row_end": ends}
        columns["n_tokens"] = [len(e["context_ids"]) + e["rows"] for e in examples]
    return pa.table({name: columns[name] for name in schema.names}, schema)


def example_columns(table: pa.Table, row_start: int, rows: int) -> Columns:
    """Columns as lists; lists of ids as arrays, which for long contexts are a hundred times smaller and faster.

    row_start   address of the shard's first row in the arrays
    rows        rows of the shard

    Raises ValueError where the rows or the gaps of an example are impossible.
    """
    columns = {name: table[name].to_pylist() for name in table.schema.names if name not in LISTS}
    for name in set(LISTS) & set(table.schema.names):
        lists = table[name].combine_chunks()
        values = np.asarray(lists.flatten(), dtype=np.int32)
        columns[name] = np.split(values, np.cumsum(lists.value_lengths().to_numpy())[:-1])
    if "rows" in columns:
        counts = np.asarray(table["rows"], dtype=np.int64)
        if (counts < 1).any() or counts.sum() != rows:
            raise ValueError("the examples do not cover the shard's rows")
        ends = np.cumsum(counts)
        starts = ends - counts
    else:
        starts, ends = (np.asarray(table[name], dtype=np.int64) - row_start for name in ("row_start", "row_end"))
    columns |= {"row_start": starts.tolist(), "row_end": ends.tolist()}
    if "gap_rows" in columns:
        for i, (first, stop) in enumerate(zip(columns["row_start"], columns["row_end"], strict=True)):
            gaps_at(columns, i).check(stop - first)
            turns = {len(columns[name][i]) for name in ("ended", "messages")}
            if turns != {len(columns["gap_rows"][i]) + 1}:
                raise ValueError("turns do not belong to the gaps between them")
    return columns


def gaps_at(columns: Mapping[str, Any], example: int) -> Gaps:
    """The gaps of one example of a table; none in documents and pairs."""
    if "gap_rows" not in columns:
        return NO_GAPS
    return Gaps(**{field: columns[name][example] for name, field in GAP_COLUMNS.items()})
