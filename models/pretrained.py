"""A teacher and its tokenizer by name, as a cache build loads them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from kd.models.loading import Model, load_model
from kd.models.model_config import load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.models.placement.device_maps import Placement
from kd.models.tokenizer import Tokenizer
from kd.models.weights.adapters import Adapter


def load_teacher(
    name: str,
    *,
    revision: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    max_memory: Mapping[Any, Any] | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    adapter: str | None = None,
    adapter_revision: str | None = None,
) -> tuple[Model, Tokenizer]:
    """The model that `kd cache build --teacher NAME` would run, and its tokenizer.

    name        `demo` or `demo-t5` (embedded), `random:NAME`, a folder, or a hub id
    revision    branch, tag or commit of a hub model
    tokenizer   folder or hub id of the tokenizer, where it is not beside the model
    dtype       auto, float32, bfloat16 or float16; auto = as stored, and float32 on a CPU
    device      auto, cpu or cuda
    device_map, max_memory, offload_folder
                for a model larger than one device, as in transformers: auto, balanced or sequential, a file, or a mapping
    load_in_4bit, load_in_8bit
                quantise the weights while they are loaded (bitsandbytes)
    adapter, adapter_revision
                folder or hub id of an adapter that is merged into the weights, and its branch, tag or commit

    Raises TeacherError for a model that cannot be loaded.

    >>> import kd
    >>> model, tokenizer = kd.load_teacher("demo")
    >>> tokenizer.decode(tokenizer.encode("import sys"))
    'import sys'
    """
    request = ModelRequest(
        name,
        revision=revision,
        dtype=dtype,
        device=device,
        tokenizer=tokenizer,
        placement=Placement.of(device_map, max_memory, offload_folder),
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        adapter=None if adapter is None else Adapter(adapter, adapter_revision),
    )
    return load_model(request), load_request_tokenizer(request)
