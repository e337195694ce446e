"""Train a student from a cache, on transformers' Trainer: the teacher is never loaded.

    result = train(TrainConfig(cache="runs/cache", student="openai-community/gpt2", out="runs/student"))

Devices, DDP, FSDP, mixed precision, checkpoints, trackers and LoRA are the Trainer's, accelerate's and peft's.
Ours are the batches (`batch_plan`, `collate`), the loss inside the model's forward (`head`), and the checks that refuse a cache
that does not belong to the student (`compatibility`). The loss runs *inside* `model.forward`, so that DDP and FSDP
see every parameter where they expect it, and `[B, T, V]` logits never exist.

A run directory holds what `save_pretrained` writes, `run.json`, `metrics.jsonl` (one line per logged step),
`evaluations.jsonl` where the student is scored while it learns (`midway`), and `checkpoint-*`. Interrupted runs continue
exactly with `resume=True`.
"""

from __future__ import annotations

import json
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate import PartialState
from transformers import TrainingArguments, set_seed

from kd.cache_builder.opening import open_cache
from kd.cache_builder.store.readers.reading import Reader
from kd.common.errors import CacheMismatchError, DataError
from kd.common.extras import EXTRAS, require_package
from kd.common.files import canonical_json, sweep, unfinished, write_atomic
from kd.models.loading import (
    ModelRequest,
    is_encoder_decoder,
    load_config,
    load_model,
    load_request_tokenizer,
    max_positions,
    resolve_device,
)
from kd.models.packable import require_packable
from kd.student_trainer.batches.batch_plan import plan_batches
from kd.student_trainer.batches.compatibility import (
    needed_arrays,
    resolve_objective,
)
from kd.student_trainer.batches.read_ahead import TOUCHED_EXAMPLES, CachedExamples, touch_shards
from kd.student_trainer.config import OPTIMIZERS, SCHEDULES, TrainConfig
from kd.student_trainer.head import attach_loss, detach_loss
from kd.student_trainer.lora import with_adapters
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.midway import Midway, MidwayEvaluations
from kd.student_trainer.prepare import packed_capacity, prepare, rank_edges
from kd.student_trainer.run_folder import keep_evaluations
from kd.student_trainer.trainer import DistillationTrainer, StepRecord, StopWithCheckpoint

RUN, METRICS = "run.json", "metrics.jsonl"


@dataclass(frozen=True)
class TrainResult:
    """What a finished run reports."""

    out: str
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    loss: float
    kd: float | None
    ce: float
    wait_share: float
    parameters: int
    cache_fingerprint: str
    aligned_share: float | None = None
    """Share of the target's bytes that aligned groups covered; None for losses by row"""
    truncated: int = 0
    """Examples that did not fit the student's window"""
    padding_share: float = 0.0
    """Share of the tokens the student read that were padding"""


