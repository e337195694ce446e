"""All token rows of a corpus, in order: of documents, of pairs, or of texts to classify.

Documents are cut into blocks (`document_blocks`), pairs stay whole (`pair_rows`). A pair that is too long stops the build, is
dropped, or is truncated. Each text to classify is one row: the context is what the classifier reads, the target is the number
of its label. Conversations have a module of their own, `kd.data.chat_rows`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from kd.common.errors import DataError
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.corpus import Corpus
from kd.data.instruction_tasks.glue import CLASSES, PAIR
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.document_blocks import document_blocks, whole_document
from kd.data.tokenizing.pair_rows import fit_pair, texts_of_pair, tokenize_pair
from kd.data.tokenizing.text_tokens import TextTokens
from kd.data.tokenizing.token_notes import TokenNotes
from kd.data.tokenizing.token_rows import TokenRows
from kd.data.tokenizing.too_long import TooLong
from kd.models.tokenizer import Tokenizer, control_token_pattern, encode_texts

AHEAD = 65_536
"""Characters of text that are tokenised in one call. A tokenizer holds about 170 bytes for each byte of a text meanwhile."""


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
        refuse_documents(corpus.spec, config)
        rows = False
        for row in document_rows(
            corpus.examples, TextTokens(tokenizer, config.control_tokens), config, left_out, notes
        ):
            rows = True
            yield row
        if not rows:
            raise nothing_to_score(corpus.spec, len(corpus.examples))
        return
    too_long = TooLong()
    if corpus.kind == CLASSES:
        yield from _fitting(_classified(corpus.examples, tokenizer, config, notes), config, left_out, too_long)
    else:
        text = TextTokens(tokenizer, config.control_tokens)
        yield from pair_rows(corpus.examples, text, config, left_out, notes, too_long)
    too_long.refuse(corpus.kind, corpus.spec, len(corpus.examples), config)


def document_rows(
    examples: Iterable[Example], text: TextTokens, config: BlockConfig, left_out: LeftOut, notes: TokenNotes | None
) -> Iterator[TokenRows]:
    """The blocks of all documents that have a token to score."""
    for group in groups_of_text(examples):
        text.encode_ahead(example.target for example in group)
        for example in group:
            whole = whole_document(example, text, config)
            if whole is not None:
                yield whole
                continue
            blocks = 0
            for row in document_blocks(example, text, config, notes):
                blocks += 1
                yield row
            if not blocks:
                left_out.add("too_short", example.id)


def pair_rows(
    examples: Iterable[Example],
    text: TextTokens,
    config: BlockConfig,
    left_out: LeftOut,
    notes: TokenNotes | None,
    too_long: TooLong,
) -> Iterator[TokenRows]:
    """The rows of all pairs that fit, or are cut to fit; those that are an error are counted in `too_long`."""
    for group in groups_of_text(examples):
        text.encode_ahead(part for example in group for part in texts_of_pair(example, text, config, notes))
        pairs = (tokenize_pair(example, text, config, notes) for example in group)
        yield from _fitting(((row, fit_pair(row, config)) for row in pairs), config, left_out, too_long)


def groups_of_text(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """The examples in groups of about AHEAD characters."""
    group: list[Example] = []
    size = 0
    for example in examples:
        group.append(example)
        size += len(example.prompt) + len(example.target)
        if size >= AHEAD:
            yield group
            group, size = [], 0
    if group:
        yield group


def _fitting(
    pairs: Iterable[tuple[TokenRows, TokenRows | None]], config: BlockConfig, left_out: LeftOut, too_long: TooLong
) -> Iterator[TokenRows]:
    """Of (whole row, row that fits), what is kept by the policy for what is too long."""
    for row, fitted in pairs:
        example = row.example
        if fitted is row:
            yield row
        elif config.overlong == "error":
            too_long.add(f"{example.id} ({len(row.context_ids)} context and {len(row.target_ids)} target tokens)")
        elif config.overlong == "drop" or fitted is None:
            left_out.add("too_long", example.id)
        else:
            left_out.add("shortened", example.id)
            yield fitted


def refuse_documents(spec: str, config: BlockConfig) -> None:
    """Raise DataError where documents are to be read by an encoder."""
    if config.encoder:
        raise DataError(
            "an encoder-decoder teacher needs a prompt for its encoder",
            where=spec,
            found="documents",
            expected="prompt and target",
            try_="--columns prompt=…,target=…, or --data flan:four",
        )


def nothing_to_score(spec: str, documents: int) -> DataError:
    """The error for documents of which none has a token to score."""
    return DataError(
        "no document has a token to score",
        where=spec,
        found=f"{documents} documents of one token",
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
