"""The student in memory: by name for a loop of one's own, or with the loss in its forward pass; and written out at the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from kd.models.finite_weights import refuse_weights_without_value
from kd.models.loading import Model, load_model, load_request_tokenizer
from kd.models.packable import require_packable
from kd.models.tokenizer import Tokenizer
from kd.student_trainer.configuration.model_settings import StudentSettings
from kd.student_trainer.head import attach_loss, detach_loss
from kd.student_trainer.lora import with_adapters
from kd.student_trainer.prepare import Prepared, student_request
from kd.student_trainer.saving.whole_models import write_model


@dataclass(frozen=True)
class Student:
    """A model that is being trained."""

    model: Model
    """The student itself; its forward returns the loss sums of a batch."""
    trained: Model
    """What the Trainer trains: the model, or the model with adapters around it."""
    parameters: int
    """Number of the model's parameters, adapters not counted."""


def load_student(
    name: str, *, revision: str | None = None, tokenizer: str | None = None, seed: int = 0
) -> tuple[Model, Tokenizer]:
    """The model that `kd.train(student=NAME)` begins with, and its tokenizer: float32 weights on the CPU.

    name        `demo` (a small model with random weights), `random:NAME`, a folder, or a hub id
    revision    branch, tag or commit of a hub model
    tokenizer   folder or hub id of the tokenizer of a random student
    seed        seed of random weights

    Raises TeacherError for a model that cannot be loaded.

    >>> import kd
    >>> model, tokenizer = kd.load_student("demo")
    >>> model.num_parameters()
    556896
    """
    request = student_request(StudentSettings(name, revision, tokenizer), seed)
    return load_model(request), load_request_tokenizer(request)


def student_with_loss(prepared: Prepared) -> Student:
    """Load the student with its loss, adapters and checkpointing, as the run's settings say. Raises KdError."""
    config = prepared.config
    set_seed(config.seed)
    model = load_model(prepared.request)
    refuse_weights_without_value(model, config.model.student)
    parameters = sum(p.numel() for p in model.parameters())
    if config.batches.packing:
        require_packable(model)
    start = prepared.collator.start_ids
    if len(start) > 1:  # transformers' `generate` then begins as the student is trained to
        model.generation_config.decoder_start_token_id = start[0]
        model.generation_config.forced_bos_token_id = start[1]
    attach_loss(model, prepared.objective, prepared.vocabulary_size, config.model.head_chunk)
    if config.model.gradient_checkpointing:
        # transformers 5.23 warns about the name that 5.0 has
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    trained = model
    if config.adapters.lora:
        kind = "SEQ_2_SEQ_LM" if prepared.encoder_decoder else "CAUSAL_LM"
        trained = with_adapters(model, config.adapters.lora, config.adapters.lora_targets, task_type=kind)
    return Student(model, trained, parameters)


def save_student(student: Student, trainer: Any, tokenizer: Tokenizer, finish: Callable[[Path], None]) -> None:
    """Write weights and tokenizer into the run's folder, then call `finish` with it.

    Every process must call this: FSDP gathers its shards here. Raises WriteError where no place can be written.
    """
    detach_loss(student.model)
    student.model.config.use_cache = True
    model = student.model
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # all processes take part, so it cannot be tried again
        trainer.save_model(str(trainer.folder))
        if trainer.is_world_process_zero():
            (trainer.folder / "training_args.bin").unlink(missing_ok=True)  # run.json says the same
            tokenizer.save_pretrained(trainer.folder)
            finish(trainer.folder)
        return
    if not trainer.is_world_process_zero():
        return
    if student.trained is not model:
        with merged_without_warning():
            model = student.trained.merge_and_unload()

    def write(folder: Path) -> None:
        write_model(folder, model, tokenizer)
        finish(folder)

    trainer.run_place.write(write)


@contextmanager
def merged_without_warning() -> Iterator[None]:
    """Silence a wrong warning of peft 0.21, which takes every head of T5 for tied because its configuration says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        yield
