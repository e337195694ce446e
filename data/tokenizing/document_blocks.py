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

from collections import Counter, deque
from collections.abc import Iterator

import numpy as np

from kd.common.errors import DataError
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.text_tokens import TextTokens
from kd.data.tokenizing.token_notes import TokenNotes
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.tokenizer import Stretch

SPARE = 64
"""Tokens that are at hand beyond a block: more than a character has."""


def document_blocks(
    example: Example, text: TextTokens, config: BlockConfig, notes: TokenNotes | None = None
) -> Iterator[TokenRows]:
    """Cut one document into blocks of at most `seq_len` tokens; none where it has no token to score."""
    data = example.target.encode("utf-8")
    left = deque(_stretches(example, text, config, notes))
    first = left.popleft()
    ids, ends = first.ids, first.ends()  # of a long document those that the next block may need, not all

    def at_boundary(token: int) -> bool:  # of characters; asked of few tokens, so that a token costs nothing
        end = int(ends[token])
        return end == len(data) or data[end] & 0xC0 != 0x80

    start = next((i + 1 for i in range(len(ids)) if at_boundary(i)), len(ids))
    stride = config.stride or config.seq_len - 1
    number = dropped = 0
    while start < len(ids) or left:
        while left and len(ids) < start + config.seq_len + SPARE:
            more, passed = left.popleft(), max(0, start - config.seq_len)
            ids = np.concatenate([ids[passed:], more.ids])
            ends = np.concatenate([ends[passed:], more.ends(int(ends[-1]))])
            start, dropped = start - passed, dropped + passed
        last = len(ids)
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
                where=f"example {example.id} token {dropped + start}",
                found=f"seq-len {config.seq_len}",
                try_="a larger --seq-len",
            )
        base = int(ends[start - 1])
        prompt = data[int(ends[context - 1]) if context else 0 : base].decode("utf-8", "ignore")
        block = _block(example, number, prompt, data[base : int(ends[stop - 1])].decode("utf-8"))
        yield TokenRows(block, ids[context:start], ids[start:stop], ends[start:stop] - base)
        start, number = stop, number + 1


def whole_document(example: Example, text: TextTokens, config: BlockConfig) -> TokenRows | None:
    """The one block of a document that was tokenised ahead and is not longer: what `document_blocks` gives, in a fifth of its time.

    None for every other document, and for one of which something is to be noted.
    """
    known = text.ahead(example.target)
    if known is None:
        return None
    (ids, ends), target = known, example.target
    bos, eos = (text.bos if config.bos else None), (text.eos if config.eos else None)
    length = len(ids) + (bos is not None) + (eos is not None)
    if not 1 < length <= config.seq_len or ids[0] == bos or (eos is not None and text.ends_with_eos(target)):
        return None
    data = b"" if target.isascii() else target.encode("utf-8")
    size = len(data) or len(target)
    if ends[-1] != size:
        return None
    if eos is not None:
        ids, ends = np.append(ids, np.int32(eos)), np.append(ends, size)
    if bos is not None:
        return TokenRows(_block(example, 0, "", target), text.bos_alone, ids, ends)
    base = int(ends[0])
    if data and base < size and data[base] & 0xC0 == 0x80:  # the first character has more tokens
        return None
    data = data or target.encode("utf-8")
    block = _block(example, 0, data[:base].decode("utf-8"), data[base:].decode("utf-8"))
    return TokenRows(block, ids[:1], ids[1:], ends[1:] - base)


def _block(example: Example, number: int, prompt: str, target: str) -> Example:
    return Example(id=f"{example.id}#{number}", target=target, prompt=prompt, task=example.task, split=example.split)


def _stretches(example: Example, text: TextTokens, config: BlockConfig, notes: TokenNotes | None) -> list[Stretch]:
    """The tokens of a document with BOS and EOS as the settings say, at least one stretch; `notes` receives what was found."""
    counts: Counter[str] = Counter()
    stretches = text.document(example.target, counts)
    if config.eos and text.eos is not None:
        if text.ends_with_eos(example.target):
            counts["eos_in_text"] += 1
        else:
            stretches[-1] = stretches[-1].with_control(text.eos, len(stretches[-1].ids))
    if config.bos and text.bos is not None:
        if len(stretches[0].ids) and stretches[0].ids[0] == text.bos:
            counts["bos_in_text"] += 1
        else:
            stretches[0] = stretches[0].with_control(text.bos, 0)
    if notes is not None and counts:
        notes.add(counts, example.id)
        notes.changed |= any(counts[note] for note in ("eos_in_text", "bos_in_text", "control_tokens_as_text"))
    return stretches
