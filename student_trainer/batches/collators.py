"""What makes the batches of a run: the cached tokens as they are, or the text in the student's own tokens.

Compatibility of cache and student is checked here, before the first weight is loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from kd.cache_builder.store.readers.example_lengths import ExampleLengths
from kd.cache_builder.store.readers.reading import Reader
from kd.common.errors import DataError
from kd.models.batching.packing import Size
from kd.models.families.encoder_layout import EncoderLayout, encoder_layout
from kd.models.families.positions import max_positions
from kd.models.model_config import decoder_start, is_encoder_decoder
from kd.models.tokenizer import Tokenizer, refuse_unknown_ids, token_bytes, usable_ids
from kd.student_trainer.batches.collate import Collator
from kd.student_trainer.batches.compatibility import (
    refuse_classes,
    refuse_narrow_student,
    refuse_other_layout,
    refuse_other_template,
    refuse_other_tokenizer,
    refuse_without_prompts,
    same_tokenizer,
)
from kd.student_trainer.batches.example_sizes import ExampleSizes
from kd.student_trainer.batches.own_text import own_text
from kd.student_trainer.batches.pieces import shared_pieces
from kd.student_trainer.batches.student_chat import StudentChat
from kd.student_trainer.batches.student_text import StudentText
from kd.student_trainer.configuration.learning_settings import TextSettings
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.expected.piece_paths import PiecePaths, better_cut
from kd.student_trainer.losses.loss_registry import LOSSES, Objective

SEEN_EXAMPLES = 64
"""Examples whose rows show how the teacher cuts text."""
PACKED_TOKENS = 1024
"""Tokens of a packed sequence, where neither --seq-len nor the student's positions limit it."""


def reads_own_text(
    config: TrainConfig, reader: Reader, objective: Objective, model_config: Any, tokenizer: Tokenizer
) -> bool:
    """Whether the student reads the text in its own tokens, and not the cached ones. Raises KdError.

    Losses over aligned text do; so does cross-entropy where the student's tokens differ or the settings ask for it.
    """
    loss, text = config.objective.loss, config.text
    refuse_classes(reader, f"--loss {loss}")
    encoder = is_encoder_decoder(model_config)
    if encoder:
        refuse_without_prompts(reader)
    given = options_of_own_text(text)
    between = [option for option in given if option != "--target-len"]
    if encoder and between:
        raise DataError(
            "an encoder reads the prompt by itself, and nothing predicts its tokens",
            found=", ".join(between),
            try_="leave them out, or a causal student",
        )
    if LOSSES[loss].any_tokenizer:
        return True
    if loss == "ce":
        blocks = reader.manifest.blocks
        unlike = blocks.encoder != encoder or blocks.layout != encoder_layout(model_config, tokenizer)
        return bool(given) or unlike or not same_tokenizer(reader, tokenizer)
    if given:
        raise DataError(
            f"--loss {loss} reads the cached tokens as they are",
            found=", ".join(given),
            try_="--loss ce, text-kl, alm, hybrid or uld",
        )
    return False


def options_of_own_text(text: TextSettings) -> list[str]:
    """Options that were given and only mean something for text in the student's own tokens."""
    given = {
        "--prompt-loss": text.prompt_loss,
        "--separator": text.separator is not None,
        "--target-len": text.target_len is not None,
        "--chat-template": text.chat_template is not None,
        "--template-kwargs": text.template_kwargs is not None,
    }
    return [option for option, used in given.items() if used]


def row_collator(
    config: TrainConfig, lengths: ExampleLengths, objective: Objective, model_config: Any, tokenizer: Tokenizer
) -> tuple[Collator, int]:
    """Batches of the cached tokens of a reader, whose `lengths` are given, and how many logits count.

    Raises KdError for another tokenizer or layout.
    """
    reader = lengths.reader
    loss, encoder = config.objective.loss, is_encoder_decoder(model_config)
    if config.text.seq_len is not None and not config.batches.packing:
        raise DataError(
            f"--loss {loss} reads the cached tokens as they are, whatever their length",
            found=f"--seq-len {config.text.seq_len}",
            try_="leave it out, or build the cache with that length",
        )
    refuse_other_layout(reader, f"--loss {loss}", encoder=encoder)
    refuse_other_tokenizer(
        reader,
        tokenizer,
        purpose=f"--loss {loss}",
        advice="--loss text-kl, for any tokenizer (alm from a cache without ids); or --tokenizer for a random student",
    )
    layout = encoder_layout(model_config, tokenizer)
    refuse_other_template(reader, layout, tokenizer)
    start = start_tokens(model_config, layout)
    sizes = ExampleSizes(lengths, len(start)).trusting(reader.manifest.blocks, windows_of(model_config))
    refuse_narrow_student(reader, model_config, *sizes.longest())
    return Collator(objective, start_ids=start), reader.manifest.vocabulary_size


