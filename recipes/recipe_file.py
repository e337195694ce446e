"""Recipes: files that say which `kd` commands reproduce a system, with variables that the user may set.

    about: one line
    variables: {teacher: google/flan-t5-xl, …}
    steps:
      - command: cache build
        arguments: [...]                 positional ones, if any
        options: {teacher: "{teacher}", load-in-4bit: true, out: "{out}/cache"}

`{out}` is the folder of the run; `true` and `false` are flags (`--flag`, `--no-flag`); an option whose value is an empty
variable is left out. A recipe is run command by command, exactly as it would be typed: `kd recipe show` prints that.
Add one: a file in `recipes/`, or any path.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name

FOLDER = Path(__file__).parent
COMMANDS = ("cache build", "train", "eval", "report")


@dataclass(frozen=True)
class Recipe:
    """A recipe as written; `commands` fills in the variables."""

    name: str
    about: str
    variables: Mapping[str, str]
    steps: tuple[Mapping[str, Any], ...]

    def commands(self, out: Path, settings: Mapping[str, str]) -> list[list[str]]:
        """The words of each command. Raises DataError for a variable that the recipe does not have."""
        for key in settings:
            if key not in self.variables:
                raise unknown_name("variable of the recipe", key, self.variables, where=self.name)
        values = {**self.variables, **settings, "out": str(out)}
        return [self._words(step, values) for step in self.steps]

    def _words(self, step: Mapping[str, Any], values: Mapping[str, str]) -> list[str]:
        words = str(step["command"]).split()
        words += [self._filled(argument, values) for argument in step.get("arguments", ())]
        for option, value in step.get("options", {}).items():
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
                continue
            text = self._filled(value, values)
            if text:
                words += [f"--{option}", text]
        return words

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
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        if not path.exists():
            raise unknown_name("recipe", name, recipe_names(), try_="kd recipe ls, or the path of a .yaml file")
    document = read_mapping(path, "recipe")
    if not isinstance(document.get("steps"), list) or not document["steps"]:
        raise DataError("this is not a recipe", where=path, expected="a mapping with about, variables and steps")
    for step in document["steps"]:
        if not isinstance(step, dict) or step.get("command") not in COMMANDS:
            found = step.get("command") if isinstance(step, dict) else step
            raise unknown_name("command in a recipe", str(found), COMMANDS, where=str(path))
    return Recipe(path.stem, str(document.get("about", "")), variables_of(document), tuple(document["steps"]))


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
    """The variables of a recipe or an experiment; none is the empty text."""
    return {str(k): "" if v is None else str(v) for k, v in (document.get("variables") or {}).items()}
