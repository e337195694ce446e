"""Experiments: files that say which students are trained, over which seeds, from which caches, and how they are scored.

    about: one line
    seeds: [0, 1, 2]                              seeds of random weights, order and dropout
    variables: {data: demo}                       as in a recipe
    before: [{command: train, options: {…}}]      steps of a recipe that run first, e.g. to make the teacher
    cache: {teacher: demo, data: "{data}"}        options of kd cache build
    caches: {narrow: {top-k: 4}}                  further caches of the same teacher and data: what differs from `cache`
    train: {student: demo, max-steps: 300}        options of kd train that all students share
    arms:                                         options of kd train for each kind of student; the first is the baseline
      finetuned: {loss: ce}
      distilled: {loss: kl}
    evaluate: {tasks: perplexity, data: demo}     options of kd eval, or a list of several evaluations
    folders: {student: "{arm}-seed{seed}"}        names of the folders, where they are not the usual ones (`Folders`)

In place of `arms`, a sweep makes an arm of every value of a parameter (`kd.recipes.sweeps`). The options of a sweep may be those of
the cache, and each arm then has a cache of its own:

    sweep: {arm: "templates-{value}", values: [1, 2, 4], cache: {first-templates: "{value}"}}
    untrained: true                               score each student before its training, too

An experiment becomes a recipe (`Experiment.recipe`). Its students are trained seed by seed, so that an interrupted experiment
has whole pairs. By default `{out}` holds `cache`, `teacher/eval`, `ARM-seedS` and `ARM-seedS/eval`. An arm with `cache: narrow`
reads that one of `caches`, which lies in `cache-narrow`.
To add an experiment, put a file into `recipes/experiments/`, or pass any path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.recipes.recipe_file import Recipe, check_step, named_file, names_in, variables_of
from kd.recipes.sweeps import arms_of_sweep

FOLDER = Path(__file__).parent / "experiments"
KEYS = (
    *("about", "seeds", "variables", "before", "cache", "caches", "train", "arms", "sweep", "untrained"),
    *("evaluate", "folders"),
)
RESERVED = {
    "cache": ("out", "shard"),
    "caches": ("out", "shard", "teacher", "data", "split", "seq-len", "separator", "tokenizer"),
    "train": ("out", "cache", "seed", "resume", "config"),
    "arms": ("out", "seed", "resume", "config"),
    "evaluate": ("out",),
}
"""Part of the file -> options that the experiment sets itself."""
MAX_STUDENTS = 1000
"""Most students of one experiment: arms times seeds."""
TEACHER_OPTIONS = ("load-in-4bit", "dtype", "revision", "tokenizer", "device")
"""Options of a build that the teacher's evaluation needs too."""
STUDENT_OPTIONS = ("tokenizer", "revision", "device")
"""Options of a training that the evaluation of an untrained student needs too."""
READING_OPTIONS = ("separator", "bos", "control-tokens")
"""Options of a build that the teacher's evaluation takes over where it names none: students are scored as they were trained."""


@dataclass(frozen=True)
class Folders:
    """Names of the folders that an experiment makes in its own."""

    cache: str = "cache"
    """Folder of the cache."""
    teacher: str = "teacher"
    """Folder that holds the teacher's scores."""
    student: str = "{arm}-seed{seed}"
    """Folder of a student; `{arm}` and `{seed}` are filled in."""
    scores: str = "eval"
    """Folder of scores in the teacher's and a student's folder; `.` is that folder itself."""

    def scores_in(self, folder: str, number: int) -> str:
        """The folder of the scores of evaluation `number`, counted from 1, of the model that belongs to `folder`."""
        if self.scores == ".":
            return folder
        return f"{folder}/{self.scores}" + ("" if number == 1 else f"-{number}")


