"""From settings to everything a run needs before the first weight is loaded: cache, objective, batches.

`prepare` opens the cache, checks that it belongs to the student, and decides what is compared, over whose tokens, in
sequences of which length.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kd.cache_builder.opening import open_cache
from kd.cache_builder.store.readers.example_lengths import ExampleLengths, ListedLengths
from kd.cache_builder.store.readers.reading import Reader
from kd.models.model_config import is_encoder_decoder, load_config, load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import Tokenizer
from kd.student_trainer.batches.batch_plan import BatchPlan, plan_batches
from kd.student_trainer.batches.collate import Collator
from kd.student_trainer.batches.collators import (
    packed_capacity,
    reads_own_text,
    row_collator,
    text_collator,
    windows_of,
)
from kd.student_trainer.batches.compatibility import (
    as_read,
    needed_arrays,
    refuse_unknown_parts,
    resolve_objective,
)
from kd.student_trainer.batches.example_sizes import ExampleSizes
from kd.student_trainer.batches.read_ahead import touch_shards, touched_examples
from kd.student_trainer.batches.student_chat import StudentChat
from kd.student_trainer.batches.trained_reading import TrainedReading, trained_reading
from kd.student_trainer.configuration.model_settings import StudentSettings
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.losses.loss_registry import Objective


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
    sizes: ExampleSizes
    """Tokens of each example, on the encoder's and the decoder's side where the student has two."""

    @property
    def objective(self) -> Objective:
        """What the student minimises."""
        return self.collator.objective

    def scored(self, examples: Sequence[int]) -> int:
        """Number of scored positions of these examples."""
        tokens, rows = self.sizes.lengths.of(np.asarray(examples, dtype=np.int64))
        return int((tokens - 1 if self.config.text.prompt_loss else rows).sum())

    @property
    def all_scored(self) -> int:
        """Number of scored positions of all examples."""
        if self.collator.text is not None:
            return self.scored(range(len(self.sizes)))
        return int(self.reader.manifest.shards.rows[list(self.reader.shards)].sum())

    @property
    def encoder_decoder(self) -> bool:
        """Whether the student has an encoder."""
        return is_encoder_decoder(self.model_config)

    @property
    def truncated(self) -> int:
        """Number of examples that did not fit the student's window."""
        return 0 if self.collator.text is None else self.collator.text.truncated

    @property
    def turns(self) -> tuple[int, int] | None:
        """Of conversations in the student's own tokens: turns that the teacher has scored, and those that the loss does not see."""
        text = self.collator.text
        if not isinstance(text, StudentChat):
            return None
        return text.turns, text.unshown if self.config.objective.loss == "ce" else text.unmatched

    @property
    def reading(self) -> TrainedReading:
        """How the student reads its text."""
        return _reading(self.config, self.reader, self.model_config, self.tokenizer)

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
        as_read(reader.config, config.data.top_k),
        config.objective,
        edges=rank_edges(reader),
        logprobs_only=manifest.logprobs_only,
    )
    refuse_unknown_parts(manifest, objective)
    reader.keep(needed_arrays(objective, manifest))
    if touch:
        rank, processes = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
        touch_shards(reader, touched_examples(reader.epoch_order(config.seed, 0), rank, processes))
    request = student_request(config.model, config.seed)
    model_config, tokenizer = student or (load_config(request), load_request_tokenizer(request))
    lengths: ExampleLengths | ListedLengths
    if reads_own_text(config, reader, objective, model_config, tokenizer):
        collator, width = text_collator(config, reader, objective, model_config, tokenizer)
        assert collator.text is not None
        lengths = ListedLengths(*collator.text.lengths())
    else:
        lengths = ExampleLengths(reader)
        collator, width = row_collator(config, lengths, objective, model_config, tokenizer)
    if student is None:
        keep_template(tokenizer, reader, collator)
    sizes = ExampleSizes(lengths, len(collator.start_ids))
    blocks, windows = reader.manifest.blocks, windows_of(model_config)
    if config.batches.packing:
        room = config.text.seq_len or windows[0] or 0  # 0: as long as the longest example
        sizes = sizes.trusting(blocks, (room, room))
        collator = replace(collator, capacity=packed_capacity(config.text, sizes, windows[0]))
    else:
        sizes = sizes.trusting(blocks, windows)
    return Prepared(config, reader, request, model_config, tokenizer, collator, width, sizes)


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
        attention=model.attn_implementation,
    )


def reading_before_training(config: TrainConfig) -> TrainedReading:
    """How the student of these settings is going to read its text. Raises KdError."""
    request = student_request(config.model, config.seed)
    reader = open_cache(config.data.cache, cache_bytes=config.data.cache_bytes)
    return _reading(config, reader, load_config(request), load_request_tokenizer(request))


def _reading(config: TrainConfig, reader: Reader, model_config: Any, tokenizer: Tokenizer) -> TrainedReading:
    """How a student of these settings reads its text."""
    text = config.text
    return trained_reading(
        reader,
        model_config,
        tokenizer,
        text.separator,
        own_template=text.chat_template is not None or text.template_kwargs is not None,
        template_kwargs=text.template_kwargs,
    )


def rank_edges(reader: Reader) -> tuple[int, ...]:
    """Ranks between the cache's bands; none where it has none.

    Of a teacher that gave log-probabilities alone, everything beyond the kept tokens is one band.
    """
    config, size = reader.config, reader.manifest.vocabulary_size
    if reader.manifest.logprobs_only and config.shortest < size:
        return config.shortest, size
    return tuple(config.edges(size))


def keep_template(tokenizer: Tokenizer, reader: Reader, collator: Collator) -> None:
    """Give the student's tokenizer the template that it is trained with, so that the run's folder holds it."""
    text = collator.text
    if isinstance(text, StudentChat) and text.template is not None:
        tokenizer.chat_template = text.template.source
    elif "chat" in reader.manifest.identity:
        tokenizer.chat_template = reader.manifest.provenance.get("chat_template", tokenizer.chat_template)