def train(
    config: TrainConfig,
    *,
    resume: bool = False,
    on_step: Callable[[StepRecord], None] | None = None,
    midway: Midway | None = None,
    stoppable: AbstractContextManager[threading.Event] | None = None,
) -> TrainResult:
    """Run (or continue) the training `config` describes. Raises KdError before the first step on any mismatch.

    midway      what to score while the student learns; changes nothing of the training
    stoppable   entered while steps are made: once its event is set, the step under way is finished, a checkpoint is written,
                and KeyboardInterrupt raised. Of one process alone: several would have to agree on the step
    """
    reader = open_cache(config.cache, top_k=config.top_k, cache_bytes=config.cache_bytes)
    settings = GroupSettings(edges=rank_edges(reader), ranking=config.ranking, beta=config.beta)
    objective = resolve_objective(
        reader.config,
        loss=config.loss,
        tail=config.tail,
        alpha=config.alpha,
        temperature=config.temperature,
        ce_weight=config.ce_weight,
        settings=settings,
    )
    reader.keep(needed_arrays(objective, reader.manifest))
    if not resume:  # where a resumed run begins is known later
        touch_shards(reader, reader.epoch_order(config.seed, 0)[:TOUCHED_EXAMPLES].tolist())
    request = ModelRequest(
        "random:demo-student" if config.student == "demo" else config.student,
        revision=config.revision,
        device="cpu",
        dtype="float32",
        tokenizer=config.tokenizer,
        seed=config.seed,
    )
    tokenizer = load_request_tokenizer(request)
    student = load_config(request)
    text, collator, width = prepare(config, reader, objective, student, tokenizer)
    objective = collator.objective
    tokens, rows = reader.lengths() if text is None else text.lengths()
    sizes = tokens[:, None] if collator.start_id is None else np.stack([tokens - rows, rows], axis=1)
    if config.prompt_loss:
        rows = tokens - 1
    if config.packing:
        collator = replace(collator, capacity=packed_capacity(config, sizes, max_positions(student)))
    out = Path(config.out)
    arguments = _training_arguments(config, out)  # under torchrun, joins the other processes
    identity = _identity(config, reader, arguments.world_size)
    checkpoint = _resume_point(identity, out, resume)

    set_seed(config.seed)
    model = load_model(request)
    parameters = sum(p.numel() for p in model.parameters())
    if config.packing:
        require_packable(model)
    attach_loss(model, objective, width, config.head_chunk)
    if config.gradient_checkpointing:
        # transformers 5.23 warns about the name that 5.0 has
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    kind = "SEQ_2_SEQ_LM" if is_encoder_decoder(student) else "CAUSAL_LM"
    trained = with_adapters(model, config.lora, config.lora_targets, task_type=kind) if config.lora else model
    multiple = config.accumulate * arguments.world_size
    plan = plan_batches(
        reader,
        sizes,
        seed=config.seed,
        epochs=config.epochs,
        multiple_of=multiple,
        capacity=collator.capacity,
        count=None if config.max_steps is None else config.max_steps * multiple,
        batch_size=config.batch_size,
        tokens_per_batch=config.tokens_per_batch or (None if config.batch_size else 4096),
    )
    reader.announce(plan.batches)
    steps = len(plan) // multiple
    arguments.max_steps = steps
    arguments.warmup_steps = int(config.warmup if config.warmup >= 1 else round(config.warmup * steps))
    trainer = DistillationTrainer(
        model=trained,
        args=arguments,
        train_dataset=CachedExamples(reader),
        data_collator=collator,
        plan=plan,
        example_rows=rows,
        has_kd=config.loss != "ce",
        log_path=out / METRICS,
        on_step=on_step,
    )
    if midway is not None:
        trainer.add_callback(MidwayEvaluations(trainer, midway, model, tokenizer, out))
    PartialState().wait_for_everyone()  # each process has looked at the folder before one of them writes
    if PartialState().is_main_process:
        _open_folder(identity, reader, out, checkpoint)
    started = time.perf_counter()
    stop = threading.Event()
    try:
        with nullcontext(stop) if stoppable is None or arguments.world_size > 1 else stoppable as stop:
            trainer.add_callback(StopWithCheckpoint(stop))
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except BaseException:
        if PartialState().is_main_process and checkpoint is None and not trainer.state.global_step:
            _leave_folder(out)
        raise
    finally:
        trainer.close()
    if stop.is_set() and trainer.state.global_step < steps:
        raise KeyboardInterrupt(f"stopped after step {trainer.state.global_step} of {steps}, with a checkpoint")
    seconds = time.perf_counter() - started - trainer.paused
    last = trainer.last_record or read_metrics(out)[-1]  # none, where only the last checkpoint was left to write out
    detach_loss(model)
    model.config.use_cache = True
    if not config.lora:
        trainer.save_model(str(out))  # on every process: FSDP gathers its shards here
    if trainer.is_world_process_zero():
        if config.lora:
            with warnings.catch_warnings():  # peft 0.21 believes T5's configuration, which calls every head tied
                warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
                trained.merge_and_unload().save_pretrained(out)
        (out / "training_args.bin").unlink(missing_ok=True)  # written with torch.save; run.json says the same
        tokenizer.save_pretrained(out)
    result = TrainResult(
        str(out),
        steps,
        last.tokens,
        seconds,
        trainer.tokens_this_run / seconds,
        last.loss,
        last.kd,
        last.ce,
        trainer.waited / seconds,
        parameters,
        reader.manifest.fingerprint,
        trainer.aligned_share,
        0 if text is None else text.truncated,
        plan.padding_share,
    )
    if trainer.is_world_process_zero():
        _write_run(config, identity, reader, out, result, objective, encoder_decoder=is_encoder_decoder(student))
    return result


def _require_tracker(name: str) -> None:
    """Raise DataError for a tracker that transformers does not know, MissingPackageError for one that is not installed."""
    from transformers.integrations import get_reporting_integration_callbacks

    if name in EXTRAS["trackers"]:
        require_package(name, f"--report-to {name}")
    try:
        get_reporting_integration_callbacks([] if name == "none" else [name])
    except ValueError as error:
        raise DataError("transformers cannot report there", found=f"--report-to {name}", expected=str(error)) from error


