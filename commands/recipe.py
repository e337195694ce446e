"""kd recipe: the reference systems' settings, command by command."""

from __future__ import annotations

import json
from pathlib import Path

import click

from kd.commands.console import emit, emit_json
from kd.commands.options import PATH, Function, json_option


@click.group()
def recipe() -> None:
    """Run the reference systems' settings, command by command."""


@recipe.command("ls")
@json_option
def recipe_ls(as_json: bool) -> None:
    """List the recipes.

    Example: kd recipe ls
    """
    from kd.recipes.recipe_file import load_recipe, recipe_names

    emit({name: load_recipe(name).about for name in recipe_names()}, as_json)


def recipe_options(function: Function) -> Function:
    """What `show` and `run` share."""
    for option in (
        json_option,
        click.option(
            "--set",
            "settings",
            multiple=True,
            metavar="NAME=VALUE",
            callback=parse_settings,
            help="Give a variable of the recipe another value; may be repeated.",
        ),
        click.option("--out", type=PATH, help="Folder of the run; runs/NAME by default."),
        click.argument("name"),
    ):
        function = option(function)
    return function


def parse_settings(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
    pairs = [value.partition("=") for value in values]
    if any(not name or not sign for name, sign, _value in pairs):
        raise click.BadParameter("expected NAME=VALUE, e.g. student=EleutherAI/pythia-410m")
    return {name: value for name, _sign, value in pairs}


@recipe.command("show")
@recipe_options
def recipe_show(name: str, out: Path | None, settings: dict[str, str], as_json: bool) -> None:
    """Print a recipe's commands, as one would type them.

    Example: kd recipe show neo-wikitext --set student=EleutherAI/pythia-160m
    """
    import shlex

    from kd.recipes.recipe_file import load_recipe

    found = load_recipe(name)
    commands = found.commands(out or Path("runs") / found.name, settings)
    if as_json:
        emit_json({"name": found.name, "about": found.about, "variables": dict(found.variables), "commands": commands})
        return
    click.echo(f"# {found.about}\n# variables: {', '.join(f'{k}={v}' for k, v in found.variables.items())}")
    for command in commands:
        click.echo(shlex.join(["kd", *command]))


@recipe.command("run")
@recipe_options
def recipe_run(name: str, out: Path | None, settings: dict[str, str], as_json: bool) -> None:
    """Run a recipe. The same command again continues: finished trainings are passed over, others resumed.

    Example: kd recipe run oscarnav-four --out runs/four
    """
    from kd.recipes.recipe_file import load_recipe

    found = load_recipe(name)
    folder = out or Path("runs") / found.name
    commands = found.commands(folder, settings)
    for number, command in enumerate(commands, 1):
        click.echo(f"{number}/{len(commands)}  kd {' '.join(command)}", err=True)
        run_step(command)
    emit({"recipe": found.name, "out": str(folder), "steps": len(commands)}, as_json, f"{found.name}: done")


def run_step(command: list[str]) -> None:
    """One command of a recipe; a training run that is finished is passed over, one that was begun is resumed."""
    if command[0] == "train":
        state = Path(command[command.index("--out") + 1]) / "run.json"
        if state.exists():
            if json.loads(state.read_text(encoding="utf-8")).get("complete"):
                return
            command = [*command, "--resume"]
    try:
        click.get_current_context().find_root().command.main(args=command, standalone_mode=False)
    except click.exceptions.Abort:  # how a single training goes on is not how the recipe does
        raise KeyboardInterrupt from None
