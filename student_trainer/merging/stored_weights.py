"""Weights of models of one architecture, a block of one tensor at a time, from safetensors.

A file may spell a backbone's tensors with its prefix (`transformer.h.0…`) or without (`h.0…`); both are found under the
name that the merged model uses. Heads of classifiers are no part of a backbone. Each tensor's files are opened, read in
blocks of rows and closed again: neither memory nor the pages of mapped files ever hold a whole tensor of each model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd.common.errors import DataError
from kd.models.identity import weight_files
from kd.models.loading import ModelRequest, load_config
from kd.student_trainer.merging.pool import ModelPool, PoolModel

BLOCK_ELEMENTS = 2**16
"""Numbers of one tensor that are in memory at once, of each model: 512 KiB of float64, which stays in a core's cache."""
BLOCKS_PER_OPENING = 16
"""Files are mapped and unmapped again every so many blocks: pages that were read would pile up to a tensor of each model."""


@dataclass(frozen=True)
class StoredModel:
    """Where each tensor of one model lies."""

    name: str
    places: dict[str, tuple[Path, str]]
    """Name in the merged model -> (file, name in the file)."""
    shapes: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Block:
    """The same rows of one tensor, of every model."""

    name: str
    rows: slice
    """Of the first dimension; everything, of a tensor that fits."""
    values: Tensor
    """[M, ...] float64"""
    base: Tensor | None
    """[...] float64"""


def skeleton(pool: ModelPool, *, device: str = "meta") -> Any:
    """The model that is going to be written, without its weights: the backbone of classifiers, or a whole language model.

    On any other device than `meta` its memory is allocated; every stored tensor of it is then to be written.
    """
    import transformers

    config = load_config(ModelRequest(pool.models[0].path, revision=pool.models[0].revision))
    names = config.architectures or ()
    language = any(n.endswith(("ForCausalLM", "LMHeadModel")) for n in names)
    auto = transformers.AutoModelForCausalLM if language else transformers.AutoModel
    with torch.random.fork_rng(devices=[]), torch.device(device):
        return auto.from_config(config, dtype=torch.float32 if config.dtype is None else config.dtype).eval()


def tensor_names(model: Any) -> list[str]:
    """The tensors that make a model what it is, sorted: parameters, and buffers that files keep; tied ones once."""
    tied = {name for name, _ in _shared(model)}
    return sorted(name for name in model.state_dict() if name not in tied)


def _shared(model: Any) -> Iterator[tuple[str, str]]:
    """(name, name it is another word for) of tied parameters."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            yield name, first[id(parameter)]
        first.setdefault(id(parameter), name)


def stored_model(model: PoolModel, names: list[str], prefix: str) -> StoredModel:
    """Find `names` in a model's files. Raises DataError for files that lack one, or are no safetensors."""
    from safetensors import safe_open

    folder = _folder(model)
    there: dict[str, Path] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for file in weight_files([p.name for p in folder.iterdir()], lambda n: (folder / n).read_text(), model.path):
        if not file.endswith(".safetensors"):
            raise DataError(
                "the weights are no safetensors",
                where=folder / file,
                expected="model.safetensors",
                try_="load and save it with transformers once",
            )
        try:
            with safe_open(folder / file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118  (a handle, not a dict)
                    there[key] = folder / file
                    shapes[key] = tuple(handle.get_slice(key).get_shape())
        except Exception as error:  # a Rust error type of its own
            raise DataError("cannot read the weights", where=folder / file, found=error) from error
    places = {}
    for name in names:
        key = next((k for k in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")) if k in there), None)
        if key is None:
            raise DataError(
                "a model of the pool lacks a tensor",
                where=f"{model.name} ({model.path})",
                expected=name,
                found=f"{len(there)} others, such as {min(there, default='none')}",
            )
        places[name] = (there[key], key)
    return StoredModel(model.name, places, {name: shapes[key] for name, (_, key) in places.items()})


def _folder(model: PoolModel) -> Path:
    local = Path(model.path).expanduser()
    if local.is_dir():
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model.path, revision=model.revision, allow_patterns=["*.safetensors", "*.json"]))
    except Exception as error:  # the hub's client raises many unrelated types
        raise DataError(
            "no such model",
            where=f"{model.name}: {model.path}",
            found=f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}",
            expected="a folder written by save_pretrained, or a hub id",
        ) from error


@dataclass(frozen=True)
class StoredPool:
    """The models and the base, found and of one shape."""

    models: tuple[StoredModel, ...]
    base: StoredModel | None
    names: list[str]

    @classmethod
    def of(cls, pool: ModelPool, model: Any, *, with_base: bool) -> StoredPool:
        """Find the tensors of `model` (see `skeleton`) in every file. Raises DataError where a shape differs."""
        names, prefix = tensor_names(model), str(model.base_model_prefix)
        found = [stored_model(m, names, prefix) for m in pool.models]
        base = stored_model(pool.need_base("this method"), names, prefix) if with_base else None
        wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for one in [*found, *([base] if base else [])]:
            for name in names:
                if one.shapes[name] != wanted[name]:
                    raise DataError(
                        "the models of the pool are not of one shape",
                        where=f"{one.name} tensor {name}",
                        found=one.shapes[name],
                        expected=wanted[name],
                    )
        return cls(tuple(found), base, names)

    def blocks(self, name: str) -> Iterator[Block]:
        """One tensor in blocks of rows, of every model."""
        slices = list(row_blocks(self.models[0].shapes[name]))
        for start in range(0, len(slices), BLOCKS_PER_OPENING):
            with ExitStack() as stack:
                readers = [_reader(stack, m.places[name]) for m in self.models]
                base = None if self.base is None else _reader(stack, self.base.places[name])
                for rows in slices[start : start + BLOCKS_PER_OPENING]:
                    values = torch.stack([reader(rows) for reader in readers])
                    yield Block(name, rows, values, None if base is None else base(rows))


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first dimension, each of at most BLOCK_ELEMENTS numbers (or one row)."""
    if not shape:
        yield slice(None)
        return
    width = 1
    for size in shape[1:]:
        width *= size
    step = max(1, BLOCK_ELEMENTS // max(width, 1))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _reader(stack: ExitStack, place: tuple[Path, str]) -> Any:
    """rows -> that block in float64; a scalar is read whole."""
    from safetensors import safe_open

    file, key = place
    handle = stack.enter_context(safe_open(file, framework="pt"))
    view = handle.get_slice(key)
    if not view.get_shape():
        return lambda rows: handle.get_tensor(key).double()
    return lambda rows: view[rows].double()


def read_whole(place: tuple[Path, str]) -> Tensor:
    """One tensor, in the dtype it is stored in."""
    from safetensors import safe_open

    with safe_open(place[0], framework="pt") as handle:
        return handle.get_tensor(place[1])  # type: ignore[no-any-return]
