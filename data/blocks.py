"""Turn text into token rows: documents are cut into blocks, prompt/target pairs stay whole.

A *row* predicts one target token. A block of L tokens has L - 1 rows, because its first token is only context. Consecutive
blocks overlap by `L - stride` context tokens, so every token of a document but its first is scored exactly once, with any
stride. The default stride, L - 1, wastes nothing. A smaller stride gives every token at least `L - stride` tokens of context
and takes proportionally more teacher time. Blocks never cross documents. With `bos`, a document begins with the tokenizer's
BOS token, and its first real token is scored too.

Blocks end at character boundaries, so each has an exact text. Without BOS, the first token that ends on a boundary is
context, with all tokens before it. A character of more tokens than the stride stays whole.

Pairs are not cut into blocks. For an encoder-decoder teacher the context is what its encoder reads (the prompt and EOS), and
row t is predicted at position t of its decoder. A pair that is too long stops the build, is dropped, or is truncated: the
target at its end (it then has no EOS row), the prompt at its beginning, which matters less. Each text to classify is one
row: the context is what the classifier reads, the target is the number of its label.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from kd.common.errors import DataError, unknown_name
from kd.data.instruction_tasks.glue import CLASSES, PAIR
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.sources import Corpus
from kd.models.tokenizer import Tokenizer, encode_texts, encode_with_ends, token_bytes

OVERLONG = ("error", "drop", "truncate")
"""Policies for pairs that are too long."""


@dataclass(frozen=True)
class BlockConfig:
    """How text becomes rows. These settings are part of a cache's identity."""

    seq_len: int = 512
    """Tokens per block, context included."""
    stride: int | None = None
    """New tokens scored per block, from 1 to seq_len - 1; None is seq_len - 1."""
    bos: bool = True
    """Begin each document or prompt with the BOS token, if the tokenizer has one."""
    eos: bool = False
    """Score an EOS token after each document. Targets of pairs always end with EOS, if the tokenizer has one."""
    separator: str = "\n"
    """Text between prompt and target of a pair, tokenised with the prompt. Not used with an encoder."""
    encoder: bool = False
    """Whether an encoder reads the context. Then only the context is limited by `seq_len`; it ends with EOS and has no BOS."""
    target_len: int | None = None
    """Maximum number of target tokens of a pair, EOS included; None is what `seq_len` leaves."""
    overlong: str = "error"
    """Policy for pairs that are too long: error, drop or truncate."""

    def __post_init__(self) -> None:
        if self.overlong not in OVERLONG:
            raise unknown_name("policy for pairs that are too long", self.overlong, OVERLONG)
        if self.target_len is not None and self.target_len < 1:
            raise DataError("the target length is too small", found=self.target_len, expected="at least 1 token")
        if self.seq_len < 2:
            raise DataError(
                "the sequence length is too small",
                found=self.seq_len,
                expected="at least 2 tokens",
                try_="--seq-len 512",
            )
        if self.stride is not None and not 1 <= self.stride < self.seq_len:
            raise DataError(
                "the stride does not fit the sequence length",
                found=self.stride,
                expected=f"1..{self.seq_len - 1} tokens",
                try_="--stride",
            )

    def normalised(self, kind: str, tokenizer: Tokenizer) -> BlockConfig:
        """Settings that give the same rows, where those that `tokenize_corpus` ignores for this kind of corpus are fixed.

        Pairs have no stride and always end with EOS; documents have no separator; BOS and EOS are off where the tokenizer
        has none. For texts to classify only the length matters, because the tokenizer adds its special tokens.
        """
        if kind == CLASSES:
            return BlockConfig(self.seq_len, self.seq_len - 1, bos=False, overlong=self.overlong)
        pairs = kind != "documents"
        return replace(
            self,
            stride=self.seq_len - 1 if pairs or self.stride is None else self.stride,
            bos=self.bos and tokenizer.bos_token_id is not None and not self.encoder,
            eos=(self.eos or pairs) and tokenizer.eos_token_id is not None,
            separator=self.separator if pairs and not self.encoder else BlockConfig.separator,
            target_len=self.target_len if pairs else None,
            overlong=self.overlong if pairs else "error",
        )


