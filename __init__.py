"""Distil language models through a teacher-logit cache: run the teacher once, train many students.

    import kd

    teacher, tokenizer = kd.load_teacher("demo")
    kd.build_cache(teacher, tokenizer, ["Some text.", "More text."], out="runs/cache")
    result = kd.train(cache="runs/cache", student="demo", out="runs/student")

`kd.CacheDataset` gives the same batches to a training loop of your own. docs/api.md documents every name. Names are
imported when they are first used: `import kd` by itself loads neither torch nor numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kd.cache_builder.build.estimate import plan_cache
    from kd.cache_builder.build.from_model import build_cache
    from kd.cache_builder.exchange.export_cache import export_cache
    from kd.cache_builder.exchange.import_cache import import_cache
    from kd.cache_builder.opening import open_cache
    from kd.cache_builder.share.hub_search import search_caches
    from kd.cache_builder.showing import show_cache
    from kd.cache_builder.store.readers.reading import Reader
    from kd.common.errors import (
        CacheDamageError,
        CacheError,
        CacheMismatchError,
        DamagedFilesError,
        DataError,
        KdError,
        TeacherError,
        UnfinishedBuildError,
    )
    from kd.common.extras import MissingPackageError
    from kd.evaluation.cache_figures import plot_cache
    from kd.evaluation.evaluate import evaluate
    from kd.evaluation.make_report import make_report
    from kd.evaluation.results import EvalReport
    from kd.models.pretrained import load_teacher
    from kd.student_trainer.cache_dataset import CacheDataset
    from kd.student_trainer.loss_functions import LossParts, chunked_distillation_loss, distillation_loss
    from kd.student_trainer.losses.loss_registry import Objective
    from kd.student_trainer.student_model import load_student
    from kd.student_trainer.training import TrainResult, train
    from kd.student_trainer.training_estimate import TrainEstimate, estimate_training, plan_training

    __version__: str

__all__ = [
    "CacheDamageError",
    "CacheDataset",
    "CacheError",
    "CacheMismatchError",
    "DamagedFilesError",
    "DataError",
    "EvalReport",
    "KdError",
    "LossParts",
    "MissingPackageError",
    "Objective",
    "Reader",
    "TeacherError",
    "TrainEstimate",
    "TrainResult",
    "UnfinishedBuildError",
    "__version__",
    "build_cache",
    "chunked_distillation_loss",
    "distillation_loss",
    "estimate_training",
    "evaluate",
    "export_cache",
    "import_cache",
    "load_student",
    "load_teacher",
    "make_report",
    "open_cache",
    "plan_cache",
    "plan_training",
    "plot_cache",
    "search_caches",
    "show_cache",
    "train",
]

_HOMES = {
    "kd.cache_builder.build.estimate": ["plan_cache"],
    "kd.cache_builder.build.from_model": ["build_cache"],
    "kd.cache_builder.exchange.export_cache": ["export_cache"],
    "kd.cache_builder.exchange.import_cache": ["import_cache"],
    "kd.cache_builder.opening": ["open_cache"],
    "kd.cache_builder.share.hub_search": ["search_caches"],
    "kd.cache_builder.showing": ["show_cache"],
    "kd.cache_builder.store.readers.reading": ["Reader"],
    "kd.common.errors": [
        *("CacheDamageError", "CacheError", "CacheMismatchError", "DamagedFilesError", "DataError", "KdError"),
        *("TeacherError", "UnfinishedBuildError"),
    ],
    "kd.common.extras": ["MissingPackageError"],
    "kd.evaluation.cache_figures": ["plot_cache"],
    "kd.evaluation.evaluate": ["evaluate"],
    "kd.evaluation.make_report": ["make_report"],
    "kd.evaluation.results": ["EvalReport"],
    "kd.models.pretrained": ["load_teacher"],
    "kd.student_trainer.cache_dataset": ["CacheDataset"],
    "kd.student_trainer.loss_functions": ["LossParts", "chunked_distillation_loss", "distillation_loss"],
    "kd.student_trainer.losses.loss_registry": ["Objective"],
    "kd.student_trainer.student_model": ["load_student"],
    "kd.student_trainer.training": ["TrainResult", "train"],
    "kd.student_trainer.training_estimate": ["TrainEstimate", "estimate_training", "plan_training"],
}
"""Module -> the public names that are defined there. A type checker reads the imports above instead; a test compares both."""


if not TYPE_CHECKING:  # or every name would be one, of any type

    def __getattr__(name: str) -> Any:
        """A public name, imported when it is first used. Raises MissingPackageError where that needs an extra."""
        if name == "__version__":
            from importlib.metadata import version

            value = version("kd-logit-cache")
        else:
            home = next((module for module, names in _HOMES.items() if name in names), None)
            if home is None:
                raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
            value = getattr(_imported(home, name), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _imported(module: str, name: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        from kd.common.extras import missing_package

        missing = missing_package(error, f"kd.{name}")
        if missing is None:
            raise
        raise missing from error
