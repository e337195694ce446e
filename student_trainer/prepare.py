"""From settings to everything a run needs before the first weight is loaded: cache, objective, batches.

`prepare` opens the cache, checks that it belongs to the student, and decides what is compared, over whose tokens, in
sequences of which length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kd.cache_builder.opening import open_cache
from kd.cache_builder.store.readers.reading import Reader
from kd.cache_builder.store.targets import band_edges
from kd.common.errors import DataError
from kd.data.chat_rows import chat_template
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.conversations.conversation import CONVERSATIONS
from kd.models.batching.packing import Size
from kd.models.chat.chat_template import ChatTemplate
from kd.models.families.encoder_layout import EncoderLayout, encoder_layout
from kd.models.families.positions import max_positions
from kd.models.loading import (
    ModelRequest,
    decoder_start,
    is_encoder_decoder,
    load_config,
    load_request_tokenizer,
)
from kd.models.tokenizer import Tokenizer, refuse_unknown_ids, usable_ids
from kd.student_trainer.batches.batch_plan import BatchPlan, plan_batches
from kd.student_trainer.batches.collate import Collator
from kd.student_trainer.batches.compatibility import (
    needed_arrays,
    refuse_classes,
    refuse_narrow_student,
    refuse_other_layout,
    refuse_other_template,
    refuse_other_tokenizer,
    refuse_without_prompts,
    resolve_objective,
    same_tokenizer,
)
from kd.student_trainer.batches.pieces import shared_pieces
from kd.student_trainer.batches.read_ahead import TOUCHED_EXAMPLES, touch_shards
from kd.student_trainer.batches.student_chat import StudentChat
from kd.student_trainer.batches.student_text import StudentText
from kd.student_trainer.batches.trained_reading import TrainedReading, trained_reading
from kd.student_trainer.config import StudentSettings, TextSettings, TrainConfig
from kd.student_trainer.losses.loss_registry import Objective

PACKED_TOKENS = 1024
"""Tokens of a packed sequence, where neither --seq-len nor the student's positions limit it."""


@dataclass(frozen=True)
class Prepared:
    """Everything a run needs before weights are loaded."""

    config: TrainConfig
    reader: Reader
    request: ModelRequest
    """The student's weights."""
    model_config: Any
    """The student's configuration, as transformers reads it."""
    tokenizer: Tokenizer
    """The student's tokenizer."""
    collator: Collator
    """Examples -> batch."""
    vocabulary_size: int
    """Number of the student's logits that count."""
    sizes: np.ndarray
    """[E, sides] tokens of each example, on the encoder's and the decoder's side where the student has two."""
    rows: np.ndarray
    """[E] scored positions of each example."""

    @property
    def objective(self) -> Objective:
        """What the student minimises."""
        return self.collator.objective

    @property
    def encoder_decoder(self) -> bool:
        """Whether the student has an encoder."""
        return is_encoder_decoder(self.model_config)

    @property
    def truncated(self) -> int:
        """Number of examples that did not fit the student's window."""
        return 0 if self.collator.text is None else self.collator.text.truncated

    @property
    def reading(self) -> TrainedReading:
        """How the student reads its text."""
        return trained_reading(self.reader, self.model_config, self.tokenizer, self.config.text.separator)

    def plan(self, multiple: int, *, first_epoch: int = 0) -> BatchPlan:
        """All micro-batches of the run, `multiple` of them to an optimizer step over all devices.

        first_epoch   epoch to begin with, which decides the order of examples
        """
        batches = self.config.batches
        return plan_batches(
            self.reader,
            self.sizes,
            seed=self.config.seed,
            first_epoch=first_epoch,
            epochs=batches.epochs,
            multiple_of=multiple,
            capacity=self.collator.capacity,
            count=None if batches.max_steps is None else batches.max_steps * multiple,
            batch_size=batches.batch_size,
            tokens_per_batch=batches.token_budget,
        )


