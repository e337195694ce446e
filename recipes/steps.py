"""A step of a recipe or an experiment: one `kd` command, as it would be typed and as the settings that it runs with.

    step = Step("cache build", {"teacher": "demo", "data": "demo", "out": "runs/cache"})
    step.words        ["cache", "build", "--teacher", "demo", "--data", "demo", "--out", "runs/cache"]
    step.settings     the command's settings objects, by class

A step of a command in `STEP_KINDS` is checked by its settings before anything runs; those of the four chief commands run through
them (`kd.recipes.run_steps`). All others run as they would be typed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.common.setting_fields import settings_of
from kd.common.setting_values import Setting, as_text
from kd.common.settings import flattened, make
from kd.common.strangers.plain_files import is_inside
from kd.common.strangers.yaml_file import read_settings

T = TypeVar("T")
Options = Mapping[str, str | bool | tuple[str, ...]]
"""Option without its dashes -> its value as text, true or false for a switch, or several texts for one that is repeated."""


WRITTEN = ("out", "rescue_dir", "rescue-dir", "html", "plots", "log-file")
"""Options that name a folder or a file to write to."""
WRITTEN_ARGUMENTS = {"cache pull": 1, "cache push": 1, "cache repair": 0, "cache unlock": 0}
"""Command -> number of the argument that names what it writes to or changes."""
FOLDERS_OF_THEIR_OWN = ("demo", "experiment")
"""Commands that write to the working directory where no folder is named."""


@dataclass(frozen=True)
class StepKind:
    """The options of a command."""

    classes: Callable[[], Sequence[type]]
    """The classes of its settings. A function, so that they are imported on first use."""
    plain: tuple[str, ...] = ()
    """Options that belong to the command and to no settings."""


@dataclass(frozen=True)
class Step:
    """One command with its options."""

    command: str
    """A key of `STEP_KINDS`, or one of `TYPED`."""
    options: Options
    arguments: tuple[str, ...] = ()
    """Positional arguments."""
    where: str = ""
    """Name of the recipe or experiment, for errors."""
    folder: Path | None = None
    """The folder that everything is written below: a recipe may be a stranger's. None allows any."""

    @property
    def words(self) -> list[str]:
        """The command as it would be typed, without `kd`."""
        words = [*self.command.split(), *self.arguments]
        for option, value in self.options.items():
            if isinstance(value, bool):
                words.append(f"--{option}" if value else f"--no-{option}")
            else:
                words += [word for one in texts_of(value) for word in (f"--{option}", one)]
        return words

    @property
    def out(self) -> Path:
        """The folder that the step writes. A step without `out` has none and raises KeyError."""
        return as_path(str(self.options["out"]))

    @property
    def given(self) -> dict[str, str | bool]:
        """Field -> the value that was given for it, as it would be typed. Raises DataError for an unknown option."""
        return {name: as_text(value) for part in self._parts.values() for name, value in part.items()}

    @cached_property
    def settings(self) -> Mapping[type, Any]:
        """Class -> the settings of the command. Raises DataError for an unknown option, with the nearest, or a wrong value.

        Options override the file that `config` names, as on the command line.
        """
        return {cls: make(cls, part, where=self.label, typed=True) for cls, part in self._parts.items()}

    @property
    def label(self) -> str:
        """The recipe and the command, for errors."""
        return f"{self.where}: kd {self.command}".removeprefix(": ")

    @cached_property
    def _parts(self) -> dict[type, dict[str, Any]]:
        """Settings class -> given values by field, unchecked; options override the file of `config`."""
        kind = STEP_KINDS.get(self.command)
        if kind is None:
            self._refuse_outside(self.options)
            return {}
        parts = by_class(kind.classes(), self.options, (*kind.plain, "config"), self.label)
        if "config" in self.options:
            file = as_path(str(self.options["config"]))
            from_file = by_class(kind.classes(), read_settings(file), (), str(file))
            parts = {cls: from_file[cls] | part for cls, part in parts.items()}
        self._refuse_outside(
            {**self.options, **{name: value for part in parts.values() for name, value in part.items()}}
        )
        return parts

    def _refuse_outside(self, values: Mapping[str, Any]) -> None:
        """Raise DataError for a place to write to that is not below `folder`."""
        if self.folder is None:
            return
        places = {name: str(one) for name in WRITTEN if name in values for one in texts_of(values[name])}
        number = WRITTEN_ARGUMENTS.get(self.command)
        if number is not None and number < len(self.arguments):
            address = self.arguments[number].removeprefix("file://")
            if "://" not in address:  # what is sent elsewhere is said by the command
                places["argument"] = address
        for name, address in places.items():
            if not is_inside(as_path(address), self.folder):
                raise DataError(
                    "a step writes outside of the recipe's folder",
                    where=self.label,
                    found=f"{name}: {address}",
                    expected=f"{self.folder}/…",
                    try_="{out}/NAME in the file, or the command itself",
                )
        if self.command in FOLDERS_OF_THEIR_OWN and "out" not in values:
            raise DataError(
                "a step has no folder of its own",
                where=self.label,
                found="no out",
                expected='options: {out: "{out}/…"}',
            )

    def setting(self, cls: type[T]) -> T:
        """The settings of one class. Raises DataError as `settings` does."""
        settings: T = self.settings[cls]
        return settings


