"""Train a student from a cache, on transformers' Trainer: the teacher is never loaded.

    config = make(TrainConfig, {"cache": "runs/cache", "student": "openai-community/gpt2", "out": "runs/student"})
    result = train(config)

Devices, DDP, FSDP, mixed precision, checkpoints, trackers and LoRA are the Trainer's, accelerate's and peft's.
Ours are the checks that refuse a cache that does not belong to the student and the batches (`prepare`), and the loss
(`head`). The loss runs *inside* `model.forward`, so that DDP and FSDP see every parameter where they expect it, and
`[B, T, V]` logits never exist.

A run's folder holds what `save_pretrained` writes and the files of `run_folder`. Interrupted runs continue exactly with
`resume=True`.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from transformers import TrainingArguments

from kd.common.disk.disk_errors import clear_write_errors
from kd.common.files import read_object, write_atomic
from kd.common.settings import flat
from kd.student_trainer.batches.read_ahead import CachedExamples
from kd.student_trainer.batches.trained_reading import READING
from kd.student_trainer.configuration.train_config import TrainConfig, config_from
from kd.student_trainer.faster.compiled_layers import UncompiledParts, clear_compile_errors, refuse_to_compile_parts
from kd.student_trainer.midway import Midway, MidwayEvaluations
from kd.student_trainer.model_card import CARD, render_card
from kd.student_trainer.prepare import Prepared, prepare
from kd.student_trainer.run_folder import (
    RECORDS,
    StepRecord,
    leave_run,
    read_steps,
    resume_point,
    seal_run,
    start_run,
    write_run,
)
from kd.student_trainer.saving.checkpoints import BATCHES, step_of
from kd.student_trainer.saving.hub_upload import prepare_repository, upload_student
from kd.student_trainer.saving.rescue import RunPlace
from kd.student_trainer.student_model import Student, save_student, student_with_loss
from kd.student_trainer.trainer import DistillationTrainer, StopWithCheckpoint
from kd.student_trainer.trainer_arguments import count_steps, refuse_other_wrapping, set_steps, training_arguments

Stoppable = AbstractContextManager[threading.Event]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reports.

    >>> import kd
    >>> result = kd.train(cache="cache", student="demo", out="student", loss="ce", max_steps=1)
    >>> isinstance(result, kd.TrainResult), result.kd is None, result.ce > 0
    (True, True, True)
    """

    out: str
    """Folder of the run."""
    steps: int
    """Optimizer steps."""
    tokens: int
    """Target positions trained on, on all devices."""
    seconds: float
    """Seconds from the first step to the last, evaluations not counted."""
    tokens_per_second: float
    """Target positions per second."""
    loss: float
    """Loss of the last line of the log, in nats per position."""
    kd: float | None
    """Distillation loss of that line; None for --loss ce."""
    ce: float
    """Cross-entropy of that line."""
    wait_share: float
    """Share of the time that training waited for data."""
    parameters: int
    """Number of the student's parameters."""
    cache_fingerprint: str
    """Fingerprint of the cache."""
    aligned_share: float | None = None
    """Share of the targets' bytes that aligned groups covered; None for losses by row."""
    best_step: int | None = None
    """Step whose weights the run ends with, where a figure chose them; None = the last."""
    truncated: int = 0
    """Number of examples that did not fit the student's window."""
    padding_share: float = 0.0
    """Share of the tokens the student read that were padding."""
    turns: int | None = None
    """Turns of conversations that the teacher has scored; None where the student reads the cached tokens, or no conversations."""
    turns_not_learned: int | None = None
    """Those of them that the loss does not see: the student's template shows them in another rendering, they did not fit, or,
    for losses that compare texts, their text is not the teacher's."""