def prepare(config: TrainConfig, *, touch: bool = False, student: tuple[Any, Tokenizer] | None = None) -> Prepared:
    """Open the cache and check that it belongs to the student. Raises KdError where it does not.

    touch     load the shards of the first batches on threads meanwhile (a resumed run begins with other batches)
    student   configuration and tokenizer of a student in memory; None = of the one that the settings name
    """
    reader = open_cache(config.data.cache, top_k=config.data.top_k, cache_bytes=config.data.cache_bytes)
    manifest = reader.manifest
    objective = resolve_objective(
        reader.config, config.objective, edges=rank_edges(reader), logprobs_only=manifest.logprobs_only
    )
    reader.keep(needed_arrays(objective, manifest))
    if touch:
        touch_shards(reader, reader.epoch_order(config.seed, 0)[:TOUCHED_EXAMPLES].tolist())
    request = student_request(config.model, config.seed)
    model_config, tokenizer = student or (load_config(request), load_request_tokenizer(request))
    if reads_own_text(config, reader, objective, model_config, tokenizer):
        collator, width = text_collator(config, reader, objective, model_config, tokenizer)
    else:
        collator, width = row_collator(config, reader, objective, model_config, tokenizer)
    if student is None:
        keep_template(tokenizer, reader, collator)
    tokens, rows = reader.lengths() if collator.text is None else collator.text.lengths()
    sizes = tokens[:, None]
    if collator.start_ids:
        sizes = np.stack([tokens - rows, rows + len(collator.start_ids) - 1], axis=1)
    if config.text.prompt_loss:
        rows = tokens - 1
    if config.batches.packing:
        capacity = packed_capacity(config.text, sizes, max_positions(model_config))
        collator = replace(collator, capacity=capacity)
    return Prepared(config, reader, request, model_config, tokenizer, collator, width, sizes, rows)


def student_request(model: StudentSettings, seed: int) -> ModelRequest:
    """The student's weights before training, in float32 on the CPU; `seed` of random ones."""
    return ModelRequest(
        model.model_name,
        revision=model.revision,
        device="cpu",
        dtype="float32",
        tokenizer=model.tokenizer,
        seed=seed,
        source_lang=model.source_lang,
        target_lang=model.target_lang,
    )


def reading_before_training(config: TrainConfig) -> TrainedReading:
    """How the student of these settings is going to read its text. Raises KdError."""
    request = student_request(config.model, config.seed)
    reader = open_cache(config.data.cache, cache_bytes=config.data.cache_bytes)
    return trained_reading(reader, load_config(request), load_request_tokenizer(request), config.text.separator)


def rank_edges(reader: Reader) -> tuple[int, ...]:
    """Ranks between the cache's bands; none where it has none.

    Of a teacher that gave log-probabilities alone, everything beyond the top-k is one band.
    """
    config, size = reader.config, reader.manifest.vocabulary_size
    if reader.manifest.logprobs_only and config.top_k < size:
        return config.top_k, size
    return tuple(band_edges(config.top_k, size, config.tail_bands)) if config.tail_bands else ()


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
    if objective.groups:
        return True
    if loss == "ce":
        blocks = reader.manifest.blocks
        unlike = blocks.encoder != encoder or blocks.layout != encoder_layout(model_config, tokenizer)
        return bool(given) or unlike or not same_tokenizer(reader, tokenizer)
    if given:
        raise DataError(
            f"--loss {loss} reads the cached tokens as they are",
            found=", ".join(given),
            try_="--loss ce, uld, hybrid or alm",
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
    config: TrainConfig, reader: Reader, objective: Objective, model_config: Any, tokenizer: Tokenizer
) -> tuple[Collator, int]:
    """Batches of the cached tokens, and how many logits count. Raises KdError for another tokenizer or layout."""
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
        advice="--loss uld, hybrid or alm, for any tokenizer; or --tokenizer for a random student",
    )
    layout = encoder_layout(model_config, tokenizer)
    refuse_other_template(reader, layout, tokenizer)
    tokens, rows = reader.lengths()
    start = start_tokens(model_config, layout)
    longest = int((tokens - rows if encoder else tokens).max())
    refuse_narrow_student(reader, model_config, longest, int(rows.max()) + len(start) - 1 if encoder else 0)
    return Collator(objective, start_ids=start), reader.manifest.vocabulary_size


