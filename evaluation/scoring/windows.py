"""The window of a model: how many tokens it reads at once, and how a text is cut to fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kd.common.errors import DataError
from kd.data.chat_rows import chat_template, tokenize_conversations
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.corpus import Corpus
from kd.data.left_out import LeftOut
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.corpus_rows import tokenize_corpus
from kd.data.tokenizing.token_rows import TokenRows
from kd.evaluation.scoring.reading_options import ReadingOptions
from kd.models.families.encoder_layout import encoder_layout
from kd.models.families.positions import max_positions
from kd.models.loading import Model
from kd.models.model_config import is_encoder_decoder
from kd.models.tokenizer import Tokenizer

DEFAULT_SEQ_LEN = 1024
"""Tokens in the window of a model that has as many positions; a model with fewer uses them all."""


def require_positions(model: Model, tokens: int, *, decoder: bool = False) -> None:
    """Raise DataError when `tokens` positions are more than the model has; its decoder where that is meant."""
    limit = max_positions(model.config, decoder=decoder)
    if limit is not None and tokens > limit:
        raise DataError(
            "the sequences are longer than the model's positions",
            found=f"{tokens} tokens",
            expected=f"at most {limit}",
            try_=f"{'--target-len' if decoder else '--seq-len'} {limit}",
        )


def window(model: Model, seq_len: int | None) -> int:
    """`seq_len`, or by default the model's positions, at most 1024. Raises DataError for more than the model has."""
    if seq_len is None:
        seq_len = min(max_positions(model.config) or DEFAULT_SEQ_LEN, DEFAULT_SEQ_LEN)
    require_positions(model, seq_len)
    return seq_len


def text_blocks(reading: ReadingOptions, seq_len: int, model: Model, tokenizer: Tokenizer) -> BlockConfig:
    """How documents and pairs are cut to be scored token by token; a pair that is too long is cut as in training.

    seq_len   tokens of the window, as `window` gives them
    """
    return BlockConfig(
        seq_len=seq_len,
        stride=seq_len - 1 if reading.stride is None else reading.stride,
        bos=reading.opens_with_bos,
        separator=reading.between,
        control_tokens=reading.control_reading,
        encoder=is_encoder_decoder(model.config),
        overlong="truncate",
        layout=encoder_layout(model.config, tokenizer),
    )


def token_rows(
    corpus: Corpus, tokenizer: Tokenizer, blocks: BlockConfig, reading: ReadingOptions, left_out: LeftOut
) -> Iterator[TokenRows]:
    """The rows of a text: conversations through a chat template, everything else as `tokenize_corpus` cuts it.

    A conversation that the template refuses is an error, whatever the corpus says of bad rows: figures of several models are
    compared over the same conversations.
    """
    if corpus.kind != CONVERSATIONS and corpus.examples[0].conversation is None:
        return tokenize_corpus(corpus, tokenizer, blocks, left_out)
    settings = chat_settings(reading)
    whole = replace(corpus, skip_bad=False)
    return tokenize_conversations(whole, chat_template(tokenizer, settings), settings, blocks, left_out)


def chat_settings(reading: ReadingOptions) -> ChatSettings:
    """How conversations are rendered."""
    return ChatSettings(reading.chat_template, reading.template_kwargs, reading.system)


def prompt_blocks(model: Model, tokenizer: Tokenizer, reading: ReadingOptions) -> BlockConfig:
    """How prompts are cut before something is to follow them."""
    blocks = BlockConfig(
        seq_len=window(model, reading.seq_len),
        separator=reading.between,
        bos=reading.opens_with_bos,
        control_tokens=reading.control_reading,
        encoder=is_encoder_decoder(model.config),
        layout=encoder_layout(model.config, tokenizer),
    )
    return blocks.normalised("pairs", tokenizer)