def train(
    config: TrainConfig | None = None,
    *,
    resume: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    midway: Midway | None = None,
    stoppable: Stoppable | None = None,
    say: Callable[[str], object] = warnings.warn,
    upload: bool = True,
    **settings: Any,
) -> TrainResult:
    """Train a student from a cache, or continue an interrupted training. The teacher is never loaded.

    config      settings as an object; None = they are given by name
    resume      continue from the last checkpoint in `out`
    on_step     called with every line of the log, on the main process
    midway      what to score while the student learns; it changes nothing of the training
    stoppable   entered while steps are made. Once its event is set, the step under way is finished, a checkpoint is written,
                and KeyboardInterrupt is raised. Only with one process: several would have to agree on the step
    say         receives a sentence for what happened to the run beside its steps: a checkpoint that was left out because it
                is damaged, or another folder that the run went on in. By default a warning
    upload      whether `push_to_hub` is done here; False where the caller adds to the model card first
    settings    the options of `kd train`, spelled with underscores; `cache`, `student` and `out` have no default

    Several caches are mixed by weights: `cache={"runs/a": 0.7, "runs/b": 0.3}`. Raises KdError before the first step where
    cache and student do not belong together.

    >>> import kd
    >>> result = kd.train(cache="cache", student="demo", out="student", loss="kl", temperature=2.0, max_steps=2)
    >>> result.steps, result.parameters
    (2, 556896)
    """
    if config is None or settings:
        config = config_from({**({} if config is None else flat(config)), **settings})
    prepared = prepare(config, touch=not resume)
    arguments = training_arguments(config)
    identity = run_identity(prepared, arguments.world_size)
    start = resume_point(config.folder, identity, resume=resume)
    checkpoint = start.checkpoint
    repository = config.weights.push_to_hub if PartialState().is_main_process else None
    if repository is not None:
        prepare_repository(repository, private=config.weights.hub_private)
    run_place = RunPlace(
        config.folder, config.logging.rescue_folder, say=say, records=RECORDS, moves=arguments.world_size == 1
    )
    student, trainer = student_and_trainer(
        prepared, arguments, run_place=run_place, say=say, on_step=on_step, checkpoint=checkpoint
    )
    steps = arguments.max_steps
    scorings = None if midway is None else MidwayEvaluations(trainer, midway, student.model, prepared.tokenizer)
    if scorings is not None:
        trainer.add_callback(scorings)
    PartialState().wait_for_everyone()  # each process has looked at the folder before one of them writes
    if PartialState().is_main_process:
        for sentence in start.sentences:
            say(sentence)
        with clear_write_errors(config.folder, "another --out"):
            start_run(config.folder, identity, prepared.reader.manifest.fingerprint, checkpoint)
    seconds = make_steps(trainer, checkpoint, steps, stoppable)
    best = None if scorings is None else scorings.take_best()
    result = replace(result_of(prepared, trainer, student, seconds), best_step=best)

    def finish(folder: Path) -> None:
        seal_run(folder)
        document = run_document(prepared, identity, replace(result, out=str(folder)))
        write_atomic(folder / CARD, render_card(document, ()))  # the command line adds scores
        write_run(folder, document)

    save_student(student, trainer, prepared, finish, say)
    if repository is not None and upload:
        upload_student(run_place.folder, repository)
    return replace(result, out=str(run_place.folder))


