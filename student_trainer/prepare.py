"""From settings, cache and student to batches: what is compared, over whose tokens, in sequences of which length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from kd.cache_builder.store.readers.reading import Reader
from kd.cache_builder.store.targets import band_edges
from kd.common.errors import DataError
from kd.models.loading import decoder_start, is_encoder_decoder, max_positions
from kd.models.packing import Size
from kd.models.tokenizer import Tokenizer, vocabulary_size
from kd.student_trainer.batches.collate import Collator
from kd.student_trainer.batches.compatibility import (
    refuse_classes,
    refuse_narrow_student,
    refuse_other_layout,
    refuse_other_tokenizer,
    refuse_without_prompts,
    same_tokenizer,
)
from kd.student_trainer.batches.pieces import shared_pieces
from kd.student_trainer.batches.student_text import StudentText
from kd.student_trainer.config import TrainConfig
from kd.student_trainer.losses.loss_registry import Objective

PACKED_TOKENS = 1024
"""Of a packed sequence, where neither --seq-len nor the student's positions say more or less."""


def rank_edges(reader: Reader) -> tuple[int, ...]:
    """Ranks between the cache's bands; none where it has none."""
    config, size = reader.config, reader.manifest.vocabulary_size
    return tuple(band_edges(config.top_k, size, config.tail_bands)) if config.tail_bands else ()


def prepare(
    config: TrainConfig, reader: Reader, objective: Objective, student: Any, tokenizer: Tokenizer
) -> tuple[StudentText | None, Collator, int]:
    """The student's own tokens, where they are needed; what makes batches; how many logits count.

    Raises KdError where cache and student do not belong together.
    """
    refuse_classes(reader, f"--loss {config.loss}")
    encoder = is_encoder_decoder(student)
    if encoder:
        refuse_without_prompts(reader)
    own_cut = {
        "--prompt-loss": config.prompt_loss,
        "--separator": config.separator is not None,
        "--target-len": config.target_len is not None,
    }
    asked = [name for name, given in own_cut.items() if given]
    between = [name for name in asked if name != "--target-len"]
    if encoder and between:
        raise DataError(
            "an encoder reads the prompt by itself, and nothing predicts its tokens",
            found=", ".join(between),
            try_="leave them out, or a causal student",
        )
    by_text = objective.groups or bool(asked)
    if config.loss == "ce" and (reader.manifest.blocks.encoder != encoder or not same_tokenizer(reader, tokenizer)):
        by_text = True
    if by_text and not (objective.groups or config.loss == "ce"):
        raise DataError(
            f"--loss {config.loss} reads the cached tokens as they are",
            found=", ".join(asked),
            try_="--loss ce, uld, hybrid or alm",
        )
    start = decoder_start(student) if encoder else None
    if not by_text and config.seq_len is not None and not config.packing:
        raise DataError(
            f"--loss {config.loss} reads the cached tokens as they are, whatever their length",
            found=f"--seq-len {config.seq_len}",
            try_="leave it out, or build the cache with that length",
        )
    if not by_text:
        refuse_other_layout(reader, f"--loss {config.loss}", encoder=encoder)
        refuse_other_tokenizer(
            reader,
            tokenizer,
            purpose=f"--loss {config.loss}",
            advice="--loss uld, hybrid or alm, for any tokenizer; or --tokenizer for a random student",
        )
        tokens, rows = reader.lengths()
        refuse_narrow_student(reader, student, int((np.maximum(tokens - rows, rows) if encoder else tokens).max()))
        return None, Collator(objective, start_id=start), reader.manifest.vocabulary_size
    if config.top_k is not None and objective.groups and reader.config.tail_bands:
        raise DataError(
            "rank bands begin where the stored top-k ends",
            found=f"--top-k {config.top_k}",
            expected=f"all {reader.config.top_k}",
            try_="leave --top-k out",
        )
    width = vocabulary_size(tokenizer)
    if int(student.vocab_size) < width:
        raise DataError(
            "the student has fewer logits than its tokenizer has entries",
            found=student.vocab_size,
            expected=f"at least {width}",
            try_="--tokenizer PATH of the right tokenizer",
        )
    limit = max_positions(student)
    _check_limit("--seq-len", config.seq_len, limit)
    _check_limit("--target-len", config.target_len, limit)
    text = StudentText(
        reader,
        tokenizer,
        window=config.seq_len or limit,
        separator=config.separator,
        encoder=encoder,
        target_len=config.target_len or (limit if encoder else None),
    )
    pieces = None
    if objective.loss == "hybrid":
        pieces = shared_pieces(reader, tokenizer)
        objective = replace(objective, settings=replace(objective.settings, overlap=pieces.overlap))
    collator = Collator(objective, text, config.alignment, config.align_eos, config.prompt_loss, pieces, start)
    return text, collator, width


def _check_limit(option: str, wanted: int | None, limit: int | None) -> None:
    if limit is not None and wanted is not None and wanted > limit:
        raise DataError(
            "the sequence length is longer than the student's positions",
            found=f"{option} {wanted}",
            expected=f"at most {limit}",
            try_=f"{option} {limit}",
        )


def packed_capacity(config: TrainConfig, sizes: np.ndarray, limit: int | None) -> Size:
    """Tokens of a packed sequence on each side; a decoder's side is as long as the encoder's.

    `sizes [E, sides]`, `limit` the student's positions. Raises DataError where an example does not fit.
    """
    _check_limit("--seq-len", config.seq_len, limit)
    longest = sizes.max(axis=0).tolist()
    room = config.seq_len or limit or max(longest[0], PACKED_TOKENS)
    if longest[0] > room:
        raise DataError(
            "an example is longer than a packed sequence",
            found=f"{longest[0]} tokens",
            expected=f"at most --seq-len {room}",
            try_=f"--seq-len {longest[0]}",
        )
    return (room, *(max(room, n) for n in longest[1:]))