@dataclass(frozen=True)
class TokenRows:
    """One cached example: models read `context_ids`, and each of `target_ids` is one scored row."""

    example: Example
    context_ids: np.ndarray
    """[C] int32, C >= 1."""
    target_ids: np.ndarray
    """[n] int32, n >= 1; row t is predicted at position C - 1 + t."""
    byte_end: np.ndarray
    """[n] int64: the end of each target token in the UTF-8 bytes of `example.target`."""

    @property
    def input_ids(self) -> np.ndarray:
        """`[C + n]`: context and target, as a model reads them. The last position predicts nothing that is cached."""
        return np.concatenate([self.context_ids, self.target_ids])


def tokenize_corpus(
    corpus: Corpus, tokenizer: Tokenizer, config: BlockConfig, left_out: LeftOut | None = None
) -> Iterator[TokenRows]:
    """All rows of `corpus` in order. Raises DataError naming the example that cannot be scored.

    left_out   receives the pairs that are `too_long` and were dropped, and those whose prompt or target was `shortened`
    """
    pieces = token_bytes(tokenizer)
    if corpus.kind == "documents":
        if config.encoder:
            raise DataError(
                "an encoder-decoder teacher needs a prompt for its encoder",
                where=corpus.spec,
                found="documents",
                expected="prompt and target",
                try_="--columns prompt=…,target=…, or --data flan:four",
            )
        for example in corpus.examples:
            yield from document_blocks(example, tokenizer, pieces, config)
        return
    left_out = LeftOut() if left_out is None else left_out
    refused: list[str] = []
    if corpus.kind == CLASSES:
        pairs = _classified(corpus.examples, tokenizer, config.seq_len)
    else:
        whole = (tokenize_pair(example, tokenizer, pieces, config) for example in corpus.examples)
        pairs = ((row, fit_pair(row, config)) for row in whole)
    for row, fitted in pairs:
        example = row.example
        if fitted is row:
            yield row
        elif config.overlong == "error":
            refused.append(f"{example.id} ({len(row.context_ids)} context and {len(row.target_ids)} target tokens)")
        elif config.overlong == "drop" or fitted is None:
            left_out.add("too_long", example.id)
        else:
            left_out.add("shortened", example.id)
            yield fitted
    if refused:
        limits = f"{config.seq_len} " + ("for the prompt" if config.encoder else "in all")
        raise DataError(
            "examples are longer than the limits",
            where=corpus.spec,
            found=f"{len(refused)} of {len(corpus.examples)}, first {refused[0]}",
            expected=limits + (f", {config.target_len} for the target" if config.target_len else ""),
            try_="a larger --seq-len or --target-len; cache build also has --overlong drop and truncate",
        )


def _classified(
    examples: Sequence[Example], tokenizer: Tokenizer, seq_len: int
) -> Iterator[tuple[TokenRows, TokenRows | None]]:
    """(whole row, row of at most `seq_len` tokens) of each text to classify; the target is the number of the label."""
    texts = [tuple(example.prompt.split(PAIR)) for example in examples]
    for example, ids, cut in zip(
        examples, encode_texts(tokenizer, texts), encode_texts(tokenizer, texts, seq_len), strict=True
    ):
        end = np.array([len(example.target.encode("utf-8"))])
        row = TokenRows(example, np.array(ids, dtype=np.int32), np.array([example.answer], dtype=np.int32), end)
        yield row, row if len(cut) == len(ids) else replace(row, context_ids=np.array(cut, dtype=np.int32))


