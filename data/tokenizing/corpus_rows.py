"""All token rows of a corpus, in order: of documents, of pairs, or of texts to classify.

Documents are cut into blocks (`document_blocks`), pairs stay whole (`pair_rows`). A pair that is too long stops the build, is
dropped, or is truncated. Each text to classify is one row: the context is what the classifier reads, the target is the number
of its label. Conversations have a module of their own, `kd.data.chat_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from kd.common.errors import DataError
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.corpus import Corpus
from kd.data.instruction_tasks.glue import CLASSES, PAIR
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.document_blocks import document_blocks
from kd.data.tokenizing.pair_rows import fit_pair, tokenize_pair
from kd.data.tokenizing.text_tokens import TextTokens
from kd.data.tokenizing.token_notes import TokenNotes
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.tokenizer import Tokenizer, control_token_pattern, encode_texts


def tokenize_corpus(
    corpus: Corpus,
    tokenizer: Tokenizer,
    config: BlockConfig,
    left_out: LeftOut | None = None,
    notes: TokenNotes | None = None,
) -> Iterator[TokenRows]:
    """All rows of `corpus` in order. Raises DataError naming the example that cannot be scored.

    left_out   receives the documents that are `too_short`, the pairs that are `too_long` and were dropped, and those whose
               prompt or target was `shortened`
    notes      receives what was found in the texts, and whether a row differs from what `first_rules` gives
    """
    if corpus.kind == CONVERSATIONS:
        raise DataError(
            "conversations are read through a chat template, which is not done here yet",
            where=corpus.spec,
            try_="a text of documents or pairs",
        )
    left_out = LeftOut() if left_out is None else left_out
    if corpus.kind == "documents":
        yield from _documents(corpus, tokenizer, config, left_out, notes)
        return
    refused: list[str] = []
    if corpus.kind == CLASSES:
        pairs = _classified(corpus.examples, tokenizer, config, notes)
    else:
        text = TextTokens(tokenizer, config.control_tokens)
        whole = (tokenize_pair(example, text, config, notes) for example in corpus.examples)
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


def _documents(
    corpus: Corpus, tokenizer: Tokenizer, config: BlockConfig, left_out: LeftOut, notes: TokenNotes | None
) -> Iterator[TokenRows]:
    """The blocks of all documents that have a token to score. Raises DataError where none has."""
    if config.encoder:
        raise DataError(
            "an encoder-decoder teacher needs a prompt for its encoder",
            where=corpus.spec,
            found="documents",
            expected="prompt and target",
            try_="--columns prompt=…,target=…, or --data flan:four",
        )
    text, blocks = TextTokens(tokenizer, config.control_tokens), 0
    for example in corpus.examples:
        before = blocks
        for row in document_blocks(example, text, config, notes):
            blocks += 1
            yield row
        if blocks == before:
            left_out.add("too_short", example.id)
    if not blocks:
        raise DataError(
            "no document has a token to score",
            where=corpus.spec,
            found=f"{len(corpus.examples)} documents of one token",
            expected="at least 2 tokens, of which the first is context only",
            try_="join short documents, or a tokenizer with BOS",
        )


def _classified(
    examples: Sequence[Example], tokenizer: Tokenizer, config: BlockConfig, notes: TokenNotes | None
) -> Iterator[tuple[TokenRows, TokenRows | None]]:
    """(whole row, row of at most `seq_len` tokens) of each text to classify; the target is the number of the label."""
    texts = [tuple(example.prompt.split(PAIR)) for example in examples]
    control = config.control_tokens == "control"
    if notes is not None and (pattern := control_token_pattern(tokenizer)) is not None:
        for example in examples:
            spelled = len(pattern.findall(example.prompt))
            notes.add({"control_tokens_kept" if control else "control_tokens_as_text": spelled}, example.id)
            notes.changed |= bool(spelled) and not control
    whole = encode_texts(tokenizer, texts, control=control)
    for example, ids, cut in zip(
        examples, whole, encode_texts(tokenizer, texts, config.seq_len, control=control), strict=True
    ):
        end = np.array([len(example.target.encode("utf-8"))])
        row = TokenRows(example, np.array(ids, dtype=np.int32), np.array([example.answer], dtype=np.int32), end)
        yield row, row if len(cut) == len(ids) else replace(row, context_ids=np.array(cut, dtype=np.int32))
