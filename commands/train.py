"""kd train: a student from a cache."""

from __future__ import annotations

import atexit
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from kd.commands.console import emit, progress_bar, quiet_libraries
from kd.commands.eval import run_evaluation
from kd.commands.options import PATH, json_option, parse_bytes, unescaped

if TYPE_CHECKING:
    from kd.evaluation.midway_scores import ScorePlan
    from kd.student_trainer.midway import Midway


@click.command()
@click.option(
    "--cache",
    multiple=True,
    metavar="CACHE[=WEIGHT]",
    help="Path, URL (hf://datasets/…, s3://…, https://…), or the beginning of a fingerprint. Several, each with a weight, "
    "are mixed: --cache A=0.7 --cache B=0.3.",
)
@click.option(
    "--cache-bytes",
    callback=parse_bytes,
    metavar="SIZE",
    help="Of a URL: most bytes of it kept on this disk, e.g. 20GB. Default: KD_CACHE_BYTES, or 20GB.",
)
@click.option("--student", help="Hub id, folder, demo, demo-t5, or random:NAME.")
@click.option("--out", help="Folder of the run.")
@click.option(
    "--loss",
    help="With the teacher's tokenizer: kl, reverse-kl, jsd. With any: uld, hybrid, alm. ce fine-tunes on the same text: "
    "the baseline. Default: kl.",
)
@click.option("--alpha", type=float, help="Weight of the distillation loss. Default: 1; 0.5 for uld, hybrid and alm.")
@click.option("--ce-weight", type=float, help="Weight of the cross-entropy. Default: 1 - alpha.")
@click.option(
    "--temperature",
    type=float,
    help="Temperature on the cache's grid; divergences are multiplied by its square. Default: 1.",
)
@click.option("--tail", help="auto, ghost, sampled or renorm: what makes up for the cut tail of kl. Default: auto.")
@click.option("--beta", type=float, help="Of jsd and hybrid: weight of KL(teacher || mixture). Default: 0.5.")
@click.option(
    "--alignment", help="Of uld, hybrid and alm: bytes (the same text), or positional (token by token). Default: bytes."
)
@click.option("--align-eos/--no-align-eos", default=None, help="Compare the ends of text too. Default: yes.")
@click.option(
    "--ranking", help="How uld orders the student's probabilities: fast, or exact (full sort). Default: fast."
)
@click.option("--prompt-loss", is_flag=True, default=None, help="Cross-entropy over the prompt's tokens too.")
@click.option("--separator", help="Text between prompt and target for the student. Default: as in the cache.")
@click.option(
    "--seq-len",
    type=int,
    help="Most tokens of an example in the student's own cut (of an encoder: of the prompt), and of a packed sequence. "
    "Default: the student's positions.",
)
@click.option("--target-len", type=int, help="Most tokens of a target in the student's own cut, EOS included.")
@click.option("--packing", is_flag=True, default=None, help="Several examples in one sequence; none sees another.")
@click.option("--top-k", type=int, help="Use fewer tokens per row than stored.")
@click.option("--epochs", type=float, help="Passes over the cache. Default: 1.")
@click.option("--max-steps", type=int, help="Optimizer steps; overrides --epochs.")
@click.option("--tokens-per-batch", type=int, help="Tokens per micro-batch and device. Default: 4096.")
@click.option(
    "--batch-size", type=int, help="Examples or packed sequences per micro-batch and device, instead of a token budget."
)
@click.option("--accumulate", type=int, help="Micro-batches per optimizer step. Default: 1.")
@click.option("--lr", type=float, help="Peak learning rate. Default: 5e-4.")
@click.option("--weight-decay", type=float, help="Default: 0.01.")
@click.option("--max-grad-norm", type=float, help="Gradient clipping. Default: 1.")
@click.option("--optimizer", help="adamw, adafactor or adamw8bit. Default: adamw.")
@click.option("--schedule", help="linear, cosine or constant. Default: linear.")
@click.option("--warmup", type=float, help="Steps, or a share of all steps when below 1. Default: 0.")
@click.option("--precision", help="bf16 (autocast) or fp32. Default: fp32.")
@click.option("--lora", type=int, metavar="R", help="Train LoRA adapters of rank R (peft), merged into the output.")
@click.option("--lora-targets", help="Modules to adapt, separated by commas. Default: by the student's family.")
@click.option("--gradient-checkpointing", is_flag=True, default=None, help="Trade time for memory.")
@click.option(
    "--head-chunk", type=int, help="Rows of the output layer computed at once. Default: by vocabulary and device."
)
@click.option("--revision", help="Branch, tag or commit of a hub student.")
@click.option("--tokenizer", help="Tokenizer of a random student.")
@click.option("--device", help="auto, cpu or cuda. Default: auto.")
@click.option("--seed", type=int, help="Of order, dropout and random weights. Default: 0.")
@click.option("--save-every", type=int, help="Steps between checkpoints; 0 = at the end only. Default: 0.")
@click.option("--log-every", type=int, help="Steps between lines of metrics.jsonl. Default: 10.")
@click.option("--report-to", help="A tracker transformers knows: tensorboard, wandb, …. Default: none.")
@click.option("--config", "config_file", type=PATH, help="YAML or JSON file with these settings; options override it.")
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in --out.")
@click.option("--eval-data", help="Held-out data spec: perplexity before and after, in the result and the model card.")
@click.option("--eval-split", help="Split of --eval-data.")
@click.option(
    "--eval-tasks",
    help="Tasks of kd eval, comma-separated, on the student while it learns: before the first step, every --eval-every, at the "
    "end. On --eval-data (instruction tasks in template 0); agreement on the cache.",
)
@click.option(
    "--eval-every", default="epoch", show_default=True, metavar="N|epoch", help="Steps between them, or epoch."
)
@click.option("--eval-limit", type=click.IntRange(min=1), help="First N examples of each of --eval-tasks.")
@click.option(
    "--eval-task-root", type=PATH, metavar="DIR", help="DIR/TASK/SPLIT.jsonl for --eval-tasks, instead of the hub."
)
@click.option("--eval-protocol", default="nanogpt", show_default=True, help="Of hellaswag: nanogpt or harness.")
@click.option(
    "--allow-contaminated",
    is_flag=True,
    help="Train on a benchmark's own text, or on what --eval-data asks; scores are then marked.",
)
@json_option
def train(
    config_file: Path | None,
    resume: bool,
    eval_data: str | None,
    eval_split: str | None,
    as_json: bool,
    eval_tasks: str | None,
    eval_every: str,
    eval_limit: int | None,
    eval_task_root: Path | None,
    eval_protocol: str,
    allow_contaminated: bool,
    **options: Any,
) -> None:
    """Train a student from a cache; the teacher is never loaded. Runs as is under accelerate launch or torchrun.

    Example: kd train --cache runs/cache --student demo --out runs/student --max-steps 20
    """
    quiet_libraries()
    from kd.student_trainer.config import config_from

    options["cache"] = ",".join(options["cache"]) or None
    if options["separator"] is not None:
        options["separator"] = unescaped(options["separator"])
    config = config_from(options, config_file)
    scores: list[tuple[str, str]] = []
    result: dict[str, Any] = {}
    from kd.evaluation.contamination import refuse_benchmark_text
    from kd.evaluation.midway_scores import plan_scores
    from kd.models.loading import ModelRequest

    student = "random:demo-student" if config.student == "demo" else config.student
    reason = refuse_benchmark_text(config.cache, allow=allow_contaminated)
    if reason is not None:
        result["contaminated"] = reason
    plan = None
    if eval_data or eval_tasks:  # also what is measured before and after alone must not be in the cache
        request = ModelRequest(student, config.revision, tokenizer=config.tokenizer, seed=config.seed)
        tasks = [t.strip() for t in (eval_tasks or "perplexity").split(",")]
        plan = plan_scores(
            request,
            config.cache,
            tasks,
            data=eval_data,
            split=eval_split,
            limit=eval_limit,
            task_root=eval_task_root,
            protocol=eval_protocol,
            allow_contaminated=allow_contaminated,
        )
    alone = eval_data is not None and not eval_tasks
    alike = {
        "data": eval_data,
        "split": eval_split,
        "device": config.device,
        "dtype": "float32",
        "allow_contaminated": True,
    }
    if alone:
        result["perplexity_before"] = held_out_perplexity(
            student, revision=config.revision, tokenizer=config.tokenizer, seed=config.seed, **alike
        )
    midway = None
    if eval_tasks and plan is not None:
        midway = partial(with_scores, plan, every_steps(eval_every))
    if resume and Path(config.out).is_dir() and not any(Path(config.out).glob("checkpoint-*")):
        click.echo(f"{config.out} holds no checkpoint: training starts from the first step", err=True)
    try:
        result = asdict(run_training(config, resume, midway)) | result
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(str(error) or "interrupted", "the same command with --resume continues") from None
    if "RANK" in os.environ:
        atexit.register(leave_group)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    if eval_tasks:
        from kd.student_trainer.run_folder import read_evaluations

        records = read_evaluations(Path(config.out))
        result["evaluations"] = records if as_json else len(records)
        scores = final_scores(records, eval_data)
    if alone:
        result["perplexity_after"] = held_out_perplexity(config.out, **alike)
        scores = [
            (f"perplexity on {eval_data}, {when}", f"{result[f'perplexity_{when}']:.3f}")
            for when in ("before", "after")
        ]
    from kd.student_trainer.model_card import write_card

    write_card(Path(config.out), scores)
    emit(result, as_json, f"{config.out}: trained")


