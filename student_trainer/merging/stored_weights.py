"""Weights of models of one architecture, a block of one tensor at a time, from safetensors.

A file may spell the tensors of a backbone with its prefix (`transformer.h.0…`) or without (`h.0…`); both are known here by the
name that the merged model uses. The head of a classifier is not part of its backbone. The files of a tensor are opened, read in
blocks of rows and closed again: neither memory nor the pages of mapped files ever hold a whole tensor of each model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.common.errors import DataError
from kd.common.paths import as_path
from kd.common.strangers.plain_files import refuse_special_files
from kd.models.identity import index_text, weight_files
from kd.models.loading import refuse_damaged_model
from kd.models.model_config import load_config
from kd.models.model_request import ModelRequest
from kd.student_trainer.merging.pool import ModelPool, PoolModel

BLOCK_ELEMENTS = 2**16
"""Numbers of one tensor that are in memory at once, per model: 512 KiB of float64, which fits into the cache of a core."""
BLOCKS_PER_OPENING = 16
"""Blocks after which the files are unmapped and mapped again. Otherwise the pages that were read would add up to a tensor of
each model."""
TensorPlace = tuple[Path, str]
"""(file, name in the file)"""


@dataclass(frozen=True)
class StoredModel:
    """Where each tensor of one model is stored."""

    name: str
    places: dict[str, TensorPlace]
    """Name in the merged model -> file, and name in the file."""
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Block:
    """The same rows of one tensor in every model."""

    name: str
    rows: slice
    """Rows of the first dimension; `slice(None)` for a scalar or a whole tensor."""
    values: Tensor
    """[M, ...] float64"""
    base: Tensor | None
    """[...] float64; None where the pool has no base or the method needs none"""


def skeleton(pool: ModelPool, *, device: str = "meta") -> Any:
    """The model that will be written, without weights: the backbone of classifiers, or a whole language model.

    On the device `meta` it takes no memory. On any other device its memory is allocated, and the caller must write every
    tensor that is stored.
    """
    import transformers

    config = load_config(ModelRequest(pool.models[0].path, revision=pool.models[0].revision))
    names = config.architectures or ()
    language = any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in names)
    auto = transformers.AutoModelForCausalLM if language else transformers.AutoModel
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return auto.from_config(config, dtype=torch.float32 if config.dtype is None else config.dtype).eval()


def tensor_names(model: Any) -> list[str]:
    """The stored tensors of a model, sorted: parameters and the buffers that files hold; tied parameters appear once."""
    tied = {name for name, _ in _shared(model)}
    return sorted(name for name in model.state_dict() if name not in tied)


def _shared(model: Any) -> Iterator[tuple[str, str]]:
    """(second name, first name) of tied parameters."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            yield name, first[id(parameter)]
        first.setdefault(id(parameter), name)


def stored_model(model: PoolModel, names: list[str], prefix: str) -> StoredModel:
    """Look up `names` in the files of a model. Raises DataError for files that lack one, or are not safetensors."""
    places, shapes = _stored_tensors(model)
    keys = {}
    for name in names:
        spellings = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        key = next((spelling for spelling in spellings if spelling in places), None)
        if key is None:
            raise DataError(
                "a model of the pool lacks a tensor",
                where=f"{model.name} ({model.path})",
                expected=name,
                found=f"{len(places)} others, such as {min(places, default='none')}",
            )
        keys[name] = key
    return StoredModel(
        model.name,
        {name: (places[key], key) for name, key in keys.items()},
        {name: shapes[key] for name, key in keys.items()},
    )


