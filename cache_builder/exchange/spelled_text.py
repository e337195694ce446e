"""The text of a sequence that has token ids alone: the bytes that its ids stand for, one after another.

Losses that compare token by token do not read it. Those that align two tokenizers do, and so does whoever looks at the cache.
BOS at the beginning and EOS at the end stand for no text, as in a cache that kd builds. Other control tokens are spelled.
Bytes that are no whole character, where a sequence begins or ends inside one, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kd.cache_builder.exchange.source_sequences import SourceText
from kd.models.tokenizer import Tokenizer, token_bytes


class Speller:
    """Spells token ids with the pieces of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.pieces = token_bytes(tokenizer)
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        first = tokenizer("a", add_special_tokens=False)["input_ids"]
        self.marks_start = bool(first) and self.pieces[first[0]][:1] == b" "
        """Whether the tokenizer puts a space before a text that does not begin with one, as sentencepiece does."""
        self.bytes_left_out = 0
        """Bytes of predicted tokens that were no whole characters."""

    def text(self, input_ids: np.ndarray, context: int) -> SourceText:
        """The text of a sequence whose first `context` tokens are not predicted."""
        pieces = [self.pieces[i] for i in input_ids.tolist()]
        if input_ids[0] == self.bos:
            pieces[0] = b""
        if input_ids[-1] == self.eos:
            pieces[-1] = b""
        start = next((number for number, piece in enumerate(pieces) if piece), None)
        if self.marks_start and start is not None and pieces[start][:1] == b" ":
            pieces[start] = pieces[start][1:]
        prompt, _ = _whole_characters(pieces[:context])
        target, ends = _whole_characters(pieces[context:])
        self.bytes_left_out += sum(map(len, pieces[context:])) - len(target)
        return SourceText(prompt.decode("utf-8"), target.decode("utf-8"), ends)


def _whole_characters(pieces: Sequence[bytes]) -> tuple[bytes, np.ndarray]:
    """The bytes of whole characters among the pieces, and where each piece ends in them `[n]`."""
    data = b"".join(pieces)
    whole = np.ones(len(data), dtype=bool)
    start = 0
    while start < len(data):
        try:
            data[start:].decode("utf-8")
            break
        except UnicodeDecodeError as error:
            whole[start + error.start : start + error.end] = False
            start += error.end
    before = np.concatenate([[0], np.cumsum(whole)])
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    return bytes(np.frombuffer(data, dtype=np.uint8)[whole]), before[ends].astype(np.int64)
