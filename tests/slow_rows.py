"""The slow twin of the pass over a text: one text after another, one token after another, everything in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.tokenizer import Tokenizer, encode_with_ends, token_bytes


def blocks_of(example: Example, tokenizer: Tokenizer, config: BlockConfig) -> Iterator[TokenRows]:
    """The blocks of a document that spells no control token: each token asks whether a character ends with it."""
    ids, ends = (part.tolist() for part in encode_with_ends(tokenizer, token_bytes(tokenizer), example.target))
    data = example.target.encode("utf-8")
    if config.eos and tokenizer.eos_token_id is not None:
        ids, ends = [*ids, tokenizer.eos_token_id], [*ends, len(data)]
    if config.bos and tokenizer.bos_token_id is not None:
        ids, ends = [tokenizer.bos_token_id, *ids], [0, *ends]
    whole = [end == len(data) or data[end] & 0xC0 != 0x80 for end in ends]
    start = whole.index(True) + 1 if True in whole else len(ids)
    stride, number = config.stride or config.seq_len - 1, 0
    while start < len(ids):
        context = max(0, start - (config.seq_len - stride))
        stop = min(context + config.seq_len, len(ids))
        while stop > start and not whole[stop - 1]:
            stop -= 1
        if stop == start:
            stop = whole.index(True, start) + 1
            context = max(context, stop - config.seq_len)
        base = ends[start - 1]
        block = Example(
            f"{example.id}#{number}",
            data[base : ends[stop - 1]].decode(),
            data[ends[context - 1] if context else 0 : base].decode("utf-8", "ignore"),
            example.task,
            example.split,
        )
        yield TokenRows(
            block,
            np.array(ids[context:start], dtype=np.int32),
            np.array(ids[start:stop], dtype=np.int32),
            np.array(ends[start:stop]) - base,
        )
        start, number = stop, number + 1


def same_rows(rows: Sequence[TokenRows], others: Sequence[TokenRows]) -> None:
    """Raise AssertionError where two lists of rows differ in anything but how their arrays are held."""
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.example == other.example
        assert row.gaps == other.gaps
        assert (row.ended, row.messages) == (other.ended, other.messages)
        for name in ("context_ids", "target_ids", "byte_end"):
            mine, theirs = getattr(row, name), getattr(other, name)
            assert mine.dtype == theirs.dtype, name
            np.testing.assert_array_equal(mine, theirs)
