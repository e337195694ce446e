"""kd recipe: the settings of the reference systems, command by command."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd.commands.terminal.console import emit, emit_json, say
from kd.commands.terminal.options import FOLDER, Function, json_option
from kd.common.errors import DataError
from kd.common.paths import as_path
from kd.recipes.steps import COMMANDS

if TYPE_CHECKING:
    from kd.cache_builder.build.builder import BuildProgress
    from kd.recipes.steps import Step


@click.group()
def recipe() -> None:
    """Run the settings of the reference systems, command by command."""


@recipe.command("ls")
@json_option
def recipe_ls(as_json: bool) -> None:
    """List the recipes.

    Example: kd recipe ls
    """
    from kd.recipes.recipe_file import load_recipe, recipe_names

    emit({name: load_recipe(name).about for name in recipe_names()}, as_json)


def parse_variables(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    """`NAME=VALUE` pairs as a mapping. Raises click.BadParameter."""
    pairs = [value.partition("=") for value in values]
    if any(not name or not sign for name, sign, _value in pairs):
        raise click.BadParameter("expected NAME=VALUE, e.g. student=EleutherAI/pythia-410m")
    return {name: value for name, _sign, value in pairs}


variables_option = click.option(
    "--set",
    "variables",
    multiple=True,
    metavar="NAME=VALUE",
    callback=parse_variables,
    help="Set a variable of the file; may be repeated.",
)


def recipe_options(function: Function) -> Function:
    """The argument and the options that `show` and `run` share."""
    for option in (
        json_option,
        variables_option,
        click.option("--out", type=FOLDER, help="Folder of the run. [default: runs/NAME]"),
        click.argument("name"),
    ):
        function = option(function)
    return function


@recipe.command("show")
@recipe_options
def recipe_show(name: str, out: Path | None, variables: dict[str, str], as_json: bool) -> None:
    """Print a recipe's commands as they would be typed.

    Example: kd recipe show neo-wikitext --set student=EleutherAI/pythia-160m
    """
    from kd.recipes.recipe_file import load_recipe

    chosen = load_recipe(name)
    steps = chosen.fill(out or Path("runs") / chosen.name, variables)
    if as_json:
        commands = [step.words for step in steps]
        emit_json(
            {"name": chosen.name, "about": chosen.about, "variables": dict(chosen.variables), "commands": commands}
        )
        return
    say(f"# {chosen.about}\n# variables: {', '.join(f'{k}={v}' for k, v in chosen.variables.items())}")
    echo_commands(steps)


def echo_commands(steps: Sequence[Step]) -> None:
    """Print the commands of steps as they would be typed."""
    for step in steps:
        say(shlex.join(["kd", *step.words]))


@recipe.command("run")
@recipe_options
def recipe_run(name: str, out: Path | None, variables: dict[str, str], as_json: bool) -> None:
    """Run a recipe. The same command again continues: it skips finished trainings and resumes others.

    Example: kd recipe run oscarnav-four --out runs/four
    """
    from kd.recipes.recipe_file import load_recipe

    chosen = load_recipe(name)
    folder = out or Path("runs") / chosen.name
    steps = chosen.fill(folder, variables)
    run_commands(steps)
    emit({"recipe": chosen.name, "out": str(folder), "steps": len(steps)}, as_json, f"{chosen.name}: done")


def run_commands(steps: Sequence[Step], *, keep_scores: bool = False) -> list[Any]:
    """Run steps as their commands run, with progress bars and printed results; see `kd.recipes.run_steps`."""
    from kd.recipes.run_steps import check_steps, run_steps
    from kd.recipes.steps import TYPED

    check_steps(steps)
    for step in steps:
        if step.command in TYPED:
            _parsed(step)
    return run_steps(steps, RUNNERS, keep_scores=keep_scores, say=lambda line: say(line, err=True))


def _build(step: Step) -> BuildProgress:
    from kd.cache_builder.build.build_settings import BuildSettings
    from kd.commands.cache import build_and_show

    profile_build = step.options.get("profile-build") is True
    return build_and_show(step.setting(BuildSettings), step.given, profile_build=profile_build)


def _train(step: Step) -> None:
    from kd.commands.train import train_student
    from kd.recipes.run_steps import is_begun
    from kd.student_trainer.configuration.score_settings import ScoreSettings
    from kd.student_trainer.configuration.train_config import TrainConfig

    resume = is_begun(step) or step.options.get("resume") is True
    train_student(step.setting(TrainConfig), step.setting(ScoreSettings), resume=resume)


def _eval(step: Step) -> None:
    from kd.commands.eval import score_and_show
    from kd.evaluation.eval_settings import EvalSettings

    score_and_show(step.arguments, step.setting(EvalSettings), step.out if "out" in step.options else None)


def _report(step: Step) -> None:
    from kd.commands.eval import report_and_show
    from kd.evaluation.report.systems.report_settings import ReportSettings

    report_and_show([as_path(run) for run in step.arguments], step.setting(ReportSettings))


def _typed(step: Step) -> None:
    """Run a step as it would be typed."""
    with _parsed(step) as context:
        context.command.invoke(context)


def _classifier(step: Step) -> None:
    """Train a classifier. One that was interrupted begins again: what it has logged is taken away."""
    from kd.student_trainer.run_folder import METRICS

    if step.out.is_dir() and [path.name for path in step.out.iterdir()] == [METRICS]:
        (step.out / METRICS).unlink()
    _typed(step)


def _parsed(step: Step) -> click.Context:
    """The command of a step with its words read. Raises DataError for words that it does not know."""
    context = click.get_current_context().find_root()
    command: click.Command | None = context.command
    words = step.command.split()
    for word in words:
        command = command.get_command(context, word) if isinstance(command, click.Group) else None
    assert command is not None, "every command of a step is a command of kd"
    try:
        return command.make_context(step.command, step.words[len(words) :], parent=context)
    except click.UsageError as error:
        raise DataError(
            "a step cannot be run", where=step.label, found=error.format_message(), try_=f"kd {step.command} --help"
        ) from error


RUNNERS: dict[str, Callable[[Step], Any]] = {
    **dict.fromkeys(COMMANDS, _typed),
    "cache build": _build,
    "train": _train,
    "eval": _eval,
    "report": _report,
    "classify train": _classifier,
}
"""Command of a step -> the function that runs it."""
