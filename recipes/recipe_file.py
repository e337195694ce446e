"""Recipes: files that list the `kd` commands that reproduce a system, with variables that the user may set.

    about: one line
    variables: {teacher: google/flan-t5-xl, …}
    steps:
      - command: cache build
        arguments: [...]                 positional arguments, if any
        options: {teacher: "{teacher}", load-in-4bit: true, out: "{out}/cache"}

`{out}` is the folder of the run, and `{models}` the folder of the embedded models. Options have the names of the command
line; `true` and `false` are switches (`--flag`, `--no-flag`), also as the value of a variable. An option whose value is an
empty variable is left out. `kd recipe show` prints the commands as they would be typed.
To add a recipe, put a file into `recipes/`, or pass any path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.common.strangers.braces import fill, template_fields
from kd.common.strangers.yaml_file import read_mapping
from kd.recipes.steps import STEP_KINDS, Step

FOLDER = Path(__file__).parent
MODELS = FOLDER.parent / "models"
MAX_OPTION = 2**13
"""Most characters of an option with its variables filled in; a path has at most 4,096."""
SWITCHES = {"true": True, "false": False}


@dataclass(frozen=True)
class Recipe:
    """A recipe as written; `fill` puts the variables in."""

    name: str
    about: str
    variables: Mapping[str, str]
    """Name -> default; the empty text leaves out the options that use it."""
    steps: tuple[Mapping[str, Any], ...]
    """Steps of the file, with variables in braces."""

    def fill(self, out: Path, variables: Mapping[str, str]) -> list[Step]:
        """The steps with their variables filled in. Raises DataError for a variable that the recipe does not have.

        out         folder of the run
        variables   name -> value; other variables keep their defaults
        """
        for name in variables:
            if name not in self.variables:
                raise unknown_name("variable of the recipe", name, self.variables, where=self.name)
        values = {"models": str(MODELS), **self.variables, **variables, "out": str(out)}
        return [self._step(step, values) for step in self.steps]

    def _step(self, step: Mapping[str, Any], values: Mapping[str, str]) -> Step:
        arguments = tuple(self._filled(argument, values) for argument in step.get("arguments", ()))
        options: dict[str, str | bool] = {}
        for option, value in step.get("options", {}).items():
            text = value if isinstance(value, bool) else self._filled(value, values)
            if text != "":
                options[str(option)] = SWITCHES.get(text, text) if isinstance(text, str) else text
        return Step(str(step["command"]), options, arguments, self.name, Path(values["out"]))

    def _filled(self, value: Any, values: Mapping[str, str]) -> str:
        text = str(value)
        for name in template_fields(text, self.name):
            if name not in values:
                raise DataError(
                    "a recipe uses a variable it does not have",
                    where=self.name,
                    found=text,
                    expected=", ".join(values),
                )
        filled = fill(text, values)
        if len(filled) > MAX_OPTION:
            raise DataError(
                "an option is too long",
                where=self.name,
                found=f"{text[:60]}…",
                expected=f"at most {MAX_OPTION} characters",
            )
        return filled


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return names_in(FOLDER)


def names_in(folder: Path) -> list[str]:
    """Names of the files that come with the package."""
    return sorted(p.stem for p in folder.glob("*.yaml"))


def named_file(name: str, kind: str, folder: Path, *, try_: str) -> tuple[Path, dict[Any, Any]]:
    """Path and content of a file that is named by its path, or by its name in `folder`. Raises DataError.

    kind   `recipe` or `experiment`, for the error
    """
    path = as_path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = folder / f"{name}.yaml"
        if not os.path.exists(path):
            raise unknown_name(kind, name, names_in(folder), try_=try_)
    return path, read_mapping(path, kind)


def load_recipe(name: str) -> Recipe:
    """A recipe by name or path. Raises DataError."""
    path, document = named_file(name, "recipe", FOLDER, try_="kd recipe ls, or the path of a .yaml file")
    steps = document.get("steps")
    if not isinstance(steps, list) or not steps:
        raise DataError("this is not a recipe", where=path, expected="a mapping with about, variables and steps")
    for step in steps:
        check_step(step, "recipe", path)
    return Recipe(path.stem, str(document.get("about", "")), variables_of(document), tuple(steps))


def check_step(step: Any, kind: str, where: Path) -> None:
    """Raise DataError for a step that is not a mapping with a known command.

    kind   `recipe` or `experiment`, for the error
    """
    command = step.get("command") if isinstance(step, dict) else step
    if not isinstance(step, dict) or not isinstance(command, str) or command not in STEP_KINDS:
        article = "an" if kind[0] in "aeiou" else "a"
        raise unknown_name(f"command in {article} {kind}", str(command), STEP_KINDS, where=where)
    for key, type_, expected in (("options", dict, "a mapping"), ("arguments", list, "a list")):
        if not isinstance(step.get(key, type_()), type_):
            given = f"{key}: {type(step[key]).__name__}"
            raise DataError(
                f"a step of the {kind} cannot be read", where=where, found=given, expected=f"{key}: {expected}"
            )
    for name in step:
        if name not in ("command", "options", "arguments"):
            raise unknown_name("key of a step", str(name), ("command", "options", "arguments"), where=where)


def variables_of(document: Mapping[str, Any]) -> dict[str, str]:
    """The variables of a recipe or an experiment. YAML's null becomes the empty text; true and false become words."""
    texts = {None: "", True: "true", False: "false"}
    variables = document.get("variables") or {}
    if not isinstance(variables, dict) or any(isinstance(value, dict | list) for value in variables.values()):
        raise DataError(
            "the variables are not a mapping of texts", found=f"variables: {variables!r:.60}", expected="name: value"
        )
    return {str(k): texts[v] if v is None or isinstance(v, bool) else str(v) for k, v in variables.items()}