def document_blocks(
    example: Example, tokenizer: Tokenizer, pieces: list[bytes], config: BlockConfig
) -> Iterator[TokenRows]:
    """Cut one document into blocks of at most `seq_len` tokens."""
    ids, ends = encode_with_ends(tokenizer, pieces, example.target)
    data = example.target.encode("utf-8")
    if config.eos and tokenizer.eos_token_id is not None:
        ids, ends = np.append(ids, np.int32(tokenizer.eos_token_id)), np.append(ends, len(data))
    if config.bos and tokenizer.bos_token_id is not None:
        ids, ends = np.insert(ids, 0, tokenizer.bos_token_id), np.insert(ends, 0, 0)
    ids = ids.astype(np.int32)
    last = len(ids)
    at_boundary = [end == len(data) or data[end] & 0xC0 != 0x80 for end in ends]  # of characters
    start = next((i + 1 for i in range(last) if at_boundary[i]), last)
    if start >= last:
        raise DataError(
            "a document is too short to have a scored token",
            where=f"example {example.id}",
            found=f"{last} tokens",
            expected="at least 2 tokens, the first being context only",
            try_="drop the document, or join short documents",
        )
    stride = config.stride or config.seq_len - 1
    number = 0
    while start < last:
        context = max(0, start - (config.seq_len - stride))
        stop = min(context + config.seq_len, last)
        while stop > start and not at_boundary[stop - 1]:
            stop -= 1
        if stop == start:  # the character has more tokens than the stride, so the block has less context
            stop = next(i + 1 for i in range(start, last) if at_boundary[i])
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


def tokenize_pair(example: Example, tokenizer: Tokenizer, pieces: list[bytes], config: BlockConfig) -> TokenRows:
    """Context and target of a pair, of any length. Raises DataError where there is no context."""
    if config.encoder:
        context, _ = encode_with_ends(tokenizer, pieces, example.prompt)
        if tokenizer.eos_token_id is not None:
            context = np.append(context, np.int32(tokenizer.eos_token_id))
    else:
        context, _ = encode_with_ends(tokenizer, pieces, example.prompt + config.separator if example.prompt else "")
        if config.bos and tokenizer.bos_token_id is not None:
            context = np.insert(context, 0, tokenizer.bos_token_id).astype(np.int32)
    target, ends = encode_with_ends(tokenizer, pieces, example.target)
    if tokenizer.eos_token_id is not None and example.complete:
        target = np.append(target, np.int32(tokenizer.eos_token_id))
        ends = np.append(ends, len(example.target.encode("utf-8")))
    if not len(context):
        raise DataError(
            "an example has no context to predict from",
            where=f"example {example.id}",
            found="an empty prompt and no BOS token",
            try_="a prompt, or a tokenizer with BOS",
        )
    return TokenRows(example, context, target, ends)


def fit_pair(row: TokenRows, config: BlockConfig) -> TokenRows | None:
    """The row itself if it fits, else the row cut to the limits; None where nothing of its target would be left."""
    keep = min(len(row.target_ids), len(row.target_ids) if config.target_len is None else config.target_len)
    if not config.encoder:
        keep = min(keep, config.seq_len - 1)  # a causal model's context has at least one token
    most_context = config.seq_len - (0 if config.encoder else keep)
    if keep == len(row.target_ids) and len(row.context_ids) <= most_context:
        return row
    context, example = row.context_ids, row.example
    if len(context) > most_context:
        first = 1 if config.bos and not config.encoder and most_context > 1 else 0
        context = np.concatenate([context[:first], context[len(context) - most_context + first :]])
    if keep < len(row.target_ids):
        data = example.target.encode("utf-8")
        while keep and row.byte_end[keep - 1] < len(data) and data[row.byte_end[keep - 1]] & 0xC0 == 0x80:
            keep -= 1
        text = data[: int(row.byte_end[keep - 1])] if keep else b""
        if not text:
            return None
        example = replace(example, target=text.decode("utf-8"), complete=False)
    return TokenRows(example, context, row.target_ids[:keep], row.byte_end[:keep])
