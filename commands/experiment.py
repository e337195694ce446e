"""kd experiment: students with and without the teacher, over several seeds, and a paired test."""

from __future__ import annotations

import shlex
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd.commands.console import emit_json
from kd.commands.options import PATH, json_option
from kd.commands.recipe import parse_settings, run_step
from kd.common.extras import require

if TYPE_CHECKING:
    from kd.recipes.experiment_file import Experiment

STATE = "experiment.json"


def parse_seeds(_: click.Context, __: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    try:
        return None if value is None else tuple(int(v) for v in value.split(","))
    except ValueError as error:
        raise click.BadParameter("expected whole numbers separated by commas, e.g. 0,1,2") from error


@click.command()
@click.argument("name", metavar="FILE")
@click.option("--out", type=PATH, help="Folder of cache, runs, scores and report; runs/NAME by default.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    callback=parse_settings,
    help="Give a variable of the file another value; may be repeated.",
)
@click.option("--seeds", callback=parse_seeds, help="Other seeds than the file's, e.g. 0,1,2,3,4.")
@click.option("--plan", is_flag=True, help="Print the commands and run nothing.")
@json_option
def experiment(
    name: str, out: Path | None, settings: dict[str, str], seeds: tuple[int, ...] | None, plan: bool, as_json: bool
) -> None:
    """Train students with and without the teacher over several seeds from one cache, score both, and test the difference.

    FILE is a YAML file or the name of an experiment that comes with the package (kl-prose, uld-mini, kl-wikitext,
    uld-tasks). The same command again continues: what is finished is passed over, trainings are resumed; more seeds may
    be added.

    Example: kd experiment kl-prose --seeds 0,1 --out runs/kl-prose
    """
    from kd.recipes.experiment_file import load_experiment

    found = load_experiment(name)
    found = found if seeds is None else found.with_seeds(seeds)
    folder = out or Path("runs") / found.name
    commands = found.recipe.commands(folder, settings)
    check_commands(commands)
    if plan:
        if as_json:
            emit_json({"experiment": found.name, "about": found.about, "commands": commands})
        else:
            click.echo(f"# {found.about}\n" + "\n".join(shlex.join(["kd", *command]) for command in commands))
        return
    for extra in ("train", "eval"):
        require(extra, "kd experiment")
    with redirect_stdout(sys.stderr):  # what the steps print is progress here
        open_folder(found, folder, commands)
        for number, command in enumerate(commands, 1):
            click.echo(f"{number}/{len(commands)}  kd {shlex.join(command)}", err=True)
            if not finished(command):
                run_step(command)
        files, document = write_outcome(found, folder)
    if as_json:
        emit_json(document | {"files": files})
    else:
        click.echo(Path(files["markdown"]).read_text(encoding="utf-8"))
        click.echo(f"report: {files['page']}")


def check_commands(commands: list[list[str]]) -> None:
    """Refuse an unknown option, loss or task before the teacher is loaded, and not an hour later."""
    from kd.commands.settings_options import take_settings
    from kd.commands.train import TrainCommand
    from kd.evaluation.eval_settings import EvalSettings
    from kd.evaluation.evaluator import check_tasks

    root = click.get_current_context().find_root().command
    for words in commands:
        command, rest = root, words
        while isinstance(command, click.Group):
            command, rest = command.get_command(click.get_current_context(), rest[0]) or command, rest[1:]
        context = command.make_context(f"kd {shlex.join(words)}", list(rest), help_option_names=["-h", "--help"])
        if words[0] == "train":
            take_settings(TrainCommand, dict(context.params))
        elif words[0] == "eval":
            check_tasks(take_settings(EvalSettings, dict(context.params)))


def open_folder(found: Experiment, folder: Path, commands: list[list[str]]) -> None:
    """Write down which command makes which folder. Raises DataError where one was made by another command."""
    from kd.common.errors import DataError
    from kd.common.files import canonical_json, read_object, write_atomic
    from kd.recipes.experiment_file import out_of, refuse_other_commands

    state = folder / STATE
    steps = {str(Path(out_of(words)).relative_to(folder)): words for words in commands}
    before: dict[str, Any] = {}
    if state.exists():
        begun = {step: words for step, words in read_object(state)["steps"].items() if (folder / step).exists()}
        refuse_other_commands(begun, steps, folder)  # a step that failed before it wrote anything may be mended
        before = begun
    elif folder.exists() and any(folder.iterdir()):
        raise DataError("the output folder is not empty", where=folder, found=f"no {STATE}", try_="another --out")
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "format": "kd-experiment",
        "format_version": 1,
        "name": found.name,
        "about": found.about,
        "baseline": found.baseline,
        "seeds": list(found.seeds),
        "steps": before | steps,
    }
    write_atomic(state, canonical_json(document))


def finished(command: list[str]) -> bool:
    """Is this evaluation on disk already? (Caches and trainings know for themselves.)"""
    from kd.evaluation.results import EVAL
    from kd.recipes.experiment_file import out_of

    return command[0] == "eval" and (Path(out_of(command)) / EVAL).exists()


def write_outcome(found: Experiment, folder: Path) -> tuple[dict[str, str], dict[str, Any]]:
    """The report over teacher and students: its files, and what `report.json` says."""
    from dataclasses import asdict

    from kd.cache_builder.store.reader import CacheReader
    from kd.common.files import read_object
    from kd.evaluation.report.certainty import certainty, section
    from kd.evaluation.report.writing import write_report

    inputs = [folder / "teacher", *(folder / run for run in found.runs)]
    measured = certainty(CacheReader(folder / "cache"))
    after = [] if measured is None else [section(measured)]
    written = write_report(
        inputs, folder / "report", title=found.about or found.name, after=after, baseline=found.baseline
    )
    files = {name: str(path) for name, path in asdict(written).items() if path is not None}
    return files, read_object(written.json)
