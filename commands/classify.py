"""kd classify: sequence classifiers on GLUE."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from kd.commands.terminal.console import emit, emit_json, outcome, progress_bar, quiet_libraries, say
from kd.commands.terminal.options import dry_run_option, json_option
from kd.commands.terminal.settings_options import SettingsCommand, settings_options
from kd.evaluation.merged.merged_settings import ClassifierEvaluation, MatrixSettings
from kd.student_trainer.classify.classify_settings import ClassifyConfig


@click.group()
def classify() -> None:
    """Fine-tune and score sequence classifiers on GLUE."""


@classify.command("train", cls=SettingsCommand)
@settings_options(ClassifyConfig)
@dry_run_option
@json_option
def classify_train(settings: ClassifyConfig, dry_run: bool, as_json: bool) -> None:
    """Train a classifier of one task from a language model: GPT-2, GPT-NeoX, Llama and other decoder-only layouts.

    It learns from labels, or from the answers of another classifier: kd cache build --teacher runs/sst2 --data glue/sst2
    --out runs/soft, then --cache runs/soft.

    Example: kd classify train --task sst2 --model openai-community/gpt2 --out runs/sst2
    """
    quiet_libraries()
    from kd.student_trainer.classify.classifier_training import plan_classifier, train_classifier
    from kd.student_trainer.saving.rescue import refuse_moved_run

    if dry_run:
        emit(plan_classifier(settings), as_json, f"{settings.out}: nothing was written. A training would write")
        return
    rows = settings.rows
    with progress_bar(f"training ({rows.task or rows.data or rows.cache})") as advance:
        result = train_classifier(settings, on_step=lambda s: advance(s.step, s.steps_total, f"loss {s.loss:.4f}"))
    emit(asdict(result), as_json, f"{result.out}: trained")
    refuse_moved_run(Path(settings.out), Path(result.out))


@classify.command("eval", cls=SettingsCommand)
@click.argument("models", nargs=-1, required=True)
@settings_options(ClassifierEvaluation)
@json_option
def classify_eval(models: tuple[str, ...], settings: ClassifierEvaluation, as_json: bool) -> None:
    """Score classifiers: accuracy and loss, Matthews' correlation of CoLA, F1 of MRPC and QQP, with standard errors.

    Example: kd classify eval runs/sst2 --data glue/sst2
    """
    quiet_libraries()
    from kd.evaluation.merged.glue_scores import evaluate_classifier

    results = {}
    for model in models:
        results[model] = outcome(f"evaluating {model}", evaluate_classifier(model, settings))
    if as_json:
        emit_json({model: result.to_dict() for model, result in results.items()})
        return
    for model, result in results.items():
        say(f"{model}: {result.task}, {result.rows:,} rows")
        for line in result.lines():
            say(f"  {line}")


@classify.command("matrix", cls=SettingsCommand)
@settings_options(MatrixSettings)
@json_option
def classify_matrix(settings: MatrixSettings, as_json: bool) -> None:
    """Score every backbone of a pool under the head of every task: the table of cross-task transfer.

    Example: kd classify matrix --pool pool.yaml --task-root data/glue
    """
    quiet_libraries()
    from kd.evaluation.merged.glue_scores import cross_task_matrix, load_heads
    from kd.student_trainer.merging.pool import read_pool

    pool = read_pool(settings.pool)
    steps = cross_task_matrix(pool, load_heads(pool, settings.rows), settings.rows)
    table = outcome("cross-task matrix", steps)
    if settings.out is not None:
        table.save(settings.out, "matrix")
    if as_json:
        emit_json(table.to_dict())
        return
    say(table.markdown())
