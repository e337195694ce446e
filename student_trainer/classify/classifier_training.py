"""Train a language model as a classifier of one GLUE task, on transformers' Trainer: from labels, or from another's answers.

    result = train_classifier(ClassifyConfig(model="openai-community/gpt2", task="sst2", out="runs/sst2"))
    result = train_classifier(ClassifyConfig(model="distilbert/distilgpt2", cache="runs/sst2-soft", out="runs/sst2-small"))

Settings are the Trainer's defaults, which is what FusionBench's GPT-2 classifiers name: AdamW without weight decay, learning
rate 5e-5 falling linearly to 0, no warm-up, batches of 8, three epochs. Ours are rows, padding and records. The run's
folder holds what `save_pretrained` writes, the tokenizer with its pad token, `metrics.jsonl` (one line per logged step)
and, last, `classify.json`: settings, digest of the rows, result, versions. Runs are minutes: there is no resume.
"""

from __future__ import annotations

import json
import math
import time
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
from kd.common.errors import DataError, unknown_name
from kd.common.files import canonical_json, write_atomic
from kd.common.settings import make
from kd.data.tasks.glue import LabelledRows, glue_task, load_glue
from kd.models.classifiers import HEAD, load_classifier
from kd.models.loading import ModelRequest, load_config, load_request_tokenizer, max_positions, resolve_device
from kd.models.tokenizer import Tokenizer, pad_token_id, vocabulary_size
from kd.student_trainer.batches.compatibility import resolve_objective
from kd.student_trainer.classify.encoding import PadBatch, encode_rows
from kd.student_trainer.classify.pooling import merged_adapters
from kd.student_trainer.classify.soft_labels import SoftLabelTrainer, read_classes, refuse_groups
from kd.student_trainer.config import OPTIMIZERS, PRECISIONS, SCHEDULES, LossSettings
from kd.student_trainer.lora import with_adapters
from kd.student_trainer.losses.loss_registry import Objective

RUN, METRICS = "classify.json", "metrics.jsonl"
MAX_LENGTH = 512
"""Tokens of a row, as in the reference."""


