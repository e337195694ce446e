"""kd classify: sequence classifiers on GLUE."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from kd.commands.console import emit, emit_json, follow, progress_bar, quiet_libraries
from kd.commands.options import PATH, Function, json_option


@click.group()
def classify() -> None:
    """Fine-tune and score sequence classifiers on GLUE."""


def row_options(function: Function) -> Function:
    """Where rows come from."""
    for option in (
        click.option("--task-root", type=PATH, help="Folder of local rows, DIR/TASK/SPLIT.jsonl; the hub by default."),
        click.option("--limit", type=click.IntRange(min=1), help="First rows of a task alone."),
    ):
        function = option(function)
    return function


@classify.command("train")
@click.option("--task", help="cola, mnli, mrpc, qnli, qqp, rte or sst2; by default the last part of --data.")
@click.option("--data", help="glue/TASK (of the hub, or a folder), or a folder of rows with --task.")
@click.option(
    "--cache", help="Instead of rows: path, URL or fingerprint of a cache of a classifier's answers, rows included."
)
@click.option("--loss", help="With --cache: kl, reverse-kl, jsd, or ce: the same rows' labels alone. Default: kl.")
@click.option("--alpha", type=float, help="With --cache: weight of the distillation loss. Default: 1.")
@click.option(
    "--ce-weight", type=float, help="With --cache: weight of the cross-entropy with labels. Default: 1 - alpha."
)
@click.option(
    "--temperature", type=float, default=1.0, show_default=True, help="With --cache: one of the cache's grid."
)
@click.option(
    "--beta", type=float, default=0.5, show_default=True, help="With --loss jsd: weight of KL(teacher || mixture)."
)
@click.option("--model", required=True, help="Hub id, folder, or random:NAME; it gets a new head.")
@click.option("--out", required=True, help="Folder of the run.")
@row_options
@click.option("--split", default="train", show_default=True, help="Rows to train on: train or dev.")
@click.option("--epochs", type=float, default=3.0, show_default=True, help="Passes over the rows.")
@click.option("--max-steps", type=int, help="Optimizer steps; overrides --epochs.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Rows per micro-batch and device.")
@click.option("--accumulate", type=int, default=1, show_default=True, help="Micro-batches per optimizer step.")
@click.option("--lr", type=float, default=5e-5, show_default=True, help="Peak learning rate.")
@click.option("--weight-decay", type=float, default=0.0, show_default=True, help="Of AdamW.")
@click.option("--warmup", type=float, default=0.0, show_default=True, help="Steps, or a share of all when below 1.")
@click.option("--max-grad-norm", type=float, default=1.0, show_default=True, help="Gradient clipping.")
@click.option("--optimizer", default="adamw", show_default=True, help="adamw, adafactor or adamw8bit.")
@click.option("--schedule", default="linear", show_default=True, help="linear, cosine or constant.")
@click.option("--precision", default="fp32", show_default=True, help="bf16 (autocast) or fp32.")
@click.option("--max-length", type=int, default=512, show_default=True, help="Tokens of a row.")
@click.option("--pad-to-max", is_flag=True, help="Pad to --max-length, as the reference does; the logits are the same.")
@click.option(
    "--lora", type=int, metavar="R", help="Train LoRA adapters of rank R and the head, merged into the output."
)
@click.option("--lora-targets", help="Modules to adapt, separated by commas. Default: by the model's family.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--tokenizer", help="Tokenizer of a random model.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the new head, the order and dropout.")
@click.option("--log-every", type=int, default=50, show_default=True, help="Steps between lines of metrics.jsonl.")
@json_option
def classify_train(as_json: bool, **options: Any) -> None:
    """Train a classifier of one task from a language model: GPT-2, GPT-NeoX, Llama and other decoder-only layouts.

    From labels, or from another classifier's answers: kd cache build --teacher runs/sst2 --data glue/sst2 --out runs/soft, then
    --cache runs/soft.

    Example: kd classify train --task sst2 --model openai-community/gpt2 --out runs/sst2
    """
    quiet_libraries()
    from kd.student_trainer.classify.classifier_training import ClassifyConfig, train_classifier

    config = ClassifyConfig(**options)
    with progress_bar(f"training ({config.task or config.data or config.cache})") as advance:
        result = train_classifier(config, on_step=lambda s: advance(s.step, s.steps_total, f"loss {s.loss:.4f}"))
    emit(asdict(result), as_json, f"{config.out}: trained")


@classify.command("eval")
@click.argument("models", nargs=-1, required=True)
@click.option("--task", help="Of all models; by default each model's own (classify.json), or the last part of --data.")
@click.option("--data", help="glue/TASK (of the hub, or a folder), or a folder of rows with --task.")
@row_options
@click.option("--split", default="dev", show_default=True, help="Rows to score: dev (GLUE's validation) or train.")
@click.option("--max-length", type=int, default=512, show_default=True, help="Tokens of a row.")
@click.option("--tokens-per-batch", type=click.IntRange(min=1), default=4096, show_default=True, help="With padding.")
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@json_option
def classify_eval(models: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """Score classifiers: accuracy and loss, Matthews' correlation of CoLA, F1 of MRPC and QQP, with standard errors.

    Example: kd classify eval runs/sst2 --data glue/sst2
    """
    quiet_libraries()
    from kd.evaluation.merged.glue_scores import evaluate_classifier

    found = {}
    for model in models:
        last = follow(f"evaluating {model}", evaluate_classifier(model, **options), lambda p: (p.done, p.total, ""))
        assert last.result is not None
        found[model] = last.result
    if as_json:
        emit_json({model: result.to_dict() for model, result in found.items()})
        return
    for model, result in found.items():
        click.echo(f"{model}: {result.task}, {result.rows:,} rows")
        for line in result.lines():
            click.echo(f"  {line}")


@classify.command("matrix")
@click.option("--pool", required=True, type=PATH, help="YAML file of models named by their tasks (docs/merging.md).")
@click.option("--out", type=PATH, help="Folder for matrix.json and matrix.md.")
@row_options
@click.option("--max-length", type=int, default=512, show_default=True, help="Tokens of a row.")
@click.option("--tokens-per-batch", type=click.IntRange(min=1), default=4096, show_default=True, help="With padding.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu or cuda.")
@json_option
def classify_matrix(
    pool: Path,
    out: Path | None,
    task_root: Path | None,
    limit: int | None,
    max_length: int,
    tokens_per_batch: int,
    device: str,
    as_json: bool,
) -> None:
    """Score every backbone of a pool under every task's head: the table of cross-task transfer.

    Example: kd classify matrix --pool pool.yaml --task-root data/glue
    """
    quiet_libraries()
    from kd.evaluation.merged.glue_scores import cross_task_matrix, load_heads
    from kd.student_trainer.merging.pool import read_pool

    found = read_pool(pool)
    heads = load_heads(found, task_root=task_root, limit=limit, max_length=max_length, device=device)
    steps = cross_task_matrix(found, heads, tokens_per_batch=tokens_per_batch, device=device)
    last = follow("cross-task matrix", steps, lambda p: (p.done, p.total, "backbone and task"))
    assert last.result is not None
    if out is not None:
        last.result.save(out, "matrix")
    if as_json:
        emit_json(last.result.to_dict())
        return
    click.echo(last.result.markdown())