def student_and_trainer(
    prepared: Prepared,
    arguments: TrainingArguments,
    *,
    run_place: RunPlace,
    say: Callable[[str], object],
    on_step: Callable[[StepRecord], None] | None,
    checkpoint: Path | None = None,
) -> tuple[Student, DistillationTrainer]:
    """The student with its loss, and the Trainer that will make `arguments.max_steps` steps of it, those after `checkpoint`."""
    config = prepared.config
    student = student_with_loss(prepared, say if PartialState().is_main_process else None)
    multiple = config.batches.accumulate * arguments.world_size
    plan = prepared.plan(multiple)
    if checkpoint is not None and (checkpoint / BATCHES).is_file():
        plan.know(read_object(checkpoint / BATCHES))
    count_steps(plan, say)
    done = 0 if checkpoint is None else step_of(checkpoint) * multiple
    read_here = islice(plan.walk(done), arguments.process_index, None, arguments.world_size)
    prepared.reader.announce(batch.examples for batch in read_here)
    set_steps(arguments, config.optimization, len(plan) // multiple)
    trainer = DistillationTrainer(
        model=student.trained,
        args=arguments,
        train_dataset=CachedExamples(prepared.reader),
        data_collator=prepared.collator,
        plan=plan,
        done=done,
        prepared=prepared,
        has_kd=config.objective.loss != "ce",
        run_place=run_place,
        say=say,
        on_step=on_step,
    )
    refuse_other_wrapping(trainer)
    if config.model.compile:
        refuse_to_compile_parts(trainer)
        trainer.add_callback(UncompiledParts(say))
    return student, trainer


def run_identity(prepared: Prepared, world_size: int) -> dict[str, Any]:
    """What must be equal for a run to be continued: the order of examples also depends on shards.

    Of the number of processes, what it makes of the micro-batches of a step must be equal (`run_folder.refuse_other_settings`).
    """
    reader = prepared.reader
    order = reader.epoch_order(prepared.config.seed, 0)
    return prepared.config.identity() | {
        "cache": reader.manifest.fingerprint,
        "cache_shard_rows": reader.manifest.layout.shard_rows,
        "world_size": world_size,
        **({} if order.layout == "window" else {"order": order.layout}),
        **({} if reader.part is None else {"cache_shards": list(reader.part.shards)}),
    }


def make_steps(trainer: DistillationTrainer, checkpoint: Path | None, steps: int, stoppable: Stoppable | None) -> float:
    """Train to the last step; returns the seconds it took, evaluations not counted.

    Raises KeyboardInterrupt where the run was stopped. A run that fails before its first step leaves no folder behind.
    """
    started = time.perf_counter()
    stop = threading.Event()
    alone = trainer.args.world_size == 1
    try:
        asked = stoppable if stoppable is not None and alone else nullcontext(stop)
        with clear_compile_errors(), asked as stop:
            trainer.add_callback(StopWithCheckpoint(stop))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except BaseException:
        if PartialState().is_main_process and checkpoint is None and not trainer.state.global_step:
            leave_run(trainer.folder)
        raise
    finally:
        trainer.close()
    done = trainer.state.global_step
    if stop.is_set() and done < steps:
        said = f"stopped after step {done} of {steps}, with a checkpoint"
        if trainer.run_place.moved:
            raise KeyboardInterrupt(
                f"{said} in {trainer.folder}", f"the same command with --out {trainer.folder} --resume continues"
            )
        raise KeyboardInterrupt(said)
    return time.perf_counter() - started - trainer.paused


def result_of(prepared: Prepared, trainer: DistillationTrainer, student: Student, seconds: float) -> TrainResult:
    """What the run reports, from its last line of the log."""
    # no line was logged where only the last checkpoint was left to write out
    last = trainer.last_record or read_steps(trainer.folder)[-1]
    turns, not_learned = prepared.turns or (None, None)
    return TrainResult(
        out=str(prepared.config.folder),
        steps=trainer.state.global_step,
        tokens=last.tokens,
        seconds=seconds,
        tokens_per_second=trainer.tokens_this_run / seconds,
        loss=last.loss,
        kd=last.kd,
        ce=last.ce,
        wait_share=trainer.waited / seconds,
        parameters=student.parameters,
        cache_fingerprint=prepared.reader.manifest.fingerprint,
        aligned_share=trainer.aligned_share,
        truncated=prepared.truncated,
        padding_share=trainer.plan.padding_share,
        turns=turns,
        turns_not_learned=not_learned,
    )


def run_document(prepared: Prepared, identity: Mapping[str, Any], result: TrainResult) -> dict[str, Any]:
    """`run.json` of the finished run: what `kd report` and the model card read."""
    config, manifest = prepared.config, prepared.reader.manifest
    return {
        "identity": identity,
        "cache_fingerprint": manifest.fingerprint,
        "complete": True,
        "name": config.folder.name,
        "student": config.model.student,
        "encoder_decoder": prepared.encoder_decoder,
        "loss": config.objective.loss,
        "teacher": manifest.provenance.get("teacher"),
        "corpus": {key: manifest.provenance.get(key) for key in ("corpus", "split")},
        "rows_digest": manifest.rows_digest,
        READING: asdict(prepared.reading),
        "settings": config.saved() | {"objective": asdict(prepared.objective)},
        "result": asdict(result),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
