"""Train a language model as a classifier of one GLUE task with transformers' Trainer, from labels or from another's answers.

    make(ClassifyConfig, {"model": "openai-community/gpt2", "task": "sst2", "out": "runs/sst2"})
    make(ClassifyConfig, {"model": "distilbert/distilgpt2", "cache": "runs/sst2-soft", "out": "runs/sst2-small"})

either of which `train_classifier` runs. The defaults are those of the Trainer, which FusionBench's GPT-2 classifiers use too:
AdamW without weight decay, learning rate 5e-5 falling linearly to 0, no warm-up, batches of 8, three epochs. kd adds the rows,
the padding and the records. The folder of a run holds what `save_pretrained` writes, the tokenizer with its pad token,
`metrics.jsonl` (one line per logged step) and, written last, `classify.json`: settings, digest of the rows, result, versions.
Runs take minutes, so there is no resume.
"""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from kd.cache_builder.opening import open_cache
from kd.common.disk.disk_errors import clear_write_errors
from kd.common.disk.home import kd_home
from kd.common.errors import DataError
from kd.common.paths import as_path
from kd.common.settings import saved
from kd.data.instruction_tasks.glue import LabelledRows, glue_task, load_glue
from kd.models.classifiers import HEAD, classifier_parameters, load_classifier
from kd.models.families.positions import max_positions
from kd.models.model_config import load_config, load_request_tokenizer
from kd.models.model_request import ModelRequest, resolve_device
from kd.models.tokenizer import Tokenizer, pad_token_id, refuse_unknown_ids, usable_ids
from kd.models.weights.finite_weights import refuse_weights_without_value
from kd.student_trainer.batches.compatibility import resolve_objective
from kd.student_trainer.classify.classify_settings import ClassifyConfig
from kd.student_trainer.classify.encoding import EncodedRows, PadBatch, encode_rows
from kd.student_trainer.classify.soft_labels import SoftLabelTrainer, read_classes
from kd.student_trainer.configuration.step_settings import OPTIMIZERS, SCHEDULES
from kd.student_trainer.lora import with_adapters
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.run_folder import METRICS, ClassifyRecord, append_step, write_classifier_run
from kd.student_trainer.saving.rescue import RunPlace
from kd.student_trainer.saving.trained_weights import trained_weights


@dataclass(frozen=True)
class ClassifyResult:
    """Facts about a finished run."""

    out: str
    task: str
    rows: int
    classes: int
    parameters: int
    trained_parameters: int
    """Number of parameters that were trained; with LoRA, those of the adapters and the head."""
    steps: int
    seconds: float
    rows_per_second: float
    loss: float
    """Loss of the last line of `metrics.jsonl`, in nats per row."""


@dataclass(frozen=True)
class ClassifierSource:
    """What a classifier learns from."""

    labelled: LabelledRows
    objective: Objective | None = None
    """None = cross-entropy with the labels, without a cache."""
    teacher: np.ndarray | None = None
    """[n, C] float32 log-probabilities of the teacher, nats; None without a cache"""


def train_classifier(
    config: ClassifyConfig, *, on_step: Callable[[ClassifyRecord], None] | None = None
) -> ClassifyResult:
    """Run the training that `config` describes. Raises KdError before the first step for anything unusable."""
    out, request = as_path(config.out), _request(config)
    source, tokenizer, encoded = _checked_rows(config, request)
    pad_id = encoded.pad_id
    model = load_classifier(request, source.labelled.task.labels, pad_id=pad_id)
    refuse_weights_without_value(model, config.model)
    set_seed(config.seed)
    trained = _with_adapters(model, config)
    run_place = RunPlace(out, kd_home() / "rescue", say=warnings.warn, records=(METRICS,))
    with clear_write_errors(out, "another --out"):
        out.mkdir(parents=True, exist_ok=True)
    records = RecordWriter(run_place, on_step)
    trainer = _trainer(config, trained, replace(encoded, teacher=source.teacher), source.objective, records)
    counts = _parameter_counts(trained)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    assert records.last is not None
    steps, labelled = trainer.state.global_step, source.labelled
    rows_seen = steps * config.steps.batch_size * config.steps.accumulate * trainer.args.world_size
    result = ClassifyResult(
        str(out),
        labelled.task.name,
        len(labelled.rows),
        len(labelled.task.labels),
        *counts,
        steps,
        seconds,
        rows_seen / seconds,
        records.last.loss,
    )
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
    tokenizer.model_max_length = config.inputs.max_length
    weights = trained_weights(
        model,
        trained,
        tokenizer,
        config.adapters,
        base=None if request.random_shape is not None else request.path,
        request=request,
        dtype=torch.float32,
        say=warnings.warn,
    )

    def write(folder: Path) -> ClassifyResult:
        written = replace(result, out=str(folder))
        weights.write(folder)
        _write_run(config, labelled, folder, written)
        return written

    return run_place.write(write) if trainer.is_world_process_zero() else result