def text_collator(
    config: TrainConfig, reader: Reader, objective: Objective, model_config: Any, tokenizer: Tokenizer
) -> tuple[Collator, int]:
    """Batches of the text in the student's own tokens, and how many logits count. Raises KdError."""
    settings = config.text
    if config.data.top_k is not None and objective.groups and objective.settings.edges:
        raise DataError(
            "rank bands begin where the stored top-k ends",
            found=f"--top-k {config.data.top_k}",
            expected=f"all {reader.config.top_k}",
            try_="leave --top-k out",
        )
    if LOSSES[objective.loss].text and settings.alignment != "bytes":
        raise DataError(
            f"--loss {objective.loss} compares text, which is aligned by bytes",
            found=f"--alignment {settings.alignment}",
            try_="--alignment bytes; or --loss uld",
        )
    width = usable_ids(tokenizer, int(model_config.vocab_size), what="the student")
    limit = max_positions(model_config)
    refuse_too_long("--seq-len", settings.seq_len, limit)
    written = max_positions(model_config, decoder=True)
    refuse_too_long("--target-len", settings.target_len, written)
    layout = encoder_layout(model_config, tokenizer)
    start = start_tokens(model_config, layout)
    text = own_text(config, reader, model_config, tokenizer, layout, len(start))
    refuse_unknown_ids(text.named_ids(), int(model_config.vocab_size))
    pieces = None
    if objective.loss == "hybrid":
        pieces = shared_pieces(reader, tokenizer, width)
        objective = replace(objective, settings=replace(objective.settings, overlap=pieces.overlap))
    paths = piece_paths(reader, text, tokenizer, width) if LOSSES[objective.loss].text else None
    choices = (settings.alignment, settings.align_eos, settings.prompt_loss)
    return Collator(objective, text, *choices, pieces, start, paths=paths), width


def piece_paths(reader: Reader, text: StudentText | StudentChat, tokenizer: Tokenizer, width: int) -> PiecePaths:
    """The student's tokens as paths of the teacher's pieces, cut as the teacher's rows of the first examples are."""
    teacher, student = reader.vocabulary(), token_bytes(tokenizer)[:width]
    seen: set[tuple[bytes, ...]] = set()
    for example in reader.read(first_examples(reader)):
        pairs = text.aligned(example, mode="bytes", eos=False)
        seen |= {tuple(teacher[i] for i in example.targets.gold_ids[a:b].tolist()) for a, b in pairs.teacher.tolist()}
    ends = reader.manifest.identity["tokenizer"].get("eos_token_id"), tokenizer.eos_token_id
    return PiecePaths(teacher, student, better_cut(teacher, seen), special=tokenizer.all_special_ids, ends=ends)


def first_examples(reader: Reader) -> list[int]:
    """The first examples that are here, at most SEEN_EXAMPLES."""
    numbers: list[int] = []
    for shard in reader.shards:
        first, stop, _ = reader.manifest.shards[shard]
        numbers += range(first, min(stop, first + SEEN_EXAMPLES - len(numbers)))
        if len(numbers) == SEEN_EXAMPLES:
            break
    return numbers


def windows_of(model_config: Any) -> tuple[int | None, int | None]:
    """Positions of a student, and of its decoder; None where they have no end."""
    return max_positions(model_config), max_positions(model_config, decoder=True)


def start_tokens(model_config: Any, layout: EncoderLayout | None) -> tuple[int, ...]:
    """Ids that the student's decoder reads before a target; none for a causal student."""
    if not is_encoder_decoder(model_config):
        return ()
    return decoder_start(model_config), *(() if layout is None else layout.target_before)


def refuse_too_long(option: str, wanted: int | None, limit: int | None) -> None:
    """Raise DataError for more tokens than the student has positions."""
    if limit is not None and wanted is not None and wanted > limit:
        raise DataError(
            "the sequence length is longer than the student's positions",
            found=f"{option} {wanted}",
            expected=f"at most {limit}",
            try_=f"{option} {limit}",
        )


def packed_capacity(settings: TextSettings, sizes: ExampleSizes, limit: int | None) -> Size:
    """Tokens of a packed sequence on each side; a decoder's side is as long as the encoder's.

    `limit` the student's positions. Raises DataError where an example does not fit.
    """
    refuse_too_long("--seq-len", settings.seq_len, limit)
    longest = sizes.longest()
    room = settings.seq_len or limit or max(longest[0], PACKED_TOKENS)
    if longest[0] > room:
        raise DataError(
            "an example is longer than a packed sequence",
            found=f"{longest[0]} tokens",
            expected=f"at most --seq-len {room}",
            try_=f"--seq-len {longest[0]}",
        )
    return (room, *(max(room, n) for n in longest[1:]))
