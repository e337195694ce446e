"""Experiments: one file that says which students are trained from one cache, over which seeds, and how they are scored.

    about: one line
    seeds: [0, 1, 2]                              of weights drawn at random, of order and dropout
    variables: {data: demo}                       as in a recipe
    before: [{command: train, options: {…}}]      steps of a recipe that come first, e.g. to make the teacher
    cache: {teacher: demo, data: "{data}"}        options of kd cache build
    train: {student: demo, max-steps: 300}        options of kd train that all students share
    arms:                                         what each kind of student is told besides; the first is the baseline
      finetuned: {loss: ce}
      distilled: {loss: kl}
    evaluate: {tasks: perplexity, data: demo}     options of kd eval, or a list of several evaluations

An experiment is a recipe that was written out: `recipe` gives its commands, seed by seed and arm by arm, so that an
interrupted one has whole pairs. `{out}` holds `cache`, `teacher/eval`, `ARM-seedS` and `ARM-seedS/eval`.
Add one: a file in `recipes/experiments/`, or any path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.recipes.recipe_file import COMMANDS, Recipe, read_mapping, variables_of

FOLDER = Path(__file__).parent / "experiments"
KEYS = ("about", "seeds", "variables", "before", "cache", "train", "arms", "evaluate")
OWN = {"cache": ("out", "shard"), "train": ("out", "cache", "seed", "resume", "config"), "evaluate": ("out",)}
"""Part of the file -> options that the experiment sets itself."""
OF_THE_TEACHER = ("load-in-4bit", "dtype", "revision", "tokenizer", "device")
"""Options of a build that its teacher's evaluation needs too."""


@dataclass(frozen=True)
class Experiment:
    """An experiment as written."""

    name: str
    about: str
    seeds: tuple[int, ...]
    variables: Mapping[str, str]
    before: tuple[Mapping[str, Any], ...]
    cache: Mapping[str, Any]
    train: Mapping[str, Any]
    arms: Mapping[str, Mapping[str, Any]]
    """Name -> options; the first is the baseline."""
    evaluations: tuple[Mapping[str, Any], ...]

    @property
    def baseline(self) -> str:
        """The arm all others are compared with."""
        return next(iter(self.arms))

    @property
    def runs(self) -> list[str]:
        """Folders of the students under `{out}`, arm by arm."""
        return [f"{arm}-seed{seed}" for arm in self.arms for seed in self.seeds]

    @property
    def recipe(self) -> Recipe:
        """Every command of the experiment but the report."""
        steps = [*self.before, {"command": "cache build", "options": {**self.cache, "out": "{out}/cache"}}]
        quantised = {k: v for k, v in self.cache.items() if k in OF_THE_TEACHER}
        steps += self._scores(str(self.cache["teacher"]), "{out}/teacher", quantised)
        for seed in self.seeds:
            for arm, own in self.arms.items():
                out = f"{{out}}/{arm}-seed{seed}"
                options = {**self.train, **own, "cache": "{out}/cache", "seed": seed, "out": out}
                steps += [{"command": "train", "options": options}, *self._scores(out, out, {})]
        return Recipe(self.name, self.about, self.variables, tuple(steps))

    def with_seeds(self, seeds: Sequence[int]) -> Experiment:
        """The same over other seeds. Raises DataError for none, or for one that comes twice."""
        return replace(self, seeds=_seeds(list(seeds), self.name))

    def _scores(self, model: str, folder: str, more: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [
            {
                "command": "eval",
                "arguments": [model],
                "options": {**options, **more, "out": f"{folder}/eval{'' if number == 1 else f'-{number}'}"},
            }
            for number, options in enumerate(self.evaluations, 1)
        ]


def experiment_names() -> list[str]:
    """Names of the experiments that come with the package."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load_experiment(name: str) -> Experiment:
    """An experiment by name or path. Raises DataError, naming the key that is wrong."""
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name}.yaml"
        if not path.exists():
            raise unknown_name("experiment", name, experiment_names(), try_="the path of a .yaml file")
    document = read_mapping(path, "experiment")
    for key in document:
        if key not in KEYS:
            raise unknown_name("key of an experiment", str(key), KEYS, where=path)
    for key in ("cache", "train", "arms", "evaluate"):
        if not document.get(key):
            raise DataError("an experiment is not complete", where=path, found=f"no {key}", expected=", ".join(KEYS))
    evaluations = document["evaluate"] if isinstance(document["evaluate"], list) else [document["evaluate"]]
    arms, before = document["arms"], document.get("before") or []
    if not isinstance(arms, dict) or len(arms) < 2:
        raise DataError(
            "an experiment compares at least two arms",
            where=path,
            found=arms,
            expected="arms: {finetuned: {loss: ce}, distilled: {loss: kl}}",
        )
    parts = [
        ("cache", document["cache"]),
        ("train", document["train"]),
        *(("train", a or {}) for a in arms.values()),
        *(("evaluate", e) for e in evaluations),
    ]
    for part, options in parts:
        if not isinstance(options, dict):
            raise DataError("options are not a mapping", where=f"{path}: {part}", found=options)
        for option in options:
            if option in OWN[part]:
                raise DataError("the experiment sets this option itself", where=f"{path}: {part}", found=f"--{option}")
    if not document["cache"].get("teacher"):
        raise DataError("an experiment is not complete", where=path, found="no teacher in cache")
    for step in before if isinstance(before, list) else [before]:
        if not isinstance(step, dict) or step.get("command") not in COMMANDS:
            found = step.get("command") if isinstance(step, dict) else step
            raise unknown_name("command in an experiment", str(found), COMMANDS, where=path)
        if "out" not in (step.get("options") or {}):
            raise DataError(
                "a step before the cache has no folder of its own",
                where=path,
                found=step["command"],
                expected='options: {out: "{out}/…"}',
            )
    return Experiment(
        path.stem,
        str(document.get("about", "")),
        _seeds(document.get("seeds", [0, 1, 2]), path),
        variables_of(document),
        tuple(before),
        document["cache"],
        document["train"],
        {str(name): own or {} for name, own in arms.items()},
        tuple(evaluations),
    )


def _seeds(found: Any, where: object) -> tuple[int, ...]:
    whole = isinstance(found, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in found)
    if not whole or not found or len(set(found)) < len(found):
        raise DataError(
            "the seeds of an experiment are whole numbers, each once",
            where=where,
            found=found,
            expected="seeds: [0, 1, 2]",
        )
    return tuple(found)


def out_of(words: Sequence[str]) -> str:
    """The folder a command writes."""
    return words[list(words).index("--out") + 1]


def refuse_other_commands(before: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]], where: Path) -> None:
    """Raise DataError when a folder that was written by one command would now be taken for another's.

    before, now   folder -> words of its command; folders of one side alone (more seeds, another arm) do no harm
    """
    for folder, words in now.items():
        old = list(before.get(folder, words))
        if old != list(words):
            lost, new = ([w for w in a if w not in b] for a, b in ((old, list(words)), (list(words), old)))
            raise DataError(
                "this folder holds an experiment with other settings",
                where=where,
                differs=folder,
                before=json.dumps(lost),
                now=json.dumps(new),
                try_="another --out",
            )