@dataclass(frozen=True)
class Experiment:
    """An experiment as written."""

    name: str
    about: str
    seeds: tuple[int, ...]
    variables: Mapping[str, str]
    before: tuple[Mapping[str, Any], ...]
    """Steps of a recipe that run before the cache is built."""
    cache: Mapping[str, Any]
    """Options of kd cache build."""
    train: Mapping[str, Any]
    """Options of kd train that all students share."""
    arms: Mapping[str, Mapping[str, Any]]
    """Name of an arm -> its options of kd train; the first arm is the baseline."""
    evaluations: tuple[Mapping[str, Any], ...]
    """Options of kd eval, of each evaluation."""
    folders: Folders = field(default_factory=Folders)
    caches: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Name of a further cache -> the options of kd cache build in which it differs from `cache`."""
    untrained: bool = False
    """Whether each student is also scored before its training."""
    is_sweep: bool = False
    """Whether the arms are values of a parameter: they are compared though caches and students differ."""

    def __post_init__(self) -> None:
        if len(self.arms) * len(self.seeds) > MAX_STUDENTS:
            raise DataError(
                "an experiment trains too many students",
                where=self.name,
                found=f"{len(self.arms):,} arms, {len(self.seeds):,} seeds",
                expected=f"at most {MAX_STUDENTS:,} students",
            )
        for name in (*self.cache_folders.values(), self.folders.teacher, self.folders.scores, *self.runs):
            if name.startswith(("/", "~")) or ".." in name.split("/"):
                raise DataError(
                    "a folder leaves the experiment's", where=self.name, found=name, expected="a plain name"
                )
        if len(set(self.runs)) < len(self.runs):
            raise DataError(
                "two students of the experiment would share a folder",
                where=self.name,
                found=f"folders: student: {self.folders.student}",
                expected="{arm}, and {seed} where there are several seeds",
            )
        if self.folders.scores == "." and len(self.evaluations) > 1:
            raise DataError(
                "several evaluations would share a folder",
                where=self.name,
                found="folders: scores: .",
                expected="a name such as eval",
            )

    @property
    def baseline(self) -> str:
        """The arm that all others are compared with."""
        return next(iter(self.arms))

    @property
    def runs(self) -> list[str]:
        """Folders of the students in the experiment's folder, arm by arm."""
        return [self.run_of(arm, seed) for arm in self.arms for seed in self.seeds]

    @property
    def cache_folders(self) -> dict[str | None, str]:
        """Name of a cache (None: the one that arms read by default) -> its folder in the experiment's folder."""
        names: list[str | None] = [*([] if self.cache_by_arm else [None]), *self.caches]
        return {name: self.folders.cache + ("" if name is None else f"-{name}") for name in names}

    @property
    def cache_by_arm(self) -> bool:
        """Whether every arm of a sweep has a cache of its own, so that there is no other."""
        return self.is_sweep and bool(self.caches)

    @property
    def untrained_of(self) -> dict[str, str]:
        """Student as the arms name it -> folder of its scores before the training, where these are asked for."""
        if not self.untrained:
            return {}
        arm_of: dict[str, str] = {}
        for arm, options in self.arms.items():
            arm_of.setdefault(str({**self.train, **options}.get("student")), arm)
        return {name: f"untrained-{arm}" if len(arm_of) > 1 else "untrained" for name, arm in arm_of.items()}

    def run_of(self, arm: str, seed: int) -> str:
        """Folder of one student in the experiment's folder."""
        return self.folders.student.replace("{arm}", arm).replace("{seed}", str(seed))

    @property
    def recipe(self) -> Recipe:
        """All steps of the experiment except its report."""
        caches = {name: f"{{out}}/{folder}" for name, folder in self.cache_folders.items()}
        steps = list(self.before)
        for name, out in caches.items():
            differs = {} if name is None else self.caches[name]
            steps.append({"command": "cache build", "options": {**self.cache, **differs, "out": out}})
        of_teacher = {k: v for k, v in self.cache.items() if k in TEACHER_OPTIONS}
        reading = {k: v for k, v in self.cache.items() if k in READING_OPTIONS}
        steps += self._scores(str(self.cache["teacher"]), f"{{out}}/{self.folders.teacher}", of_teacher, reading)
        of_student = {k: v for k, v in self.train.items() if k in STUDENT_OPTIONS}
        for student, folder in self.untrained_of.items():
            steps += self._scores(student, f"{{out}}/{folder}", of_student, reading)
        for seed in self.seeds:
            for arm, arm_options in self.arms.items():
                out = f"{{out}}/{self.run_of(arm, seed)}"
                cache = caches[arm_options.get("cache")]
                options = {**self.train, **arm_options, "cache": cache, "seed": seed, "out": out}
                steps += [{"command": "train", "options": options}, *self._scores(out, out)]
        return Recipe(self.name, self.about, self.variables, tuple(steps))

    def with_seeds(self, seeds: Sequence[int]) -> Experiment:
        """The same experiment over other seeds. Raises DataError for no seed, or for one that comes twice."""
        return replace(self, seeds=_seeds(list(seeds), self.name))

    def _scores(
        self,
        model: str,
        folder: str,
        more: Mapping[str, Any] = MappingProxyType({}),
        otherwise: Mapping[str, Any] = MappingProxyType({}),
    ) -> list[dict[str, Any]]:
        """Steps that score a model: options of the evaluations, `more` over them, `otherwise` where they say nothing."""
        return [
            {
                "command": "eval",
                "arguments": [model],
                "options": {**otherwise, **options, **more, "out": self.folders.scores_in(folder, number)},
            }
            for number, options in enumerate(self.evaluations, 1)
        ]


def experiment_names() -> list[str]:
    """Names of the experiments that come with the package."""
    return names_in(FOLDER)