def own_text(
    config: TrainConfig, reader: Reader, model_config: Any, tokenizer: Tokenizer, layout: EncoderLayout | None
) -> StudentText | StudentChat:
    """Every example in the student's own tokens. Raises KdError."""
    settings, encoder, limit = config.text, is_encoder_decoder(model_config), max_positions(model_config)
    if reader.manifest.identity["corpus"]["kind"] == CONVERSATIONS:
        template = student_template(reader, tokenizer, settings)
        refuse_for_chats(reader, settings, template)
        chat = StudentChat(reader, tokenizer, window=settings.seq_len or limit, template=template)
        if chat.unmatched == chat.turns:
            raise DataError(
                "no turn of the student's template has the text of the teacher's",
                cache=reader.root,
                found=f"{chat.turns} turns",
                try_="another --chat-template or --template-kwargs",
            )
        return chat
    written = max_positions(model_config, decoder=True)
    most = written if written is None else written - len(start_tokens(model_config, layout)) + 1
    return StudentText(
        reader,
        tokenizer,
        window=settings.seq_len or limit,
        separator=settings.separator,
        encoder=encoder,
        layout=layout,
        target_len=settings.target_len or (most if encoder else None),
    )


def refuse_for_chats(reader: Reader, settings: TextSettings, template: ChatTemplate | None) -> None:
    """Raise DataError for settings that conversations do not have."""
    if settings.alignment != "bytes":
        raise DataError("conversations are aligned by bytes", found=f"--alignment {settings.alignment}", try_="bytes")
    if template is not None and reader.manifest.identity["chat"]["score"] == "all":
        raise DataError(
            "every token of this cache is scored, and another template writes other tokens around the messages",
            cache=reader.root,
            found="--score all",
            expected="a student with the teacher's tokenizer and template, or a cache of --score assistant",
        )


def student_template(reader: Reader, tokenizer: Tokenizer, settings: TextSettings) -> ChatTemplate | None:
    """The template that renders conversations for the student; None where it reads the cached tokens.

    A student with the teacher's tokenizer reads them, unless the settings name a template. Raises DataError where there is
    no template, or where it writes the date.
    """
    if settings.chat_template is None and settings.template_kwargs is None and same_tokenizer(reader, tokenizer):
        return None
    return chat_template(tokenizer, ChatSettings(settings.chat_template, settings.template_kwargs))


def keep_template(tokenizer: Tokenizer, reader: Reader, collator: Collator) -> None:
    """Give the student's tokenizer the template that it is trained with, so that the run's folder holds it."""
    text = collator.text
    if isinstance(text, StudentChat) and text.template is not None:
        tokenizer.chat_template = text.template.source
    elif "chat" in reader.manifest.identity:
        tokenizer.chat_template = reader.manifest.provenance.get("chat_template", tokenizer.chat_template)


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
    width = usable_ids(tokenizer, int(model_config.vocab_size), what="the student")
    limit = max_positions(model_config)
    refuse_too_long("--seq-len", settings.seq_len, limit)
    written = max_positions(model_config, decoder=True)
    refuse_too_long("--target-len", settings.target_len, written)
    layout = encoder_layout(model_config, tokenizer)
    start = start_tokens(model_config, layout)
    text = own_text(config, reader, model_config, tokenizer, layout)
    refuse_unknown_ids(text.named_ids(), int(model_config.vocab_size))
    pieces = None
    if objective.loss == "hybrid":
        pieces = shared_pieces(reader, tokenizer, width)
        objective = replace(objective, settings=replace(objective.settings, overlap=pieces.overlap))
    return Collator(objective, text, settings.alignment, settings.align_eos, settings.prompt_loss, pieces, start), width


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


def packed_capacity(settings: TextSettings, sizes: np.ndarray, limit: int | None) -> Size:
    """Tokens of a packed sequence on each side; a decoder's side is as long as the encoder's.

    `sizes [E, sides]`, `limit` the student's positions. Raises DataError where an example does not fit.
    """
    refuse_too_long("--seq-len", settings.seq_len, limit)
    longest = sizes.max(axis=0).tolist()
    room = settings.seq_len or limit or max(longest[0], PACKED_TOKENS)
    if longest[0] > room:
        raise DataError(
            "an example is longer than a packed sequence",
            found=f"{longest[0]} tokens",
            expected=f"at most --seq-len {room}",
            try_=f"--seq-len {longest[0]}",
        )
    return (room, *(max(room, n) for n in longest[1:]))
