"""Recipes: files that list the `kd` commands that reproduce a system, with variables that the user may set.

    about: one line
    variables: {teacher: google/flan-t5-xl, …}
    lists: {students: [{name: small, student: "{student}"}, …]}
    steps:
      - command: cache build
        arguments: [...]                 positional arguments, if any
        options: {teacher: "{teacher}", load-in-4bit: true, out: "{out}/cache"}
      - each: students                   the step once for every entry of a list
        command: train
        options: {student: "{student}", out: "{out}/{name}"}
      - command: report
        arguments: [{each: students, text: "{out}/{name}"}]

`{out}` is the folder of the run, and `{models}` the folder of the embedded models. Options have the names of the command
line; `true` and `false` are switches (`--flag`, `--no-flag`), also as the value of a variable. An option whose value is an
empty variable is left out, and so is an argument. An entry of a list is a mapping whose names are variables of its step, or a
text, which is `{each}`. An entry with an empty value is left out, and so is a step that has no argument left. A list as a value is
text with commas, or of a command in `TYPED` an option that is repeated.

Every command but `kd recipe` itself may be a step. `kd recipe show` prints the commands as they would be typed.
To add a recipe, put a file into `recipes/`, or pass any path.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.common.strangers.braces import fill, template_fields
from kd.common.strangers.yaml_file import read_mapping
from kd.recipes.steps import COMMANDS, TYPED, Step

FOLDER = Path(__file__).parent
MODELS = FOLDER.parent / "models"
MAX_OPTION = 2**13
"""Most characters of an option with its variables filled in; a path has at most 4,096."""
MAX_STEPS = 1000
"""Most steps of a recipe with its lists written out."""
EACH = "each"
"""Key of a step or an argument that is repeated, and the variable of a list of texts."""
Entry = Mapping[str, str]
"""An entry of a list: name of a variable -> its text, with variables in braces."""
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
    lists: Mapping[str, tuple[Entry, ...]] = field(default_factory=dict)
    """Name of a list -> its entries."""

    def fill(self, out: Path, variables: Mapping[str, str]) -> list[Step]:
        """The steps with their variables filled in. Raises DataError for a variable that the recipe does not have.

        out         folder of the run
        variables   name -> value; other variables keep their defaults
        """
        for name in variables:
            if name not in self.variables:
                raise unknown_name("variable of the recipe", name, self.variables, where=self.name)
        values = {"models": str(MODELS), **self.variables, **variables, "out": str(out)}
        steps: list[Step] = []
        for step in self.steps:
            steps += [one for filled in self._repeats(step, values) if (one := self._step(step, filled)) is not None]
            if len(steps) > MAX_STEPS:
                raise DataError("a recipe has too many steps", where=self.name, expected=f"at most {MAX_STEPS:,}")
        return steps

    def _repeats(self, part: Any, values: Mapping[str, str]) -> list[dict[str, str]]:
        """The variables of each repetition of a step or an argument: one where it names no list."""
        if not isinstance(part, Mapping) or EACH not in part:
            return [dict(values)]
        entries = [
            {name: self._filled(text, values) for name, text in entry.items()} for entry in self.lists[str(part[EACH])]
        ]
        return [{**values, **entry, "out": values["out"]} for entry in entries if all(entry.values())]

    def _step(self, step: Mapping[str, Any], values: Mapping[str, str]) -> Step | None:
        """One command; None where it had arguments and none of them is left."""
        given = step.get("arguments", ())
        arguments = tuple(text for one in given for text in self._argument(one, values) if text)
        if given and not arguments:
            return None
        command = str(step["command"])
        options: dict[str, str | bool | tuple[str, ...]] = {}
        for option, value in step.get("options", {}).items():
            if isinstance(value, list):
                texts = tuple(text for one in value if (text := self._filled(one, values)))
                value = texts if command in TYPED else ",".join(texts)
            filled = value if isinstance(value, bool | tuple) else self._filled(value, values)
            if filled not in ("", ()):
                options[str(option)] = SWITCHES.get(filled, filled) if isinstance(filled, str) else filled
        return Step(command, options, arguments, self.name, Path(values["out"]))

    def _argument(self, argument: Any, values: Mapping[str, str]) -> list[str]:
        text = argument.get("text", f"{{{EACH}}}") if isinstance(argument, Mapping) else argument
        return [self._filled(text, filled) for filled in self._repeats(argument, values)]

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
    lists = _lists(document, path)
    for step in steps:
        check_step(step, "recipe", path, lists)
    return Recipe(path.stem, str(document.get("about", "")), variables_of(document), tuple(steps), lists)


def check_step(step: Any, kind: str, where: Path, lists: Mapping[str, Any] | None = None) -> None:
    """Raise DataError for a step that is not a mapping with a known command.

    kind    `recipe` or `experiment`, for the error
    lists   the lists that a step of a recipe may be repeated for
    """
    command = step.get("command") if isinstance(step, dict) else step
    if not isinstance(step, dict) or not isinstance(command, str) or command not in COMMANDS:
        article = "an" if kind[0] in "aeiou" else "a"
        raise unknown_name(f"command in {article} {kind}", str(command), COMMANDS, where=where)
    for key, type_, expected in (("options", dict, "a mapping"), ("arguments", list, "a list")):
        if not isinstance(step.get(key, type_()), type_):
            given = f"{key}: {type(step[key]).__name__}"
            raise DataError(
                f"a step of the {kind} cannot be read", where=where, found=given, expected=f"{key}: {expected}"
            )
    keys = ("command", "options", "arguments", *([] if lists is None else [EACH]))
    for name in step:
        if name not in keys:
            raise unknown_name("key of a step", str(name), keys, where=where)
    repeated = [one for one in step.get("arguments", ()) if isinstance(one, dict)]
    for part in (*repeated, *([step] if EACH in step else [])):
        if part is not step and not set(part) <= {EACH, "text"}:
            raise DataError(
                "an argument cannot be read",
                where=where,
                found=f"{part!r:.60}",
                expected="a text, or {each: LIST, text: …}",
            )
        if str(part.get(EACH)) not in (lists or {}):
            raise unknown_name("list of the recipe", str(part.get(EACH)), list(lists or {}), where=where)


def _lists(document: Mapping[str, Any], where: Path) -> dict[str, tuple[Entry, ...]]:
    """The lists of a recipe. Raises DataError."""
    lists = document.get("lists") or {}
    plain = isinstance(lists, dict) and all(isinstance(entries, list) for entries in lists.values())
    if not plain or any(isinstance(entry, list) for entries in lists.values() for entry in entries):
        raise DataError("the lists of a recipe cannot be read", where=where, expected="lists: {NAME: [entry, …]}")
    read: dict[str, tuple[Entry, ...]] = {}
    for name, entries in lists.items():
        mappings = [entry if isinstance(entry, dict) else {EACH: entry} for entry in entries]
        read[str(name)] = tuple(variables_of({"variables": entry}) for entry in mappings)
    return read


def variables_of(document: Mapping[str, Any]) -> dict[str, str]:
    """The variables of a recipe or an experiment. YAML's null becomes the empty text; true and false become words."""
    texts = {None: "", True: "true", False: "false"}
    variables = document.get("variables") or {}
    if not isinstance(variables, dict) or any(isinstance(value, dict | list) for value in variables.values()):
        raise DataError(
            "the variables are not a mapping of texts", found=f"variables: {variables!r:.60}", expected="name: value"
        )
    return {str(k): texts[v] if v is None or isinstance(v, bool) else str(v) for k, v in variables.items()}
