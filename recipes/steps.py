"""A step of a recipe or an experiment: one `kd` command, as it would be typed and as the settings that it runs with.

    step = Step("cache build", {"teacher": "demo", "data": "demo", "out": "runs/cache"})
    step.words        ["cache", "build", "--teacher", "demo", "--data", "demo", "--out", "runs/cache"]
    step.settings     the command's settings objects, by class

A step runs through its settings (`kd.recipes.run_steps`). The words are only shown and recorded; nothing reads them back.
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
Options = Mapping[str, str | bool]
"""Option without its dashes -> its value as text, or true or false for a switch."""


WRITTEN = ("out", "rescue_dir", "rescue-dir")
"""Options that name a folder to write to."""


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
    """A key of `STEP_KINDS`."""
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
                words += [f"--{option}", value]
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
        return {cls: make(cls, part, where=self._label, typed=True) for cls, part in self._parts.items()}

    @property
    def _label(self) -> str:
        return f"{self.where}: kd {self.command}".removeprefix(": ")

    @cached_property
    def _parts(self) -> dict[type, dict[str, Any]]:
        """Settings class -> given values by field, unchecked; options override the file of `config`."""
        kind = STEP_KINDS[self.command]
        parts = by_class(kind.classes(), self.options, (*kind.plain, "config"), self._label)
        if "config" in self.options:
            file = as_path(str(self.options["config"]))
            from_file = by_class(kind.classes(), read_settings(file), (), str(file))
            parts = {cls: from_file[cls] | part for cls, part in parts.items()}
        self._refuse_outside(
            {**self.options, **{name: value for part in parts.values() for name, value in part.items()}}
        )
        return parts

    def _refuse_outside(self, values: Mapping[str, Any]) -> None:
        """Raise DataError for a folder to write to that is not below `folder`."""
        for name in WRITTEN:
            if self.folder is not None and name in values and not is_inside(as_path(str(values[name])), self.folder):
                raise DataError(
                    "a step writes outside of the recipe's folder",
                    where=self._label,
                    found=f"{name}: {values[name]}",
                    expected=f"{self.folder}/…",
                    try_="{out}/NAME in the file, or the command itself",
                )

    def setting(self, cls: type[T]) -> T:
        """The settings of one class. Raises DataError as `settings` does."""
        settings: T = self.settings[cls]
        return settings


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


STEP_KINDS: dict[str, StepKind] = {
    "cache build": StepKind(_build, ("profile-build",)),
    "train": StepKind(_train, ("resume",)),
    "eval": StepKind(_eval, ("out",)),
    "report": StepKind(_report),
}
"""Commands that a step may be."""
