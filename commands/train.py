"""kd train: a student from a cache."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from kd.commands.eval import run_evaluation
from kd.commands.terminal.console import emit, progress_bar, quiet_libraries, say
from kd.commands.terminal.options import dry_run_option, json_option
from kd.commands.terminal.settings_options import SettingsCommand, settings_options
from kd.common.disk.disk_errors import clear_write_errors
from kd.student_trainer.configuration.score_settings import ScoreSettings
from kd.student_trainer.configuration.train_config import TrainConfig

if TYPE_CHECKING:
    from kd.evaluation.midway_scores import ScorePlan
    from kd.student_trainer.midway import Midway


RESUME = "the same command with --resume continues"
"""What a user is told whose run was stopped."""


@dataclass(frozen=True)
class TrainCommand:
    """All settings of `kd train`: those of the training, and those of the scores beside it."""

    training: TrainConfig
    scores: ScoreSettings = field(default_factory=ScoreSettings)


@click.command(cls=SettingsCommand)
@settings_options(TrainCommand)
@click.option("--resume", is_flag=True, help="Continue from the last checkpoint in --out.")
@click.option("--estimate", is_flag=True, help="Make ten steps, print what the run will take, and keep nothing.")
@dry_run_option
@json_option
def train(settings: TrainCommand, resume: bool, estimate: bool, dry_run: bool, as_json: bool) -> None:
    """Train a student from a cache; the teacher is never loaded. Runs as is under accelerate launch or torchrun.

    Example: kd train --cache runs/cache --student demo --out runs/student --max-steps 20
    """
    if dry_run:
        print_planned_run(settings.training, as_json=as_json)
        return
    if estimate:
        print_estimate(settings.training, as_json=as_json)
        return
    train_student(settings.training, settings.scores, resume=resume, as_json=as_json)


def print_planned_run(config: TrainConfig, *, as_json: bool) -> None:
    """Print what a training would write."""
    quiet_libraries()
    from kd.student_trainer.training_estimate import plan_training

    emit(plan_training(config), as_json, f"{config.out}: nothing was written. A training would write")


def print_estimate(config: TrainConfig, *, as_json: bool) -> None:
    """Make the first steps of a run, and print what all of it will take."""
    quiet_libraries()
    from kd.student_trainer.training_estimate import estimate_training

    estimate = estimate_training(config, say=lambda sentence: say(sentence, err=True))
    emit(asdict(estimate), as_json, f"{config.model.student}: estimated from {estimate.measured_steps} steps")


def train_student(config: TrainConfig, scores: ScoreSettings, *, resume: bool, as_json: bool = False) -> None:
    """Train, score, write the model card and print the result: all of `kd train` after its options are read."""
    quiet_libraries()
    from kd.evaluation.contamination import refuse_benchmark_text

    result: dict[str, Any] = {}
    reason = refuse_benchmark_text(config.data.cache, allow=scores.allow_contaminated)
    if reason is not None:
        result["contaminated"] = reason
    plan = checked_plan(config, scores) if scores.tasks else None
    repository, main = config.weights.push_to_hub, int(os.environ.get("RANK", "0")) == 0
    alone = scores.eval_data is not None and not scores.eval_tasks
    if alone:
        result["perplexity_before"] = perplexity_before(config, scores)
    midway = None
    if scores.eval_tasks and plan is not None:
        midway = partial(with_scores, plan, scores)
    try:
        trained = asdict(run_training(config, resume, midway))
        result = {
            name: value for name, value in trained.items() if value is not None or name in ("kd", "aligned_share")
        } | result
    except KeyboardInterrupt as error:
        said = (*error.args, RESUME) if error.args else ("interrupted", RESUME)
        raise KeyboardInterrupt(*said[:2]) from None
    if "RANK" in os.environ:
        atexit.register(leave_group)
    if not main:
        return
    folder = Path(result["out"])
    card: list[tuple[str, str]] = []
    if scores.eval_tasks:
        from kd.student_trainer.run_folder import read_evaluations

        records = read_evaluations(folder)
        result["evaluations"] = records if as_json else len(records)
        card = final_scores(records, scores.eval_data)
    if alone:
        result["perplexity_after"] = held_out_perplexity(str(folder), **held_out(config, scores))
        card = [
            (f"perplexity on {scores.eval_data}, {when}", f"{result[f'perplexity_{when}']:.3f}")
            for when in ("before", "after")
        ]
    from kd.student_trainer.model_card import write_card
    from kd.student_trainer.saving.rescue import refuse_moved_run

    with clear_write_errors(folder, "make room; the weights are complete, the model card alone is missing"):
        write_card(folder, card)
    if repository is not None:
        from kd.student_trainer.saving.hub_upload import upload_student

        result["pushed_to"] = upload_student(folder, repository)
    emit(result, as_json, f"{folder}: trained")
    refuse_moved_run(config.folder, folder)


def checked_plan(config: TrainConfig, scores: ScoreSettings) -> ScorePlan:
    """What will be scored, its texts loaded and checked: none of them may be in the cache. Raises KdError."""
    from kd.evaluation.midway_scores import plan_scores
    from kd.models.model_request import ModelRequest
    from kd.student_trainer.prepare import reading_before_training

    model = config.model
    reading = reading_before_training(config)
    return plan_scores(
        ModelRequest(model.model_name, model.revision, tokenizer=model.tokenizer, seed=config.seed),
        config.data.cache,
        scores.tasks,
        data=scores.eval_data,
        split=scores.eval_split,
        limit=scores.eval_limit,
        task_root=scores.eval_task_root,
        protocol=scores.eval_protocol,
        bos=reading.bos,
        separator=reading.separator,
        control_tokens=reading.control_tokens,
        chat_template=config.text.chat_template,
        template_kwargs=reading.template_kwargs,
        system=reading.system,
        allow_contaminated=scores.allow_contaminated,
    )


def held_out(config: TrainConfig, scores: ScoreSettings) -> dict[str, Any]:
    """Settings of the evaluation for the perplexity before and after; that the text is not in the cache was checked."""
    from kd.student_trainer.prepare import reading_before_training

    reading = reading_before_training(config)
    return {
        "bos": reading.bos,
        "separator": reading.separator,
        "control_tokens": reading.control_tokens,
        "chat_template": config.text.chat_template,
        "template_kwargs": reading.template_kwargs,
        "system": reading.system,
        "data": scores.eval_data,
        "split": scores.eval_split,
        "device": config.model.device,
        "dtype": "float32",
        "allow_contaminated": True,
    }


def perplexity_before(config: TrainConfig, scores: ScoreSettings) -> float:
    """Perplexity of the student as it is loaded for training."""
    model = config.model
    start = {"revision": model.revision, "tokenizer": model.tokenizer, "seed": config.seed}
    return held_out_perplexity(model.model_name, **start, **held_out(config, scores))


def leave_group() -> None:
    """Leave the group of processes, if there is one: torch's threads must not outlive the interpreter."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_training(config: TrainConfig, resume: bool = False, midway: Callable[[], Any] | None = None) -> Any:
    """Drive a training run and its progress bar to the end; `midway` makes what is scored while it runs."""
    from kd.student_trainer.training import train as run

    # what a tracker prints is no result: stdout holds one document with --json
    with progress_bar(f"training ({config.objective.loss})") as advance, redirect_stdout(sys.stderr):
        return run(
            config,
            resume=resume,
            midway=None if midway is None else midway(),
            upload=False,
            stoppable=stop_on_signals(),
            say=lambda sentence: say(sentence, err=True),
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
        say("stopping after this step, with a checkpoint; once more stops at once", err=True)

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def with_scores(plan: ScorePlan, scores: ScoreSettings) -> Midway:
    """Scores of `plan`, a line on stderr for each time."""
    from kd.evaluation.midway_scores import headline
    from kd.student_trainer.midway import Midway
    from kd.student_trainer.saving.best_weights import ChosenFigure

    return Midway(
        plan.score,
        scores.steps_between,
        on_record=lambda record: say(headline(record), err=True),
        best=None if scores.best_task is None else ChosenFigure(scores.best_task, scores.best_metric),
        patience=scores.early_stop,
    )


def final_scores(records: list[dict[str, Any]], data: str | None) -> list[tuple[str, str]]:
    """(what, score before the first step and after the last) of each task's first metric, for the model card."""
    first, last = records[0], records[-1]
    shown = []
    for task, metrics in last["tasks"].items():
        name, figure = next(iter(metrics.items()))
        before = first["tasks"][task][name]["value"]
        values = [f"{v:.4g}" if v is not None else "not finite" for v in (before, figure["value"])]
        on = f" on {data}" if data and "text_digest" in last["settings"][task] else ""
        shown.append((f"{task}: {figure['title']}{on}", " → ".join(values)))
    return shown


def held_out_perplexity(model: str, **options: Any) -> float:
    """Perplexity of a model on a data spec, with a progress bar; `options` are settings of `EvalSettings`."""
    report = run_evaluation(model, ["perplexity"], **options)
    return float(report.tasks["perplexity"]["perplexity"]["value"])
