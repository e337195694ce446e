"""kd demo: build, train and evaluate on what comes with the package; the settings are in `recipes/demo_outcome.py`."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from kd.commands.cache import build_behind_a_bar
from kd.commands.console import emit_json, quiet_libraries
from kd.commands.eval import run_evaluation
from kd.commands.options import PATH, json_option
from kd.commands.train import run_training
from kd.common.extras import require


@click.command()
@click.option(
    "--out", type=PATH, default=Path("demo-out"), show_default=True, help="Folder for cache, runs and report."
)
@json_option
def demo(out: Path, as_json: bool) -> None:
    """Run the whole pipeline on the embedded teachers and texts, offline, in minutes.

    Example: kd demo --out demo-out
    """
    quiet_libraries()
    require("eval", "kd demo")
    from kd.cache_builder.upkeep.summary import cache_summary
    from kd.recipes import demo_outcome as settings
    from kd.student_trainer.model_card import write_card

    settings.require_fresh(out)
    started = time.perf_counter()
    measured: list[Any] = []
    for act in settings.acts():
        click.echo(f"== {act.title}", err=True)
        click.echo("1/3  the teacher runs once over the text; its soft targets go into a cache", err=True)
        built = build_behind_a_bar(act.build_settings(out))
        click.echo("2/3  students from one start, on the same text: without and with the teacher", err=True)
        results = {Path(config.out).name: run_training(config) for config in act.train_configs(out)}
        click.echo("3/3  scores on what no model was trained on", err=True)
        reports = {}
        for name, model in act.models(out).items():
            quantised = {"load_in_4bit": act.load_in_4bit and name == act.teacher_name}
            report = run_evaluation(model, list(act.tasks), **act.evaluation, **quantised)
            reports[name] = replace(report, model=name)
            reports[name].save(out / name)
            if name in results:
                write_card(out / name, settings.card_scores(reports[name]))
        measured.append(
            settings.ActResult(act, cache_summary(out / act.cache), built.tokens_per_second, results, reports)
        )
    outcome = settings.write_outcome(out, measured, seconds=time.perf_counter() - started)
    if as_json:
        emit_json(outcome)
        return
    click.echo("\n".join(settings.outcome_lines(measured, outcome)))