def _training_arguments(config: TrainConfig, out: Path) -> TrainingArguments:
    _require_tracker(config.report_to)
    pinned = torch.cuda.is_available() and config.device != "cpu"
    arguments = TrainingArguments(
        output_dir=str(out),
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=OPTIMIZERS[config.optimizer],
        lr_scheduler_type=SCHEDULES[config.schedule],
        gradient_accumulation_steps=config.accumulate,
        bf16=config.precision == "bf16",
        use_cpu=resolve_device(config.device) == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        logging_strategy="steps",
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if config.save_every else "no",
        save_steps=config.save_every or 500,
        save_total_limit=2,
        report_to=config.report_to,
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=pinned,
        ddp_find_unused_parameters=False,  # every parameter takes part in the loss
        # batches go to a GPU between steps: reading ahead must not wait for the steps that were launched before
        accelerator_config={"even_batches": False, "dispatch_batches": False, "non_blocking": pinned},
    )
    if arguments.n_gpu > 1:  # one process uses one device: DataParallel would split positions apart from their rows
        arguments._n_gpu = 1
    return arguments


def read_metrics(run: Path) -> list[StepRecord]:
    """The lines of `metrics.jsonl`, but for one that was cut short."""
    path = run / METRICS
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [StepRecord(**json.loads(line)) for line in lines if line.endswith("\n")]


def _identity(config: TrainConfig, reader: Reader, world_size: int) -> dict[str, Any]:
    """What must be equal for a run to be continued: the order of examples also depends on shards and processes."""
    return config.identity() | {
        "cache": reader.manifest.fingerprint,
        "cache_shard_rows": reader.manifest.layout.shard_rows,
        "world_size": world_size,
        **({} if reader.part is None else {"cache_shards": list(reader.part.shards)}),
    }


def _resume_point(identity: dict[str, Any], out: Path, resume: bool) -> Path | None:
    """The checkpoint to continue from, if any. Refuses to overwrite a run, or to continue another one."""
    state = out / RUN
    if not state.exists():
        if out.exists() and not all(unfinished(path.name) for path in out.iterdir()):
            raise DataError("the output folder is not empty", where=out, try_="another --out")
        return None
    if not resume:
        raise DataError(
            "the output folder holds a run already", where=out, try_="--resume to continue it, or another --out"
        )
    before = json.loads(state.read_text(encoding="utf-8"))
    old = before["identity"]
    differing = {
        f"differs {k}": f"now {identity.get(k)}, before {old.get(k)}"
        for k in sorted(old.keys() | identity.keys())
        if old.get(k) != identity.get(k)
    }
    if differing:
        raise CacheMismatchError(
            "the run to continue has other settings", where=out, **differing, try_="the same options, or another --out"
        )
    if before["complete"]:
        raise DataError("the run to continue is finished", where=out, try_="another --out")
    # the Trainer writes this file last: without it, the checkpoint was cut short
    whole = [path.parent for path in out.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=_step_of, default=None)


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _open_folder(identity: dict[str, Any], reader: Reader, out: Path, checkpoint: Path | None) -> None:
    """Say whose folder this is, and drop the lines logged after the checkpoint: they are going to be logged again."""
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    description = {"identity": identity, "cache_fingerprint": reader.manifest.fingerprint, "complete": False}
    write_atomic(out / RUN, canonical_json(description))
    step = _step_of(checkpoint) if checkpoint else 0
    if (out / METRICS).exists():
        kept = [json.dumps(asdict(record)) for record in read_metrics(out) if record.step <= step]
        write_atomic(out / METRICS, "".join(f"{line}\n" for line in kept))
    keep_evaluations(out, step if checkpoint else None)


def _leave_folder(out: Path) -> None:
    """A run that came to nothing leaves no folder behind, or the corrected command would be refused."""
    if [path.name for path in out.glob("*")] == [RUN]:
        (out / RUN).unlink()
        out.rmdir()


def _write_run(
    config: TrainConfig,
    identity: dict[str, Any],
    reader: Reader,
    out: Path,
    result: TrainResult,
    objective: Objective,
    *,
    encoder_decoder: bool,
) -> None:
    """`run.json` of the finished run: what `kd report` and the model card read."""
    provenance = reader.manifest.provenance
    document = {
        "identity": identity,
        "cache_fingerprint": reader.manifest.fingerprint,
        "complete": True,
        "name": out.name,
        "student": config.student,
        "encoder_decoder": encoder_decoder,
        "loss": config.loss,
        "teacher": provenance.get("teacher"),
        "corpus": {k: provenance.get(k) for k in ("corpus", "split")},
        "settings": asdict(replace(config, cache=config.cache)) | {"objective": asdict(objective)},
        "result": asdict(result),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_atomic(out / RUN, canonical_json(document))