def load_experiment(name: str) -> Experiment:
    """An experiment by name or path. Raises DataError, naming the key that is wrong."""
    path, document = named_file(name, "experiment", FOLDER, try_="the path of a .yaml file")
    for key in document:
        if key not in KEYS:
            raise unknown_name("key of an experiment", str(key), KEYS, where=path)
    for key in ("cache", "train", "evaluate"):
        if not document.get(key):
            raise DataError("an experiment is not complete", where=path, found=f"no {key}", expected=", ".join(KEYS))
    arms, own_caches = _arms(document, path)
    evaluations = document["evaluate"] if isinstance(document["evaluate"], list) else [document["evaluate"]]
    _check_options("cache", [document["cache"]], path)
    _check_options("train", [document["train"]], path)
    _check_options("arms", [*arms.values()], path)
    _check_options("cache", list(own_caches.values()), path)
    caches = own_caches or _caches(document.get("caches") or {}, arms, path)
    _check_options("evaluate", evaluations, path)
    if not document["cache"].get("teacher"):
        raise DataError("an experiment is not complete", where=path, found="no teacher in cache")
    return Experiment(
        path.stem,
        str(document.get("about", "")),
        _seeds(document.get("seeds", [0, 1, 2]), path),
        variables_of(document),
        _steps_before(document.get("before") or [], path),
        document["cache"],
        document["train"],
        arms,
        tuple(evaluations),
        _folders(document.get("folders") or {}, path),
        caches,
        _is_true(document.get("untrained", False), path),
        "sweep" in document,
    )


def _arms(document: Mapping[Any, Any], path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arm -> its options of kd train, and for a sweep over caches arm -> its options of kd cache build. Raises DataError."""
    if "sweep" in document:
        if "arms" in document or "caches" in document:
            raise DataError("a sweep makes the arms and their caches", where=path, found="sweep, and arms or caches")
        return arms_of_sweep(document["sweep"], path)
    if not isinstance(document.get("arms"), dict) or len(document["arms"]) < 2:
        raise DataError(
            "an experiment compares at least two arms",
            where=path,
            found=document.get("arms", "no arms"),
            expected="arms: {finetuned: {loss: ce}, distilled: {loss: kl}}, or a sweep",
        )
    return {str(arm): options or {} for arm, options in document["arms"].items()}, {}


def _is_true(value: Any, path: Path) -> bool:
    if not isinstance(value, bool):
        raise DataError("this is true or false", where=f"{path}: untrained", found=value)
    return value


def _caches(caches: Any, arms: Mapping[str, Mapping[str, Any]], path: Path) -> dict[str, Mapping[str, Any]]:
    """The further caches by name. Raises DataError for options that make another text, and for a name that no arm knows."""
    if not isinstance(caches, dict):
        raise DataError(
            "the caches are not a mapping", where=f"{path}: caches", found=caches, expected="{narrow: {top-k: 4}}"
        )
    _check_options("caches", list(caches.values()), path)
    for arm, options in arms.items():
        if "cache" in options and options["cache"] not in caches:
            raise unknown_name(f"cache of the arm {arm}", str(options["cache"]), list(map(str, caches)), where=path)
    return {str(name): options for name, options in caches.items()}


def _check_options(part: str, mappings: Sequence[Any], path: Path) -> None:
    """Raise DataError for options that are not a mapping, or that the experiment sets itself."""
    for options in mappings:
        if not isinstance(options, dict):
            raise DataError("options are not a mapping", where=f"{path}: {part}", found=options)
        for option in options:
            if str(option).replace("_", "-") in RESERVED[part]:
                raise DataError("the experiment sets this option itself", where=f"{path}: {part}", found=f"--{option}")


def _steps_before(steps: Any, path: Path) -> tuple[Mapping[str, Any], ...]:
    steps = steps if isinstance(steps, list) else [steps]
    for step in steps:
        check_step(step, "experiment", path)
        if "out" not in (step.get("options") or {}):
            raise DataError(
                "a step before the cache has no folder of its own",
                where=path,
                found=step["command"],
                expected='options: {out: "{out}/…"}',
            )
    return tuple(steps)


def _folders(values: Any, path: Path) -> Folders:
    names = [f.name for f in fields(Folders)]
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise DataError("the folders are not a mapping of names", where=f"{path}: folders", found=values)
    for name in values:
        if name not in names:
            raise unknown_name("folder of an experiment", str(name), names, where=path)
    return Folders(**values)


def _seeds(seeds: Any, where: object) -> tuple[int, ...]:
    whole = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not whole or not seeds or len(set(seeds)) < len(seeds):
        raise DataError(
            "the seeds of an experiment are whole numbers, each once",
            where=where,
            found=seeds,
            expected="seeds: [0, 1, 2]",
        )
    return tuple(seeds)


def refuse_other_commands(before: Mapping[str, Sequence[str]], now: Mapping[str, Sequence[str]], where: Path) -> None:
    """Raise DataError when a folder that one command wrote would be used for another command.

    before, now   folder -> words of its command. Folders that only one of them has are allowed: more seeds, another arm.
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