def _stored_tensors(model: PoolModel) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    """File and shape of every tensor in the files of a model, by its name there."""
    from safetensors import safe_open

    refuse_damaged_model(ModelRequest(model.path))
    folder = _folder(model)
    places: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files([p.name for p in folder.iterdir()], lambda n: index_text(folder / n), model.path):
        if not file.endswith(".safetensors"):
            raise DataError(
                "the weights are not in safetensors format",
                where=folder / file,
                expected="model.safetensors",
                try_="load and save it with transformers once",
            )
        try:
            with safe_open(folder / file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118  (a handle, not a dict)
                    places[key] = folder / file
                    shapes[key] = tuple(handle.get_slice(key).get_shape())
        except Exception as error:  # safetensors raises its own Rust error type
            raise DataError("cannot read the weights", where=folder / file, found=error) from error
    return places, shapes


def _folder(model: PoolModel) -> Path:
    local = as_path(model.path)
    refuse_special_files(local)
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the client of the hub raises many unrelated types
        raise DataError(
            "no such model",
            where=f"{model.name}: {model.path}",
            found=f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}",
            expected="a folder written by save_pretrained, or a hub id",
        ) from error


@dataclass(frozen=True)
class StoredPool:
    """The files of the models and of the base, which all hold the same tensors."""

    models: tuple[StoredModel, ...]
    base: StoredModel | None
    names: list[str]

    @classmethod
    def of(cls, pool: ModelPool, model: Any, *, with_base: bool) -> StoredPool:
        """Look up the tensors of `model` (see `skeleton`) in every file. Raises DataError where a shape differs."""
        names, prefix = tensor_names(model), str(model.base_model_prefix)
        models = [stored_model(m, names, prefix) for m in pool.models]
        base = stored_model(pool.need_base("this method"), names, prefix) if with_base else None
        expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for stored in [*models, *([base] if base else [])]:
            for name in names:
                if stored.shapes[name] != expected[name]:
                    raise DataError(
                        "the models of the pool are not of one shape",
                        where=f"{stored.name} tensor {name}",
                        found=stored.shapes[name],
                        expected=expected[name],
                    )
        return cls(tuple(models), base, names)

    def blocks(self, name: str) -> Iterator[Block]:
        """One tensor of every model, in blocks of rows."""
        slices = list(row_blocks(self.models[0].shapes[name]))
        for start in range(0, len(slices), BLOCKS_PER_OPENING):
            with ExitStack() as stack:
                readers = [_reader(stack, m.places[name]) for m in self.models]
                base = None if self.base is None else _reader(stack, self.base.places[name])
                for rows in slices[start : start + BLOCKS_PER_OPENING]:
                    values = torch.stack([reader(rows) for reader in readers])
                    yield Block(name, rows, values, None if base is None else base(rows))

    def whole(self, name: str) -> Block:
        """One tensor of every model, in one block."""
        values = torch.empty((len(self.models), *self.models[0].shapes[name]), dtype=torch.float64)
        for value, model in zip(values, self.models, strict=True):
            value.copy_(read_whole(model.places[name]))
        base = None if self.base is None else read_whole(self.base.places[name]).double()
        return Block(name, slice(None), values, base)


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first dimension, each of at most BLOCK_ELEMENTS numbers (or one row)."""
    if not shape:
        yield slice(None)
        return
    step = max(1, BLOCK_ELEMENTS // max(math.prod(shape[1:]), 1))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _reader(stack: ExitStack, stored: TensorPlace) -> Callable[[slice], Tensor]:
    """A function from rows to that block in float64; a scalar is read whole."""
    from safetensors import safe_open

    file, key = stored
    handle = stack.enter_context(safe_open(file, framework="pt"))
    view = handle.get_slice(key)
    if not view.get_shape():
        return lambda rows: handle.get_tensor(key).double()
    return lambda rows: view[rows].double()


def read_rows(stored: TensorPlace, rows: slice) -> Tensor:
    """A block of one tensor, in float64."""
    with ExitStack() as stack:
        return _reader(stack, stored)(rows)


def read_whole(stored: TensorPlace) -> Tensor:
    """One tensor, in the dtype it is stored in."""
    from safetensors import safe_open

    with safe_open(stored[0], framework="pt") as handle:
        return handle.get_tensor(stored[1])  # type: ignore[no-any-return]
