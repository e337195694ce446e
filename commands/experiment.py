"""kd experiment: students with and without the teacher, over several seeds, and a paired test."""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd.commands.eval import say_report
from kd.commands.recipe import echo_commands, run_commands, variables_option
from kd.commands.terminal.console import emit_json, say
from kd.commands.terminal.options import FOLDER, json_option
from kd.common.extras import require

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kd.evaluation.report.writing import ReportFiles
    from kd.recipes.experiment_file import Experiment
    from kd.recipes.steps import Step

STATE = "experiment.json"


def parse_seeds(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """`0,1,2` as numbers. Raises click.BadParameter."""
    try:
        return None if value is None else tuple(int(v) for v in value.split(","))
    except ValueError as error:
        raise click.BadParameter("expected whole numbers separated by commas, e.g. 0,1,2") from error


@click.command()
@click.argument("name", metavar="FILE")
@click.option("--out", type=FOLDER, help="Folder for cache, runs, scores and report. [default: runs/NAME]")
@variables_option
@click.option("--seeds", callback=parse_seeds, help="Seeds to use instead of the file's, e.g. 0,1,2,3,4.")
@click.option("--plan", is_flag=True, help="Print the commands and run nothing.")
@json_option
def experiment(
    name: str, out: Path | None, variables: dict[str, str], seeds: tuple[int, ...] | None, plan: bool, as_json: bool
) -> None:
    """Train students with and without the teacher over several seeds from one cache, score both, and test the difference.

    FILE is a YAML file, or the name of an experiment that comes with the package: kl-prose, bytes-prose, tails-prose,
    certain-prose, bytes-mini, text-prose, text-kl-prose, conditions-prose, curves-prose, reader-prose, merge-prose,
    answers-mini, unsure-mini, uld-mini, kl-wikitext, uld-tasks, demo-prose, demo-text, demo-chat, or one of FLAN's ablations
    (flan-clusters, flan-tasks, flan-templates, flan-instructions, flan-options, flan-scale). The same command again
    continues: it skips what is finished and resumes trainings. More seeds may be added.

    Example: kd experiment kl-prose --seeds 0,1 --out runs/kl-prose
    """
    from kd.recipes.experiment_file import load_experiment
    from kd.recipes.run_steps import check_steps

    chosen = load_experiment(name)
    chosen = chosen if seeds is None else chosen.with_seeds(seeds)
    folder = out or Path("runs") / chosen.name
    steps = chosen.recipe.fill(folder, variables)
    check_steps(steps)
    if plan:
        if as_json:
            commands = [step.words for step in steps]
            emit_json({"experiment": chosen.name, "about": chosen.about, "commands": commands})
        else:
            say(f"# {chosen.about}")
            echo_commands(steps)
        return
    for extra in ("train", "eval"):
        require(extra, "kd experiment")
    run_and_show(chosen, folder, steps, as_json=as_json)


def run_and_show(chosen: Experiment, folder: Path, steps: Sequence[Step], *, as_json: bool) -> None:
    """Run what is left of an experiment, and print its report."""
    from kd.common.disk.disk_errors import clear_write_errors

    with redirect_stdout(sys.stderr):  # what the steps print is progress here
        with clear_write_errors(folder, "make room or name another --out, then run the same command again"):
            open_folder(chosen, folder, steps)
        run_commands(steps, keep_scores=True)
        written, document = write_experiment_report(chosen, folder)
    if as_json:
        emit_json(document | {"files": written.paths()})
    else:
        say_report(written)
        say(f"report: {written.page}")


def open_folder(chosen: Experiment, folder: Path, steps: Sequence[Step]) -> None:
    """Record which command writes which folder. Raises DataError where another command wrote one of them."""
    from kd.common.errors import DataError
    from kd.common.files import canonical_json, read_object, write_atomic
    from kd.common.shown_text import redacted
    from kd.recipes.experiment_file import refuse_other_commands

    state = folder / STATE
    commands = {str(step.out.relative_to(folder)): redacted(step.words) for step in steps}
    before: dict[str, Any] = {}
    if state.exists():  # a step that failed before it wrote anything may be changed
        before = {name: words for name, words in read_object(state)["steps"].items() if (folder / name).exists()}
        refuse_other_commands(before, commands, folder)
    elif folder.exists() and any(folder.iterdir()):
        raise DataError("the output folder is not empty", where=folder, found=f"no {STATE}", try_="another --out")
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "format": "kd-experiment",
        "format_version": 1,
        "name": chosen.name,
        "about": chosen.about,
        "baseline": chosen.baseline,
        "seeds": list(chosen.seeds),
        "steps": before | commands,
    }
    write_atomic(state, canonical_json(document))


def write_experiment_report(chosen: Experiment, folder: Path) -> tuple[ReportFiles, dict[str, Any]]:
    """Write the report over teacher and students; returns it, and the document in `report.json`."""
    from kd.cache_builder.store.readers.reader import CacheReader
    from kd.common.files import read_object
    from kd.evaluation.report.certainty import certainty, section
    from kd.evaluation.report.writing import write_report
    from kd.recipes.sweep_curves import sweep_sections

    scored = [chosen.folders.teacher, *chosen.untrained_of.values(), *chosen.runs]
    measured = None if chosen.cache_by_arm else certainty(CacheReader(folder / chosen.folders.cache))
    inputs = [folder / name for name in scored]
    written = write_report(
        inputs,
        folder / "report",
        title=chosen.about or chosen.name,
        lead=sweep_sections(inputs, list(chosen.arms), folder / "report") if chosen.is_sweep else (),
        after=[] if measured is None else [section(measured)],
        baseline=chosen.baseline,
        other_students=chosen.is_sweep,
    )
    return written, read_object(written.json)
