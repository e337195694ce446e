"""Checkpoints whose weights are stored quantised: compressed-tensors, GPTQ, AWQ, FP8, bitsandbytes and others of transformers.

transformers finds the method in the configuration and loads such a checkpoint by the method's own package. What is ours: its name
for a cache's identity, errors that say which package or device is missing, and two methods that are not ready when they are loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kd.common.errors import DataError, TeacherError

if TYPE_CHECKING:
    import torch

PACKAGES: dict[str, str] = {
    "aqlm": "aqlm",
    "auto-round": "auto-round",
    "awq": "gptqmodel",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "compressed-tensors",
    "eetq": "kernels",
    "fp_quant": "fp-quant",
    "gptq": "gptqmodel optimum",
    "higgs": "flute-kernel",
    "hqq": "hqq",
    "mxfp4": "kernels triton",
    "quanto": "optimum-quanto",
    "quark": "amd-quark",
    "spqr": "spqr_quant",
    "torchao": "torchao",
    "vptq": "vptq",
}
"""Method of quantisation -> the packages that run it, as transformers asks for them."""
FP8_CAPABILITY = (8, 9)
"""Least compute capability of a GPU on which transformers computes in 8-bit floats; elsewhere it computes with plain weights."""


def stored_quantisation(config: Any) -> dict[str, Any] | None:
    """How a checkpoint says that its weights are quantised; None for plain weights."""
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return dict(stored) if isinstance(stored, Mapping) else dict(stored.to_dict())


def stored_method(config: Any) -> str | None:
    """The method's name, as transformers spells it; None for plain weights."""
    stored = stored_quantisation(config)
    return None if stored is None else str(stored.get("quant_method", "unknown"))


def computed_as(config: Any) -> str | None:
    """What the identity of a model calls its stored quantisation; None for plain weights.

    An FP8 checkpoint rounds the inputs of its layers to 8 bits too, but only on GPUs that compute in 8-bit floats; elsewhere its
    weights are made plain and its inputs are not rounded. These are two teachers.
    """
    method = stored_method(config)
    return "fp8-dequantized" if method == "fp8" and _fp8_is_made_plain() else method


def _fp8_is_made_plain() -> bool:
    import torch

    return not torch.cuda.is_available() or torch.cuda.get_device_capability() < FP8_CAPABILITY


def refuse_quantising_again(config: Any, name: str, bits: int | None) -> None:
    """Raise DataError where a checkpoint that is quantised is to be quantised by bitsandbytes as well."""
    method = stored_method(config)
    if bits is not None and method is not None:
        raise DataError(
            "the checkpoint is quantised already",
            where=name,
            found=f"--load-in-{bits}bit, and weights stored as {method}",
            try_=f"without --load-in-{bits}bit",
        )


def cannot_run(config: Any, name: str, device: str, error: Exception) -> TeacherError:
    """The error for a quantised checkpoint that transformers could not load because of `error`."""
    method = stored_method(config) or "unknown"
    packages = PACKAGES.get(method)
    return TeacherError(
        "the quantised checkpoint cannot be loaded here",
        where=name,
        found=f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}",
        expected=f"what transformers needs to run {method} weights on the device {device}",
        try_=f"pip install {packages}, a GPU, or a checkpoint with plain weights"
        if packages
        else "a GPU, or a checkpoint with plain weights",
    )


def make_plain(model: Any, config: Any, dtype: torch.dtype) -> None:
    """Give a model whose FP8 weights transformers has made plain one dtype: these come in the dtype of their scales."""
    import torch

    if computed_as(config) != "fp8-dequantized":
        return
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for module in model.modules() if dtype == torch.float32 else linear:
        for parameter in module.parameters(
            recurse=False
        ):  # buffers, such as rotary frequencies, are in float32 already
            parameter.data = parameter.data.to(dtype)


def unpack(model: Any) -> None:
    """Let a model whose own forward pass unpacks its weights do so: compressed-tensors does it in the first one.

    The body alone, which is all that a teacher pass calls, would run without weights. Does nothing for other models.
    """
    import torch

    if not hasattr(model, "ct_decompress_hook"):
        return
    training, device = model.training, model.get_input_embeddings().weight.device
    model.eval()
    try:
        with torch.no_grad():
            model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=False)
    finally:
        model.train(training)