def leave_group() -> None:
    """Leave the group of processes, if there is one, before the interpreter ends: torch's threads must not outlive it."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_training(config: Any, resume: bool = False, midway: Callable[[], Any] | None = None) -> Any:
    """Drive a training run and its progress bar to the end; `midway` makes what is scored while it runs."""
    from kd.student_trainer.training import train as run

    with progress_bar(f"training ({config.loss})") as advance:
        return run(
            config,
            resume=resume,
            midway=None if midway is None else midway(),
            stoppable=stop_on_signals(),
            on_step=lambda s: advance(s.step, s.steps_total, f"loss {s.loss:.4f}, {s.tokens_per_second:,.0f} tokens/s"),
        )


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; the second interrupts as ever."""
    stop = threading.Event()

    def handle(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        click.echo("stopping after this step, with a checkpoint; once more stops at once", err=True)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def with_scores(plan: ScorePlan, every: int | None) -> Midway:
    """Scores of `plan`, a line on stderr for each time."""
    from kd.evaluation.midway_scores import headline
    from kd.student_trainer.midway import Midway

    return Midway(plan.score, every, on_record=lambda record: click.echo(headline(record), err=True))


def every_steps(text: str) -> int | None:
    """Steps between evaluations; None for `epoch`. Raises click.UsageError for anything else."""
    if text == "epoch":
        return None
    if not text.isdigit() or int(text) < 1:
        raise click.UsageError(f"--eval-every {text}: expected a number of steps from 1, or epoch")
    return int(text)


def final_scores(records: list[dict[str, Any]], data: str | None) -> list[tuple[str, str]]:
    """(what, score before the first step and after the last) of each task's first metric, for the model card."""
    first, last = records[0], records[-1]
    shown = []
    for task, metrics in last["tasks"].items():
        name, figure = next(iter(metrics.items()))
        before = first["tasks"][task][name]["value"]
        known = [f"{v:.4g}" if v is not None else "not finite" for v in (before, figure["value"])]
        on = f" on {data}" if data and "text_digest" in last["settings"][task] else ""
        shown.append((f"{task}: {figure['title']}{on}", " → ".join(known)))
    return shown


def held_out_perplexity(model: str, **options: Any) -> float:
    """Perplexity of a model on a data spec, with a progress bar; options of `run_tasks`."""
    report = run_evaluation(model, ["perplexity"], **options)
    return float(report.tasks["perplexity"]["perplexity"]["value"])
