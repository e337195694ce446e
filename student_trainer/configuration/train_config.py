"""`TrainConfig`: every setting of a training run, saved beside its weights.

    config = make(TrainConfig, {"cache": "runs/cache", "student": "demo", "out": "runs/student", "lr": 1e-3})
    config.optimization.lr

The command line, configuration files, `run.json` and Python all use the flat names; inside, settings are grouped by what
they belong to. This module imports nothing heavy: the command line reads it to print its help.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd.cache_builder.weighted_caches import as_caches
from kd.common.errors import DataError
from kd.common.paths import as_path
from kd.common.setting_values import as_text
from kd.common.settings import check, flat, make, setting
from kd.student_trainer.configuration.learning_settings import CacheSettings, LossSettings, TextSettings
from kd.student_trainer.configuration.model_settings import LoraSettings, OutputSettings, StudentSettings
from kd.student_trainer.configuration.step_settings import BatchSettings, LogSettings, OptimizerSettings


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run. Equal settings, cache and library versions give equal weights on one machine."""

    data: CacheSettings
    model: StudentSettings
    out: str = setting(folder=True)
    """Folder of the run."""
    objective: LossSettings = field(default_factory=LossSettings)
    text: TextSettings = field(default_factory=TextSettings)
    batches: BatchSettings = field(default_factory=BatchSettings)
    optimization: OptimizerSettings = field(default_factory=OptimizerSettings)
    adapters: LoraSettings = field(default_factory=LoraSettings)
    weights: OutputSettings = field(default_factory=OutputSettings)
    logging: LogSettings = field(default_factory=LogSettings)
    seed: int = setting(0, minimum=0)
    """Seed of the order of examples, of dropout, and of random weights."""

    def __post_init__(self) -> None:
        check(self)
        if self.model.load_in_4bit and self.adapters.lora is None:
            raise DataError(
                "weights in 4 bits cannot be trained themselves",
                found="--load-in-4bit without --lora",
                try_="--lora R, such as --lora 16: adapters on the quantised weights",
            )

    @property
    def folder(self) -> Path:
        """`out` as a path."""
        return as_path(self.out)

    def saved(self) -> dict[str, Any]:
        """Flat settings as `run.json` holds them."""
        return flat(self) | {"cache": as_text(self.data.cache)}

    def identity(self) -> dict[str, Any]:
        """What must be equal for a checkpoint to be continued: everything but where and how often to write."""
        return {
            name: value for name, value in self.saved().items() if name not in FREE and ADDED.get(name, ...) != value
        }


def config_from(settings: Mapping[str, Any]) -> TrainConfig:
    """A configuration from settings by name; `cache` may be all that `open_cache` takes. Raises DataError."""
    given = {str(name).replace("-", "_"): value for name, value in settings.items()}
    if "cache" in given:
        given["cache"] = as_caches(given["cache"])
    return make(TrainConfig, given)


FREE = (
    "out",
    "cache",
    "cache_bytes",
    "save_every",
    "log_every",
    "rescue_dir",
    "report_to",
    "device",
    "kernels",
    "lora_save",
    "save_dtype",
    "push_to_hub",
    "hub_private",
)
"""Settings that a resumed run may change; of the cache, the fingerprint must be equal instead."""
ADDED = {"load_in_4bit": False, "merge": "observed", "compile": False, "liger": False}
"""Settings that earlier releases did not have -> the value that means what those did. At it they are not named in the identity,
so that runs which an earlier release began are continued. A setting whose default is None needs no entry."""
