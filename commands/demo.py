"""kd demo: two experiments on the texts and models that come with the package (`kd.recipes.demo_outcome`)."""

from __future__ import annotations

import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kd.commands.recipe import run_commands
from kd.commands.terminal.console import emit_json, quiet_libraries, say
from kd.commands.terminal.options import FOLDER, json_option
from kd.common.extras import require

if TYPE_CHECKING:
    from kd.recipes.demo_outcome import DemoPart, PartResult


@click.command()
@click.option(
    "--out", type=FOLDER, help="Folder for caches, runs and report. [default: demo-out; demo-chat-out with --chat]"
)
@click.option("--chat", is_flag=True, help="Distil a small chat model instead: the experiment demo-chat.")
@json_option
def demo(out: Path | None, chat: bool, as_json: bool) -> None:
    """Run the whole pipeline on the embedded teachers and texts, offline, in minutes.

    The demo is the experiments demo-prose and demo-text in one folder. With --chat it is the experiment demo-chat:
    conversations, a chat template, and students that learn the assistant's turns.

    Example: kd demo --out demo-out
    """
    quiet_libraries()
    require("eval", "kd demo")
    if chat:
        show_chat_demo(out or Path("demo-chat-out"), as_json=as_json)
    else:
        show_demo(out or Path("demo-out"), as_json=as_json)


def show_chat_demo(out: Path, *, as_json: bool) -> None:
    """Run the experiment demo-chat and print its report. The same command again continues."""
    from kd.commands.experiment import run_and_show
    from kd.recipes.experiment_file import load_experiment

    chosen = load_experiment("demo-chat")
    run_and_show(chosen, out, chosen.recipe.fill(out, {}), as_json=as_json)


def show_demo(out: Path, *, as_json: bool) -> None:
    """Run the two experiments of the demo, and print what they measured."""
    from kd.recipes.demo_outcome import (
        demo_parts,
        outcome_lines,
        reference_of_demo,
        require_fresh,
        write_demo_outcome,
    )

    parts = demo_parts(out)
    require_fresh(out, parts)
    started = time.perf_counter()
    try:
        with redirect_stdout(sys.stderr):  # what the steps print is progress here
            results = [run_part(part) for part in parts]
    except KeyboardInterrupt:  # a demo is measured as a whole, so it does not continue
        raise KeyboardInterrupt(
            "interrupted", f"remove {out}, or choose another --out, to run the demo again"
        ) from None
    reference = reference_of_demo(results)
    outcome = write_demo_outcome(out, results, reference, seconds=time.perf_counter() - started)
    if as_json:
        emit_json(outcome)
    else:
        say("\n".join(outcome_lines(results, reference, outcome)))


def run_part(part: DemoPart) -> PartResult:
    """Run one of the demo's experiments, and add the scores to the students' model cards."""
    from kd.cache_builder.upkeep.summary import cache_summary
    from kd.evaluation.results import load_report
    from kd.recipes.demo_outcome import PartResult, card_scores
    from kd.student_trainer.model_card import write_card

    say(f"== {part.title}", err=True)
    steps = part.steps
    done = run_commands(steps)
    built = done[next(n for n, step in enumerate(steps) if step.out == part.cache)]
    for run in part.experiment.runs:
        write_card(part.out / run, card_scores(load_report(part.out / run)))
    return PartResult(part, cache_summary(part.cache), built.tokens_per_second)
