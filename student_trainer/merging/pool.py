"""The models to merge, from a YAML file: a base, and models by name.

    base: openai-community/gpt2              models:                                 models:
    models:                                    - name: _pretrained_                    _pretrained_:
      cola: runs/cola                            path: gpt2                              pretrained_model_name_or_path: gpt2
      sst2: {path: runs/sst2}                  - name: cola                            cola:
                                                 path: tanganke/gpt2_cola                pretrained_model_name_or_path: …

The layout of kd is on the left. The two layouts of FusionBench's GPT-2 pools are read unchanged; their keys for classes, data
sets and tokenizers (`type`, `_target_`, …) are ignored. `_pretrained_` is the base: it is not merged. A relative path is looked up
beside the file, then in the working directory; anything else is a hub id. The name of a classifier is its GLUE task.
`data: SPEC` names the text that fisher and regmean read for a language model.

A folder of classifiers that `kd classify train` wrote is a pool as well: each is called by its task, and the base is what all
of them were trained from.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.common.errors import DataError, unknown_name
from kd.common.paths import as_path
from kd.common.strangers.yaml_file import read_mapping
from kd.student_trainer.run_folder import read_classifier_run

BASE = "_pretrained_"
POOL_KEYS = ("base", "models")
FUSION_BENCH_KEYS = (
    "type",
    "name",
    "dtype",
    "models",
    "_target_",
    "_recursive_",
    "_version_",
    "_usage_",
    "_model_loader",
    "_dataset_loader",
    "train_datasets",
    "val_datasets",
    "test_datasets",
    "tokenizer",
)
"""Keys of FusionBench's files; all but `models` name its own classes and are ignored."""


@dataclass(frozen=True)
class PoolModel:
    """A model of the pool."""

    name: str
    path: str
    """Folder or hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    data: str | None = None
    """Data spec of the rows that fisher and regmean read; None = the GLUE task of a classifier."""


@dataclass(frozen=True)
class ModelPool:
    """A base and the models made from it."""

    file: Path
    base: PoolModel | None
    models: tuple[PoolModel, ...]
    """At least one, in the file's order."""

    @property
    def names(self) -> list[str]:
        """Names of the models, in order."""
        return [model.name for model in self.models]

    def need_base(self, purpose: str) -> PoolModel:
        """The base; raises DataError where the file names none."""
        if self.base is None:
            raise DataError(f"{purpose} starts from a base", where=self.file, expected=f"base: PATH, or a model {BASE}")
        return self.base


def read_pool(file: Path) -> ModelPool:
    """Read a pool; raises DataError naming file and key for anything but the layouts above."""
    if os.path.isdir(file):
        return _pool_of_folder(file)
    document = read_mapping(file, "pool")
    if not document.get("models"):
        raise DataError("the file is not a pool of models", where=file, expected="models: a list or a mapping")
    for key in document:
        if key not in (*POOL_KEYS, *FUSION_BENCH_KEYS):
            raise unknown_name("key", str(key), (*POOL_KEYS, *FUSION_BENCH_KEYS), where=file)
    entries = _listed(document["models"], file)
    if "base" in document:
        entries.append(_model(BASE, document["base"], file))
    models: dict[str, PoolModel] = {}
    for model in entries:
        if model.name in models:
            raise DataError("two models have the same name", where=file, found=model.name)
        models[model.name] = model
    base = models.pop(BASE, None)
    if not models:
        raise DataError("the pool holds no model besides the base", where=file)
    return ModelPool(file, base, tuple(models.values()))


def _pool_of_folder(folder: Path) -> ModelPool:
    """The classifiers in a folder. Raises DataError for none, for two of a task, and where they began with different models."""
    runs = {path: run for path in sorted(folder.iterdir()) if (run := read_classifier_run(path)) is not None}
    if not runs:
        raise DataError(
            "the folder holds no classifiers", where=folder, expected=f"{folder}/TASK, written by kd classify train"
        )
    models = tuple(PoolModel(str(run["task"]), str(path)) for path, run in runs.items())
    names = [model.name for model in models]
    starts = {(run["settings"].get("model"), run["settings"].get("revision")): path for path, run in runs.items()}
    if len(set(names)) < len(names):
        raise DataError("two models have the same name", where=folder, found=", ".join(names))
    if len(starts) > 1:
        beginnings = ", ".join(f"{path.name} from {start}" for (start, _), path in starts.items())
        raise DataError(
            "the classifiers began with different models", where=folder, found=beginnings, try_="a pool's YAML file"
        )
    ((start, revision),) = starts
    return ModelPool(folder, PoolModel(BASE, str(start), revision), models)


def _listed(models: Any, file: Path) -> list[PoolModel]:
    if isinstance(models, dict):
        return [_model(str(name), entry, file) for name, entry in models.items()]
    if not isinstance(models, list) or not all(isinstance(m, dict) and "name" in m for m in models):
        raise DataError(
            "the models have no names", where=f"{file} models", expected="a mapping, or a list of name and path"
        )
    return [_model(str(entry["name"]), entry, file) for entry in models]


def _model(name: str, entry: Any, file: Path) -> PoolModel:
    if isinstance(entry, str):
        return PoolModel(name, _located(entry, file))
    where = f"{file} models {name}"
    if not isinstance(entry, Mapping):
        raise DataError("a model is not a path", where=where, found=type(entry).__name__, expected="a path or hub id")
    known = ("name", "path", "pretrained_model_name_or_path", "revision", "data", "_target_", "torch_dtype")
    for key in entry:
        if key not in known:
            raise unknown_name("key", str(key), known, where=where)
    path = entry.get("path", entry.get("pretrained_model_name_or_path"))
    if not isinstance(path, str):
        raise DataError("a model has no path", where=where, expected="path: FOLDER or a hub id")
    for key in ("revision", "data"):
        if not isinstance(entry.get(key), str | None):
            raise DataError("a model's entry is not a text", where=where, found=f"{key}: {type(entry[key]).__name__}")
    return PoolModel(name, _located(path, file), entry.get("revision"), entry.get("data"))


def _located(path: str, file: Path) -> str:
    """The folder beside the pool's file, if there is one; else the path as it stands."""
    beside = file.parent / as_path(path)
    return str(beside) if os.path.isdir(beside) else path
