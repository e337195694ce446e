"""The student in memory: by name for a loop of one's own, or with the loss in its forward pass; and written out at the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from kd.models.loading import Model, load_model
from kd.models.model_config import load_request_tokenizer
from kd.models.model_request import ModelRequest, resolve_device
from kd.models.packable import require_packable
from kd.models.tokenizer import Tokenizer
from kd.models.weights.finite_weights import refuse_weights_without_value
from kd.models.weights.quantised import keep_trainable
from kd.student_trainer.configuration.model_settings import StudentSettings
from kd.student_trainer.faster.compiled_layers import compile_layers
from kd.student_trainer.faster.fused_loss import FusedLoss, with_kernels
from kd.student_trainer.faster.liger_kernels import use_liger_kernels
from kd.student_trainer.head import ChunkLoss, attach_loss, detach_loss
from kd.student_trainer.lora import with_adapters
from kd.student_trainer.losses.tail_advice import AdvisedLoss
from kd.student_trainer.prepare import Prepared, student_request
from kd.student_trainer.saving.trained_weights import output_dtype, store_as, trained_weights


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


def student_with_loss(prepared: Prepared, say: Callable[[str], object] | None = None) -> Student:
    """Load the student with its loss, adapters and checkpointing, as the run's settings say. Raises KdError.

    say   receives a sentence where the cache keeps too little of the teacher for the loss (`tail_advice`), and where Triton's
          kernels are not used on a GPU; None asks for none
    """
    config = prepared.config
    device = resolve_device(config.model.device)
    loss: ChunkLoss = with_kernels(prepared.objective, config.model.kernels, device, say or _silent)
    if not isinstance(loss, FusedLoss) and say is not None:
        loss = AdvisedLoss(prepared.objective, say)
    set_seed(config.seed)
    model = load_model(_as_trained(prepared))
    if config.model.load_in_4bit:
        keep_trainable(model)
    refuse_weights_without_value(model, config.model.student)
    parameters = sum(p.numel() for p in model.parameters())
    if config.batches.packing:
        require_packable(model)
    start = prepared.collator.start_ids
    if len(start) > 1:  # transformers' `generate` then begins as the student is trained to
        model.generation_config.decoder_start_token_id = start[0]
        model.generation_config.forced_bos_token_id = start[1]
    if config.model.liger:
        use_liger_kernels(model, device=device)
    bodies = attach_loss(model, loss, prepared.vocabulary_size, config.model.head_chunk)
    if config.model.gradient_checkpointing:
        # transformers 5.23 warns about the name that 5.0 has
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    trained = model
    if config.adapters.lora:
        kind = "SEQ_2_SEQ_LM" if prepared.encoder_decoder else "CAUSAL_LM"
        trained = with_adapters(model, config.adapters, task_type=kind)
    if config.model.compile:
        compile_layers(bodies)
    return Student(model, trained, parameters)


def _silent(sentence: str) -> None:
    """Takes the place of `say` where nothing is to be said."""


def _as_trained(prepared: Prepared) -> ModelRequest:
    """The student as it is loaded for training: as it is before, or in 4 bits, on the device of this process."""
    model = prepared.config.model
    if not model.load_in_4bit:
        return prepared.request
    device = resolve_device(model.device)
    if device == "cuda":  # quantised weights are not moved once they are loaded
        device = f"cuda:{PartialState().local_process_index}"
    return replace(prepared.request, load_in_4bit=True, device=device)


def save_student(
    student: Student,
    trainer: Any,
    prepared: Prepared,
    finish: Callable[[Path], None],
    say: Callable[[str], object],
) -> None:
    """Write weights and tokenizer into the run's folder, then call `finish` with it.

    Every process must call this: FSDP gathers its shards here. `say` receives a sentence where the weights do not fit the type
    that they were to be written in. Raises WriteError where no place can be written.
    """
    detach_loss(student.model)
    student.model.config.use_cache = True
    config, tokenizer = prepared.config, prepared.tokenizer
    dtype = output_dtype(config.weights.save_dtype, prepared.request)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # all processes take part, so it cannot be tried again
        trainer.save_model(str(trainer.folder))
        if trainer.is_world_process_zero():
            (trainer.folder / "training_args.bin").unlink(missing_ok=True)  # run.json says the same
            if student.trained is student.model:  # else the Trainer has written the adapters alone
                store_as(trainer.folder, dtype, say)
            tokenizer.save_pretrained(trainer.folder)
            finish(trainer.folder)
        return
    if not trainer.is_world_process_zero():
        return
    weights = trained_weights(
        student.model,
        student.trained,
        tokenizer,
        config.adapters,
        base=None if prepared.request.random_shape is not None else prepared.request.path,
        request=prepared.request,
        dtype=dtype,
        say=say,
    )

    def write(folder: Path) -> None:
        weights.write(folder)
        finish(folder)

    trainer.run_place.write(write)