def texts_of(value: Any) -> tuple[Any, ...]:
    """The values of an option: several for one that is repeated."""
    return value if isinstance(value, tuple) else (value,)


def by_class(
    classes: Sequence[type], values: Mapping[str, Any], plain: Sequence[str], where: str
) -> dict[type, dict[str, Any]]:
    """Settings class -> those of `values` that it has, by field. Raises DataError for a name that no class has.

    plain   names that belong to no class and are left out
    """
    owners = {name: cls for cls in classes for one in settings_of(cls).values() for name in _names(one)}
    options = {one.option.removeprefix("--") for cls in classes for one in settings_of(cls).values()}
    parts: dict[type, dict[str, Any]] = {cls: {} for cls in classes}
    for option, value in values.items():
        name = option.replace("-", "_")
        if name in owners:
            parts[owners[name]] |= flattened(owners[name], {name: value}, where=where)
        elif option not in plain:
            raise unknown_name("option", option, {*options, *plain}, where=where)
    return parts


def _names(one: Setting) -> set[str]:
    """Names of a setting in a file: its field's and its option's."""
    return {one.name, one.option.removeprefix("--").replace("-", "_")}


def _build() -> Sequence[type]:
    from kd.cache_builder.build.build_settings import BuildSettings

    return (BuildSettings,)


def _train() -> Sequence[type]:
    from kd.student_trainer.configuration.score_settings import ScoreSettings
    from kd.student_trainer.configuration.train_config import TrainConfig

    return TrainConfig, ScoreSettings


def _eval() -> Sequence[type]:
    from kd.evaluation.eval_settings import EvalSettings

    return (EvalSettings,)


def _report() -> Sequence[type]:
    from kd.evaluation.report.systems.report_settings import ReportSettings

    return (ReportSettings,)


def _classify_train() -> Sequence[type]:
    from kd.student_trainer.classify.classify_settings import ClassifyConfig

    return (ClassifyConfig,)


def _classify_eval() -> Sequence[type]:
    from kd.evaluation.merged.merged_settings import ClassifierEvaluation

    return (ClassifierEvaluation,)


def _classify_matrix() -> Sequence[type]:
    from kd.evaluation.merged.merged_settings import MatrixSettings

    return (MatrixSettings,)


def _merge() -> Sequence[type]:
    from kd.evaluation.merged.merged_settings import MergeRun

    return (MergeRun,)


STEP_KINDS: dict[str, StepKind] = {
    "cache build": StepKind(_build, ("profile-build",)),
    "train": StepKind(_train, ("resume",)),
    "eval": StepKind(_eval, ("out",)),
    "report": StepKind(_report),
    "classify train": StepKind(_classify_train),
    "classify eval": StepKind(_classify_eval),
    "classify matrix": StepKind(_classify_matrix),
    "merge": StepKind(_merge),
}
"""Commands of a step whose settings are checked before anything runs."""
TYPED = (
    *(
        f"cache {name}"
        for name in ("bill", "export", "import", "info", "ls", "merge", "plan", "pull", "push", "repair")
    ),
    *(f"cache {name}" for name in ("search", "show", "slice", "status", "unlock", "verify")),
    *("data ls", "data show", "data templates", "demo", "doctor", "experiment"),
)
"""The other commands of a step. A recipe runs no recipe."""
COMMANDS = (*STEP_KINDS, *TYPED)
"""Every command that a step may be."""
