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

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.recipes.steps import STEP_KINDS, Step

FOLDER = Path(__file__).parent
MODELS = FOLDER.parent / "models"
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
        return Step(str(step["command"]), options, arguments, self.name)

    def _filled(self, value: Any, values: Mapping[str, str]) -> str:
        try:
            return str(value).format_map(values)
        except (KeyError, ValueError, IndexError) as error:
            raise DataError(
                "a recipe uses a variable it does not have",
                where=self.name,
                found=str(value),
                expected=", ".join(values),
            ) from error


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A recipe by name or path. Raises DataError."""
    path = as_path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        if not path.exists():
            raise unknown_name("recipe", name, recipe_names(), try_="kd recipe ls, or the path of a .yaml file")
    document = read_mapping(path, "recipe")
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
    if not isinstance(step, dict) or command not in STEP_KINDS:
        article = "an" if kind[0] in "aeiou" else "a"
        raise unknown_name(f"command in {article} {kind}", str(command), STEP_KINDS, where=where)


def read_mapping(path: Path, kind: str) -> dict[str, Any]:
    """A YAML mapping. Raises DataError saying what the file should have been."""
    import yaml

    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the {kind}", where=path, found=str(error).splitlines()[0]) from error
    if not isinstance(document, dict):
        raise DataError(
            f"this is not a{'n' if kind[0] in 'aeiou' else ''} {kind}",
            where=path,
            found=type(document).__name__,
            expected="a mapping",
        )
    return document


def variables_of(document: Mapping[str, Any]) -> dict[str, str]:
    """The variables of a recipe or an experiment. YAML's null becomes the empty text; true and false become words."""
    texts = {None: "", True: "true", False: "false"}
    variables = document.get("variables") or {}
    return {str(k): texts[v] if v is None or isinstance(v, bool) else str(v) for k, v in variables.items()}