@dataclass(frozen=True)
class ClassifyConfig:
    """Settings of one run. Equal settings, rows and library versions give equal weights on one machine."""

    model: str
    """A folder, a hub id, or `random:NAME`."""
    out: str
    """Folder of the run."""
    task: str | None = None
    """Of GLUE; None = the last part of `data`."""
    data: str | None = None
    """`glue/TASK` or a folder of rows; None = the hub's."""
    cache: str | None = None
    """Path or URL of a cache of another classifier's answers, which holds the rows too; instead of `data`."""
    loss: str | None = None
    """With a cache: kl, reverse-kl, jsd, or ce (its rows' labels alone); None = kl."""
    alpha: float | None = None
    """With a cache: weight of the distillation loss; None = 1."""
    ce_weight: float | None = None
    """With a cache: weight of the cross-entropy with the labels; None = 1 - alpha."""
    temperature: float = 1.0
    """With a cache: of the softmaxes compared, on its grid; divergences are multiplied by its square."""
    beta: float = 0.5
    """With a cache: of jsd, weight of KL(teacher || mixture)."""
    task_root: Path | None = None
    """Folder of folders of rows, by task."""
    split: str = "train"
    limit: int | None = None
    """First rows alone."""
    epochs: float = 3.0
    max_steps: int | None = None
    """Optimizer steps; overrides `epochs`."""
    batch_size: int = 8
    """Rows per micro-batch and device."""
    accumulate: int = 1
    lr: float = 5e-5
    weight_decay: float = 0.0
    warmup: float = 0.0
    """Steps when >= 1, else a share of all steps."""
    max_grad_norm: float = 1.0
    optimizer: str = "adamw"
    schedule: str = "linear"
    precision: str = "fp32"
    max_length: int = MAX_LENGTH
    """Tokens of a row; a pair's longer text is cut first."""
    pad_to_max: bool = False
    """Pad every row to `max_length`, as the reference does, instead of to the longest of its batch."""
    lora: int | None = None
    """Rank of LoRA adapters, merged into the output; None = all weights."""
    lora_targets: str | None = None
    seed: int = 0
    """Of a new head, the order and dropout."""
    revision: str | None = None
    tokenizer: str | None = None
    device: str = "auto"
    log_every: int = 50

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("optimizer", self.optimizer, OPTIMIZERS),
            ("schedule", self.schedule, SCHEDULES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise unknown_name(kind, value, known)
        if self.task is None and self.data is None and self.cache is None:
            raise DataError("no task was named", try_="--task sst2, --data glue/sst2, or --cache PATH")
        of_rows = {
            "--data": self.data is not None,
            "--task-root": self.task_root is not None,
            "--split": self.split != "train",
        }
        of_cache = {
            "--loss": self.loss is not None,
            "--alpha": self.alpha is not None,
            "--ce-weight": self.ce_weight is not None,
            "--temperature": self.temperature != 1.0,
            "--beta": self.beta != 0.5,
        }
        wrong = [option for option, given in (of_cache if self.cache is None else of_rows).items() if given]
        if wrong:
            there = "labels alone have no teacher" if self.cache is None else "a cache holds its own rows"
            raise DataError(there, found=", ".join(wrong), try_="leave it out, or --cache PATH with a loss")
        if not 0 < self.beta < 1:
            raise DataError("beta is out of bounds", found=f"--beta {self.beta:g}", expected="between 0 and 1")
        for name in ("batch_size", "accumulate", "max_steps", "limit", "lora", "log_every", "max_length"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise DataError(f"{name.replace('_', ' ')} must be at least 1", found=number)
        for name in ("lr", "epochs"):
            if not getattr(self, name) > 0:
                raise DataError(f"{name} must be positive", found=getattr(self, name))


@dataclass(frozen=True)
class ClassifyRecord:
    """One line of `metrics.jsonl`; losses are means since the last line, in nats per row."""

    step: int
    steps_total: int
    epoch: float
    loss: float
    """cross-entropy; from a cache alpha * kd + ce_weight * ce, kd times T^2"""
    lr: float
    grad_norm: float
    kd: float | None = None
    """distillation loss without weight and T^2, of this process; None without a cache or with `ce`"""
    ce: float | None = None
    """cross-entropy with the labels, of this process; None without a cache"""


@dataclass(frozen=True)
class ClassifyResult:
    """What a finished run reports."""

    out: str
    task: str
    rows: int
    classes: int
    parameters: int
    trained_parameters: int
    """fewer with LoRA"""
    steps: int
    seconds: float
    rows_per_second: float
    loss: float
    """of the last log line"""


def train_classifier(
    config: ClassifyConfig, *, on_step: Callable[[ClassifyRecord], None] | None = None
) -> ClassifyResult:
    """Run the training `config` describes. Raises KdError before the first step on anything unusable."""
    out = Path(config.out)
    if out.exists() and any(out.iterdir()):
        raise DataError("the output folder is not empty", where=out, try_="another --out")
    rows, objective, teacher = _rows(config)
    task = rows.task
    request = ModelRequest(
        config.model,
        revision=config.revision,
        device="cpu",
        dtype="float32",
        tokenizer=config.tokenizer,
        seed=config.seed,
    )
    tokenizer = load_request_tokenizer(request)
    pad = _fits(tokenizer, load_config(request), config.max_length)
    encoded = replace(encode_rows(tokenizer, rows.rows, max_length=config.max_length), teacher=teacher)
    model = load_classifier(request, task.labels, pad_id=pad)
    set_seed(config.seed)
    trained = model
    if config.lora:
        trained = with_adapters(model, config.lora, config.lora_targets, task_type="SEQ_CLS", saved=[HEAD])
    out.mkdir(parents=True, exist_ok=True)
    records = _Records(out / METRICS, on_step)
    kind = Trainer if objective is None else partial(SoftLabelTrainer, objective=objective)
    trainer = kind(
        model=trained,
        args=_arguments(config, out),
        train_dataset=encoded,
        callbacks=[records],
        data_collator=PadBatch(pad, config.max_length if config.pad_to_max else None),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
    counts = tuple(sum(p.numel() for p in trained.parameters() if p.requires_grad or every) for every in (True, False))
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    plain = merged_adapters(trained) if config.lora else model
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.model_max_length = config.max_length
    assert records.last is not None
    result = ClassifyResult(
        str(out),
        task.name,
        len(encoded),
        len(task.labels),
        counts[0],
        counts[1],
        trainer.state.global_step,
        seconds,
        trainer.state.global_step * config.batch_size * config.accumulate * trainer.args.world_size / seconds,
        records.last.loss,
    )
    if trainer.is_world_process_zero():
        plain.save_pretrained(out)
        tokenizer.save_pretrained(out)
        _write_run(config, rows, out, result)
    return result


def _rows(config: ClassifyConfig) -> tuple[LabelledRows, Objective | None, np.ndarray | None]:
    """What to learn from: labelled rows; with a cache also the objective and the teacher's log-probabilities `[n, C]`."""
    if config.cache is None:
        task = glue_task(config.task or Path(config.data or "").name)
        return (
            load_glue(config.data, task=task.name, split=config.split, limit=config.limit, task_root=config.task_root),
            None,
            None,
        )
    loss = config.loss or "kl"
    refuse_groups(loss)
    reader = open_cache(config.cache)
    settings = {"loss": loss, "beta": config.beta, "ranking": "exact"}
    settings |= {"alpha": config.alpha, "temperature": config.temperature, "ce_weight": config.ce_weight}
    objective = resolve_objective(reader.config, make(LossSettings, settings))
    rows, log_probs = read_classes(reader, task=config.task, limit=config.limit, temperature=config.temperature)
    return rows, objective, log_probs


def _fits(tokenizer: Tokenizer, config: Any, max_length: int) -> int:
    """The pad token; raises DataError for a tokenizer with more entries than the model, or too few positions."""
    if vocabulary_size(tokenizer) > int(config.vocab_size):
        raise DataError(
            "the model has fewer embeddings than tokens",
            found=config.vocab_size,
            expected=f"at least {vocabulary_size(tokenizer)}",
            try_="--tokenizer PATH of the right one",
        )
    limit = max_positions(config)
    if limit is not None and max_length > limit:
        raise DataError(
            "rows may be longer than the model's positions",
            found=f"--max-length {max_length}",
            expected=f"at most {limit}",
            try_=f"--max-length {limit}",
        )
    return pad_token_id(tokenizer)


def _arguments(config: ClassifyConfig, out: Path) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(out),
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup,
        max_grad_norm=config.max_grad_norm,
        optim=OPTIMIZERS[config.optimizer],
        lr_scheduler_type=SCHEDULES[config.schedule],
        bf16=config.precision == "bf16",
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


class _Records(TrainerCallback):  # type: ignore[misc]
    """Turns the Trainer's log into `ClassifyRecord`s."""

    def __init__(self, path: Path, on_step: Callable[[ClassifyRecord], None] | None) -> None:
        self.path, self.on_step = path, on_step
        self.last: ClassifyRecord | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **rest: Any) -> None:
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
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(record)) + "\n")
        if self.on_step is not None:
            self.on_step(record)


def _write_run(config: ClassifyConfig, rows: LabelledRows, out: Path, result: ClassifyResult) -> None:
    document = {
        "format": "kd-classifier",
        "task": rows.task.name,
        "labels": list(rows.task.labels),
        "model": config.model,
        "rows": {"split": rows.split, "digest": rows.digest, **rows.source},
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()},
        "result": asdict(result),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    write_atomic(out / RUN, canonical_json(document))