def plan_classifier(config: ClassifyConfig) -> dict[str, Any]:
    """What `train_classifier` would write: the dry run of `kd classify train`. No weights are loaded, and nothing is written.

    Raises KdError where the training would refuse to start.
    """
    request = _request(config)
    source, _, encoded = _checked_rows(config, request)
    labels, steps = source.labelled.task.labels, config.steps
    batches = -(-len(encoded) // (steps.batch_size * int(os.environ.get("WORLD_SIZE", "1"))))
    parameters = classifier_parameters(request, labels)
    only_adapter = bool(config.adapters.lora) and config.adapters.lora_save == "adapter"
    return {
        "out": config.out,
        "task": source.labelled.task.name,
        "rows": len(encoded),
        "classes": len(labels),
        "steps": steps.max_steps or math.ceil(steps.epochs * -(-batches // steps.accumulate)),
        "parameters": parameters,
        "weights_bytes": None if only_adapter else 4 * parameters,  # float32
    }


def _checked_rows(config: ClassifyConfig, request: ModelRequest) -> tuple[ClassifierSource, Tokenizer, EncodedRows]:
    """What is learned, the tokenizer, and the rows in its tokens. Raises KdError for a filled folder and anything unusable."""
    out = as_path(config.out)
    if out.exists() and any(out.iterdir()):
        raise DataError("the output folder is not empty", where=out, try_="another --out")
    source, tokenizer, model_config = load_source(config), load_request_tokenizer(request), load_config(request)
    _check_tokenizer(tokenizer, model_config, config.inputs.max_length)
    encoded = encode_rows(tokenizer, source.labelled.rows, max_length=config.inputs.max_length)
    texts = ((f"row {number}", np.array(ids)) for number, ids in enumerate(encoded.ids))
    refuse_unknown_ids(texts, int(model_config.get_text_config().vocab_size))
    return source, tokenizer, encoded


def load_source(config: ClassifyConfig) -> ClassifierSource:
    """The rows of a task, or those of a cache with its answers. Raises KdError where they do not fit the settings."""
    rows = config.rows
    if rows.cache is None:
        task = glue_task(rows.task or Path(rows.data or "").name)
        return ClassifierSource(
            load_glue(rows.data, task=task.name, split=rows.split, limit=rows.limit, task_root=rows.task_root)
        )
    reader = open_cache(rows.cache)
    objective = resolve_objective(reader.config, config.objective.loss_settings)
    labelled, log_probs = read_classes(
        reader, task=rows.task, limit=rows.limit, temperature=config.objective.temperature
    )
    return ClassifierSource(labelled, objective, log_probs)


def _request(config: ClassifyConfig) -> ModelRequest:
    return ModelRequest(
        config.model,
        revision=config.revision,
        device="cpu",
        dtype="float32",
        tokenizer=config.tokenizer,
        seed=config.seed,
    )


def _with_adapters(model: Any, config: ClassifyConfig) -> Any:
    if not config.adapters.lora:
        return model
    return with_adapters(model, config.adapters, task_type="SEQ_CLS", saved=[HEAD])


def _parameter_counts(model: Any) -> tuple[int, int]:
    """All parameters, and those that are trained."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, _ in sizes), sum(size for size, trained in sizes if trained)


def _check_tokenizer(tokenizer: Tokenizer, config: Any, max_length: int) -> None:
    """Raise DataError for a tokenizer with more entries than the model, or too few positions."""
    width = int(config.get_text_config().vocab_size)
    usable_ids(tokenizer, width, what="the model")
    refuse_unknown_ids([("the tokenizer's padding token", np.array([pad_token_id(tokenizer)]))], width)
    limit = max_positions(config)
    if limit is not None and max_length > limit:
        raise DataError(
            "rows may be longer than the model's positions",
            found=f"--max-length {max_length}",
            expected=f"at most {limit}",
            try_=f"--max-length {limit}",
        )


def _trainer(
    config: ClassifyConfig, model: Any, rows: EncodedRows, objective: Objective | None, records: RecordWriter
) -> Trainer:
    """A Trainer that prints nothing and saves nothing."""
    trainer_class = Trainer if objective is None else partial(SoftLabelTrainer, objective=objective)
    inputs = config.inputs
    trainer = trainer_class(
        model=model,
        args=_arguments(config),
        train_dataset=rows,
        callbacks=[records],
        data_collator=PadBatch(rows.pad_id, inputs.max_length if inputs.pad_to_max else None),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    return trainer


def _arguments(config: ClassifyConfig) -> TrainingArguments:
    steps = config.steps
    arguments = TrainingArguments(
        output_dir=config.out,
        num_train_epochs=steps.epochs,
        max_steps=steps.max_steps or -1,
        per_device_train_batch_size=steps.batch_size,
        gradient_accumulation_steps=steps.accumulate,
        learning_rate=steps.lr,
        weight_decay=steps.weight_decay,
        warmup_steps=steps.warmup,
        max_grad_norm=steps.max_grad_norm,
        optim=OPTIMIZERS[steps.optimizer],
        lr_scheduler_type=SCHEDULES[steps.schedule],
        bf16=steps.precision == "bf16",
        use_cpu=resolve_device(config.device) == "cpu",
        seed=config.seed,
        data_seed=config.seed,
        logging_steps=config.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available() and config.device != "cpu",
    )
    if arguments.n_gpu > 1:  # one process uses one device, as in `kd train`
        arguments._n_gpu = 1
    return arguments


class RecordWriter(TrainerCallback):  # type: ignore[misc]
    """Turns the Trainer's log into `ClassifyRecord`s, a line of `metrics.jsonl` each."""

    def __init__(self, run_place: RunPlace, on_step: Callable[[ClassifyRecord], None] | None) -> None:
        self.run_place, self.on_step = run_place, on_step
        self.last: ClassifyRecord | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Log the last step, whatever its number."""
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
        """Write one record. Raises DataError for a loss that is not finite."""
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        record = ClassifyRecord(
            state.global_step,
            state.max_steps,
            float(state.epoch or 0.0),
            float(logs["loss"]),
            float(logs["learning_rate"]),
            float(logs.get("grad_norm", 0.0)),
            logs.get("kd"),
            logs.get("ce"),
        )
        if not math.isfinite(record.loss):
            raise DataError(
                "training diverged",
                where=f"step {record.step}",
                found=f"loss {record.loss}",
                try_="a smaller --lr, or --warmup",
            )
        self.last = record
        self.run_place.write(partial(append_step, record=record))
        if self.on_step is not None:
            self.on_step(record)


def _write_run(config: ClassifyConfig, labelled: LabelledRows, out: Path, result: ClassifyResult) -> None:
    document = {
        "format": "kd-classifier",
        "task": labelled.task.name,
        "labels": list(labelled.task.labels),
        "model": config.model,
        "rows": {"split": labelled.split, "digest": labelled.digest, **labelled.source},
        "settings": saved(config),
        "result": asdict(result),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_classifier_run(out, document)
