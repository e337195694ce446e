"""What can be measured, by name; `kd.evaluation.evaluator` does it.

    perplexity   needs a text                             perplexity, bits per byte, calibration
    agreement    needs a cache, or a teacher and a text   KL and JSD to the teacher, top-1 agreement, calibration
    choices      needs a text with choices                accuracy of rank classification
    generation   needs a text of prompts and targets      exact match, token F1, ROUGE, BLEU, … of answers
    hellaswag    has rows of its own                      accuracy under one of two protocols
    samples      needs a file of prompts                  what the model writes, to be read side by side

Add a task: a function in `kd.evaluation.tasks.runners` that yields `Progress[TaskResult]`, and an entry in `TASKS`. A metric
`NAME/TASK` is the metric NAME over the examples of one task of the text. numpy is the heaviest thing this module
imports; torch and zarr come when a task runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kd.cache_builder.weighted_caches import CacheSpec
from kd.common.errors import DataError, unknown_name
from kd.data.tasks.task import WORDINGS
from kd.evaluation.answers.answer_metrics import ANSWER_METRICS
from kd.evaluation.tasks.eval_task import Metric, Task, TaskResult
from kd.evaluation.tasks.runners import (
    run_agreement,
    run_choices,
    run_generation,
    run_hellaswag,
    run_perplexity,
    run_samples,
)

EXACT_MATCH = Metric("exact match", "share of examples", "higher", "example")
F1 = Metric("token F1", "mean over examples", "higher", "example")
ACCURACY = Metric("accuracy", "share of examples", "higher", "example")
RANKED = {
    "accuracy": ACCURACY,
    "accuracy_mean_of_tasks": replace(ACCURACY, title="accuracy, mean of tasks", unit="mean of shares"),
    "accuracy_sum": replace(ACCURACY, title="accuracy by sum"),
    "accuracy_chars": replace(ACCURACY, title="accuracy by character"),
}

FURTHER = {
    f"{name}{suffix}": Metric(f"{metric.title}{about}", metric.unit, "higher", "example")
    for name, metric in ANSWER_METRICS.items()
    for suffix, about in (("", ""), ("_mean_of_tasks", ", mean of tasks"))
}
"""Of answers, where a task names them."""

TASKS: dict[str, Task] = {
    "perplexity": Task(
        about="perplexity and bits per byte of a text, sliding window",
        needs="data",
        metrics={
            "perplexity": Metric("perplexity", "per token", "lower", "token"),
            "bits_per_byte": Metric("bits per byte", "bits per byte", "lower", "byte"),
            "nll_per_token": Metric("NLL", "nats per token", "lower", "token"),
            "ece": Metric("calibration error", "ECE, 15 bins", "lower", "token"),
        },
        run=run_perplexity,
    ),
    "agreement": Task(
        about="KL and JSD to the teacher, of a cache or at hand, top-1 agreement with it, calibration",
        needs="cache",
        metrics={
            "kl": Metric("KL to teacher", "nats per token", "lower", "row"),
            "jsd": Metric("JSD to teacher", "nats per token", "lower", "row"),
            "top1_agreement": Metric("top-1 agreement", "share of tokens", "higher", "row"),
            "nll_per_token": Metric("NLL", "nats per token", "lower", "row"),
            "teacher_nll_per_token": Metric("teacher's NLL", "nats per token", None, "row"),
            "ece": Metric("calibration error", "ECE, 15 bins", "lower", "row"),
            "teacher_ece": Metric("teacher's calibration error", "ECE, 15 bins", None, "row"),
        },
        run=run_agreement,
    ),
    "choices": Task(
        about="rank classification: is the most probable of an example's choices the right one?",
        needs="data",
        metrics=RANKED
        | {
            f"{name}_{wording}": replace(metric, title=f"{metric.title}, {wording} labels")
            for wording in WORDINGS
            for name, metric in RANKED.items()
        },
        run=run_choices,
    ),
    "generation": Task(
        about="answers, greedy or sampled, compared with the references; further metrics as the tasks of the text name them",
        needs="data",
        metrics={
            "exact_match": EXACT_MATCH,
            "exact_match_mean_of_tasks": replace(
                EXACT_MATCH, title="exact match, mean of tasks", unit="mean of shares"
            ),
            "f1": F1,
            "f1_mean_of_tasks": replace(F1, title="token F1, mean of tasks", unit="mean of means"),
            "choice_match": Metric("right choice named", "share of examples", "higher", "example"),
            "choice_none": Metric("no choice named", "share of examples", None, "example"),
            "unfinished": Metric("unfinished", "share of examples", None, "example"),
        }
        | FURTHER,
        run=run_generation,
    ),
    "hellaswag": Task(
        about="HellaSwag's validation rows; nanogpt is the protocol in which GPT-2 (124M) reaches 0.2955",
        needs="rows",
        metrics={
            "acc_nanogpt": replace(ACCURACY, title="acc (nanogpt)"),
            "acc_norm_nanogpt": replace(ACCURACY, title="acc_norm (nanogpt)"),
            "acc_harness": replace(ACCURACY, title="acc (harness)"),
            "acc_norm_harness": replace(ACCURACY, title="acc_norm (harness)"),
            "acc_bytes_harness": replace(ACCURACY, title="acc_bytes (harness)"),
        },
        run=run_hellaswag,
    ),
    "samples": Task(
        about="what a model writes after the prompts of a file, to be read side by side",
        needs="prompts",
        metrics={
            "ended": Metric("ended", "share of answers", None, "prompt"),
            "length": Metric("length", "tokens", None, "prompt"),
            "repeated": Metric("repeated", "share of runs of 4 words", None, "prompt"),
        },
        run=run_samples,
    ),
}


def check_tasks(
    names: Sequence[str],
    *,
    data: str | None,
    cache: CacheSpec | None,
    teacher: str | None = None,
    prompts: Path | None = None,
) -> None:
    """Raise DataError for an unknown task, for none at all, or for one whose text, cache, teacher or prompts were not given."""
    if not names:
        raise DataError("no task was named", expected=", ".join(TASKS), try_="--tasks perplexity")
    for name in names:
        if name not in TASKS:
            raise unknown_name("task", name, TASKS)
        needs = TASKS[name].needs
        if needs == "data" and data is None:
            raise DataError(f"the task {name} needs a text that was not given", try_="--data SPEC, e.g. demo:heldout")
        if needs == "prompts" and prompts is None:
            raise DataError(f"the task {name} needs prompts that were not given", try_="--prompts FILE")
        if needs == "cache" and cache is None and teacher is None:
            raise DataError(
                f"the task {name} needs a teacher that was not given",
                try_="--cache DIR, or --teacher MODEL with --data SPEC",
            )
        if needs == "cache" and teacher is not None and (cache is not None or data is None):
            raise DataError(
                f"the task {name} follows one teacher on one text",
                found="a cache and a live teacher" if cache is not None else "a live teacher without a text",
                try_="--cache DIR alone, or --teacher MODEL with --data SPEC",
            )
    if teacher is not None and not any(TASKS[name].needs == "cache" for name in names):
        raise DataError("no task asks for a teacher", found=f"--teacher {teacher}", try_="--tasks agreement")


def check_ways(names: Sequence[str], encoding: str, protocol: str) -> None:
    """Raise DataError for an unknown encoding or protocol of a task that is to run."""
    from kd.evaluation.tasks.choices import ENCODINGS
    from kd.evaluation.tasks.hellaswag import PROTOCOLS

    for task, kind, name, known in (
        ("choices", "encoding", encoding, ENCODINGS),
        ("hellaswag", "protocol", protocol, PROTOCOLS),
    ):
        if task in names and name not in known:
            raise unknown_name(kind, name, known)


def figures_of(task: str, result: TaskResult) -> dict[str, dict[str, Any]]:
    """Metric -> value (None where it is not finite), stderr, n, over, unit, better, title."""
    figures: dict[str, dict[str, Any]] = {}
    for name, estimate in result.estimates.items():
        base, _, part = name.partition("/")
        metric = TASKS[task].metrics[base]
        figures[name] = {
            "value": estimate.value if math.isfinite(estimate.value) else None,
            "stderr": estimate.stderr,
            "n": estimate.n,
            "over": metric.over,
            "unit": metric.unit,
            "better": metric.better,
            "title": f"{metric.title}: {part}" if part else metric.title,
        }
    return figures
