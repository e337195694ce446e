"""Load a model in 4 bits: nf4 with double quantisation, by bitsandbytes.

Weights take about a quarter of their memory in bfloat16. bitsandbytes quantises while it loads files, so the model must
be a folder or a hub id. It is imported here and nowhere else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kd.common.errors import TeacherError
from kd.common.extras import needed

if TYPE_CHECKING:
    import torch

CPU_BLOCK = 64
"""Weights per block of bitsandbytes' kernel for CPUs: input widths must be multiples of it."""


def load_quantised(
    auto_class: Any, path: str, revision: str | None, dtype: torch.dtype, device: str, *, name: str
) -> Any:
    """The model at `path` in 4 bits, computing in `dtype`. Raises TeacherError where bitsandbytes cannot load or run it.

    auto_class   class of transformers whose `from_pretrained` loads the model
    name         what errors call the model
    """
    with needed("bitsandbytes", "4-bit loading", where=name, instead="--dtype bfloat16"):
        import bitsandbytes
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    try:
        model = auto_class.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device},
            trust_remote_code=False,
        )
    except Exception as error:
        supported = f"a model and a device that bitsandbytes {bitsandbytes.__version__} supports (device {device})"
        raise TeacherError(
            "bitsandbytes cannot load this model in 4 bits here",
            where=name,
            found=f"{type(error).__name__}: {error}",
            expected=supported,
            try_="--dtype bfloat16",
        ) from error
    if device == "cpu":
        _require_whole_blocks(model, bitsandbytes.nn.Linear4bit, name)
    return model


def _require_whole_blocks(model: Any, linear: Any, name: str) -> None:
    """Raise TeacherError where a layer does not fill its last block: bitsandbytes would fail in the first forward pass."""
    layers = [n for n, m in model.named_modules() if isinstance(m, linear) and m.in_features % CPU_BLOCK]
    if layers:
        raise TeacherError(
            "bitsandbytes cannot run this model in 4 bits on a CPU",
            where=name,
            found=f"{len(layers)} layers such as {layers[0]}",
            expected=f"input widths that are multiples of {CPU_BLOCK}",
            try_="--dtype bfloat16",
        )
