"""What a run's folder holds at the end: a whole model, the adapters that were trained, or both; in which type of numbers.

Training keeps its weights in float32. A model that is stored in 16 bits is written in 16 bits again, unless the run says
otherwise: its file is then as large as the one that the student came from.
"""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd.common.files import write_atomic
from kd.models.loading import Model, load_model
from kd.models.model_config import load_config
from kd.models.model_request import ModelRequest
from kd.models.weights.adapters import Adapter, merged
from kd.student_trainer.lora import TrainedAdapter
from kd.student_trainer.saving.whole_models import ADAPTER_FOLDER, write_model

if TYPE_CHECKING:
    from kd.student_trainer.configuration.model_settings import LoraSettings


def merged_model(model: Model, trained: Any, adapter: TrainedAdapter, request: ModelRequest) -> Model:
    """The plain model that a model with adapters computes.

    model     the student, whose layers hold the adapters
    trained   the PeftModel around it
    request   how the student is loaded: one in 4 bits is loaded again in float32, because quantised weights cannot take the sum
    """
    if not getattr(model, "is_quantized", False):
        with merged_without_warning():
            return trained.merge_and_unload()
    with tempfile.TemporaryDirectory() as folder:
        adapter.save_pretrained(folder)
        return merged(load_model(request), Adapter(folder))


@contextmanager
def merged_without_warning() -> Iterator[None]:
    """Silence a wrong warning of peft 0.21, which takes every head of T5 for tied because its configuration says so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Input and output embeddings are no longer tied")
        yield


@dataclass(frozen=True)
class Outcome:
    """What is written at the end of a run."""

    model: Model | None
    """The whole model, None where the adapters alone are kept."""
    adapter: TrainedAdapter | None
    """The adapters; None where all weights were trained, or the merged model alone is kept."""
    tokenizer: Any

    def write(self, folder: Path) -> None:
        """Write all of it into `folder`, each part whole or not at all."""
        if self.model is None:
            write_model(folder, self.adapter, self.tokenizer)
            return
        write_model(folder, self.model, self.tokenizer)
        if self.adapter is not None:
            write_model(folder / ADAPTER_FOLDER, self.adapter, self.tokenizer)


def trained_weights(
    model: Model,
    trained: Any,
    tokenizer: Any,
    adapters: LoraSettings,
    *,
    base: str | None,
    request: ModelRequest,
    dtype: torch.dtype,
    say: Callable[[str], object],
) -> Outcome:
    """What a run leaves; `model` is changed: its adapters are merged, and its weights get their type.

    trained   what was trained: the model, or the PeftModel around it
    base      as in `TrainedAdapter.of`
    request   as in `merged_model`
    dtype     type of a whole model's weights
    say       receives a sentence where the weights do not fit the type
    """
    if trained is model:
        cast_weights(model, dtype, say)
        return Outcome(model, None, tokenizer)
    adapter = TrainedAdapter.of(trained, base)
    if adapters.lora_save == "adapter":
        return Outcome(None, adapter, tokenizer)
    plain = merged_model(model, trained, adapter, request)
    cast_weights(plain, dtype, say)
    return Outcome(plain, adapter if adapters.lora_save == "both" else None, tokenizer)


def output_dtype(name: str, request: ModelRequest) -> torch.dtype:
    """The type that `--save-dtype NAME` stands for; `auto` is the type in which the student's files say that it is stored."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    if request.random_shape is not None:
        return torch.float32
    config = load_config(request)
    stored = getattr(config, "dtype", None)
    stored = getattr(torch, stored, None) if isinstance(stored, str) else stored
    return stored if stored in (torch.float32, torch.bfloat16, torch.float16) else torch.float32


def cast_weights(model: Model, dtype: torch.dtype, say: Callable[[str], object]) -> None:
    """Give every floating parameter the type `dtype`, in place; where a value would become infinite, all keep their type."""
    floating = [p for p in model.parameters() if p.is_floating_point()]
    if dtype == torch.float16 and any(beyond_float16(p) for p in floating):
        say("the student's weights do not fit into float16 and are written in float32")
        return
    with torch.no_grad():
        for parameter in floating:
            parameter.data = parameter.data.to(dtype)


def beyond_float16(values: Tensor) -> bool:
    """Whether a finite value is larger than float16 can hold."""
    largest = torch.finfo(torch.float16).max
    return bool(values.numel() and values.detach().abs().nan_to_num(0, 0, 0).max() > largest)


def store_as(folder: Path, dtype: torch.dtype, say: Callable[[str], object]) -> None:
    """Give the weights in a folder the type `dtype`, file by file: for a model that no process holds whole (FSDP)."""
    from safetensors.torch import load_file, save_file

    files = sorted(folder.glob("*.safetensors"))
    if dtype == torch.float16 and any(beyond_float16(t) for file in files for t in load_file(file).values()):
        say("the student's weights do not fit into float16 and are written in float32")
        return
    for file in files:
        tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in load_file(file).items()}
        staged = file.with_name(f"{file.name}.tmp")
        save_file(tensors, staged, metadata={"format": "pt"})
        staged.replace(file)
    config = folder / "config.json"
    document = json.loads(config.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
    write_atomic(config, json.dumps(document, indent=2, sort_keys=True) + "\n")
