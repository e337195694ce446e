"""Cut documents into blocks in which every token but the first of the document is scored once.

A block of L tokens has L - 1 rows, because its first token is only context. Consecutive blocks overlap by `L - stride`
context tokens, so every token of a document but its first is scored exactly once, with any stride. The default stride,
L - 1, wastes nothing. A smaller stride gives every token at least `L - stride` tokens of context and takes proportionally
more teacher time. Blocks never cross documents. With `bos`, a document begins with the tokenizer's BOS token, and its first
real token is scored too.

Blocks end at character boundaries, so each has an exact text. Without BOS, the first token that ends on a boundary is
context, with all tokens before it. A character of more tokens than the stride stays whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from kd.common.errors import DataError
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.text_tokens import TextTokens
from kd.data.tokenizing.token_notes import TokenNotes
from kd.data.tokenizing.token_rows import TokenRows


def document_blocks(
    example: Example, text: TextTokens, config: BlockConfig, notes: TokenNotes | None = None
) -> Iterator[TokenRows]:
    """Cut one document into blocks of at most `seq_len` tokens; none where it has no token to score."""
    counts: Counter[str] = Counter()
    ids, ends = text.document(example.target, counts)
    data = example.target.encode("utf-8")
    before, after = [], []
    if config.eos and text.eos is not None:
        if text.ends_with_eos(example.target):
            counts["eos_in_text"] += 1
        else:
            after.append(text.eos)
    if config.bos and text.bos is not None:
        if len(ids) and ids[0] == text.bos:
            counts["bos_in_text"] += 1
        else:
            before.append(text.bos)
    if before or after:
        ids = np.concatenate([before, ids, after])
        ends = np.concatenate([[0] * len(before), ends, [len(data)] * len(after)]).astype(np.int64)
    if notes is not None:
        notes.add(counts, example.id)
        notes.changed |= any(counts[note] for note in ("eos_in_text", "bos_in_text", "control_tokens_as_text"))
    ids = ids.astype(np.int32)
    last = len(ids)

    def at_boundary(token: int) -> bool:  # of characters; asked of few tokens, so that a token costs nothing
        end = int(ends[token])
        return end == len(data) or data[end] & 0xC0 != 0x80

    start = next((i + 1 for i in range(last) if at_boundary(i)), last)
    stride = config.stride or config.seq_len - 1
    number = 0
    while start < last:
        context = max(0, start - (config.seq_len - stride))
        stop = min(context + config.seq_len, last)
        while stop > start and not at_boundary(stop - 1):
            stop -= 1
        if stop == start:  # the character has more tokens than the stride, so the block has less context
            stop = next(i + 1 for i in range(start, last) if at_boundary(i))
            context = max(context, stop - config.seq_len)
        if context >= start:
            raise DataError(
                "a character does not fit into a block",
                where=f"example {example.id} token {start}",
                found=f"seq-len {config.seq_len}",
                try_="a larger --seq-len",
            )
        base = int(ends[start - 1])
        block = Example(
            id=f"{example.id}#{number}",
            prompt=data[int(ends[context - 1]) if context else 0 : base].decode("utf-8", "ignore"),
            target=data[base : int(ends[stop - 1])].decode("utf-8"),
            task=example.task,
            split=example.split,
        )
        yield TokenRows(block, ids[context:start], ids[start:stop], ends[start:stop] - base)
        start, number = stop, number + 1
