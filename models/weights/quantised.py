"""Load a model in 4 bits (nf4 with double quantisation) or 8 bits (LLM.int8) by bitsandbytes.

Weights take about a quarter, or half, of their memory in bfloat16. bitsandbytes quantises while it loads files, so the model must
be a folder or a hub id. It is imported here and nowhere else.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kd.common.errors import TeacherError
from kd.common.extras import needed
from kd.models.families.text_model import refuse_missing_weights

if TYPE_CHECKING:
    import torch

CPU_BLOCK = 64
"""Weights per block of bitsandbytes' kernel for CPUs: input widths must be multiples of it."""
NAMED = 8
"""Kinds of unquantised weights that are named."""


@dataclass(frozen=True)
class QuantisedShare:
    """Which weights of a model are in 4 or 8 bits. Embeddings and the output layer never are, and are not counted."""

    layers: int
    """Number of quantised layers."""
    weights: int
    """Number of quantised weights."""
    of: int
    """Number of weights in all."""
    left: tuple[str, ...]
    """Other weights by kind, the largest first: `model.layers.*.mlp.experts.gate_up_proj (3,072 weights)`."""

    def record(self) -> dict[str, Any]:
        """As a cache's manifest and `kd cache info` hold it."""
        return {"layers": self.layers, "weights": self.weights, "of": self.of, "left": list(self.left)}


def load_quantised(
    auto_class: Any,
    path: str,
    revision: str | None,
    dtype: torch.dtype,
    device: str,
    *,
    bits: int,
    name: str,
    **options: Any,
) -> Any:
    """The model at `path` in 4 or 8 bits, computing in `dtype`. Raises TeacherError where bitsandbytes cannot load or run it.

    auto_class   class of transformers whose `from_pretrained` loads the model
    name         what errors call the model
    options      further arguments of `from_pretrained`, `device_map` among them
    """
    with needed("bitsandbytes", f"{bits}-bit loading", where=name, instead="--dtype bfloat16"):
        import bitsandbytes
    from transformers import BitsAndBytesConfig

    quantization = (
        BitsAndBytesConfig(load_in_8bit=True)
        if bits == 8
        else BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    )
    kind = bitsandbytes.nn.Linear8bitLt if bits == 8 else bitsandbytes.nn.Linear4bit
    try:
        model, loading_info = auto_class.from_pretrained(
            path,
            revision=revision,
            dtype=dtype,
            quantization_config=quantization,
            trust_remote_code=False,
            output_loading_info=True,
            **options,
        )
    except Exception as error:
        supported = f"a model and a device that bitsandbytes {bitsandbytes.__version__} supports (device {device})"
        raise TeacherError(
            f"bitsandbytes cannot load this model in {bits} bits here",
            where=name,
            found=f"{type(error).__name__}: {error}",
            expected=supported,
            try_=f"the plain weights, without --load-in-{bits}bit; --dtype bfloat16 halves a teacher's",
        ) from error
    refuse_missing_weights(name, model, loading_info)
    refuse_mostly_unquantised(share_of(model, lambda _, module: isinstance(module, kind)), name, bits)
    if device == "cpu" and bits == 4:
        _require_whole_blocks(model, kind, name)
    return model


def keep_trainable(model: Any) -> None:
    """Keep a model in 4 bits as its backward pass reads it.

    On a CPU with AVX-512, bitsandbytes lays the weights out for inference in the first pass in evaluation mode; it has no gradient
    for that layout (0.49, `Linear4bit.forward`).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def planned_share(model: Any) -> QuantisedShare:
    """What bitsandbytes would quantise of a model (on the meta device, say): the layers that transformers replaces."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    skipped = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]

    def replaced(name: str, module: Any) -> bool:
        plain = type(module) is nn.Linear or isinstance(module, Conv1D)
        return plain and should_convert_module(name, skipped)

    return share_of(model, replaced)


def share_of(model: Any, quantised: Callable[[str, Any], bool]) -> QuantisedShare:
    """Count the weights of a model; `quantised` says of a module by its name whether its weight is."""
    from torch import nn

    output = model.get_output_embeddings()
    layers = weights = 0
    left: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or module is output:
            continue
        parameters = dict(module.named_parameters(recurse=False))
        if quantised(name, module):
            layers += 1
            weights += _entries(module)
            del parameters["weight"]
        for parameter, value in parameters.items():
            left[re.sub(r"\.\d+(?=\.)", ".*", f"{name}.{parameter}")] += value.numel()
    kinds = tuple(f"{kind} ({count:,} weights)" for kind, count in left.most_common(NAMED))
    return QuantisedShare(layers, weights, weights + left.total(), kinds)


def _entries(layer: Any) -> int:
    """Number of weights of a linear layer, whatever their packing."""
    if hasattr(layer, "in_features"):
        return int(layer.in_features * layer.out_features)
    return int(layer.weight.numel())


def refuse_mostly_unquantised(share: QuantisedShare, name: str, bits: int) -> None:
    """Raise TeacherError where less than half of the weights would be quantised: it would take more memory than it seems."""
    if 2 * share.weights < share.of:
        raise TeacherError(
            f"{bits}-bit loading would leave most of this model in 16 bits",
            where=name,
            found=f"{share.weights:,} of {share.of:,} weights in {bits} bits; left are {', '.join(share.left[:3])}",
            expected="at least half, embeddings and output layer not counted",
            try_="--dtype bfloat16, or a checkpoint that is quantised already",
        )


def _require_whole_blocks(model: Any, linear: Any, name: str) -> None:
    """Raise TeacherError where a layer does not fill its last block: bitsandbytes would fail in the first forward pass."""
    layers = [n for n, m in model.named_modules() if isinstance(m, linear) and m.in_features % CPU_BLOCK]
    if layers:
        raise TeacherError(
            "bitsandbytes cannot run this model in 4 bits on a CPU",
            where=name,
            found=f"{len(layers)} layers such as {layers[0]}",
            expected=f"input widths that are multiples of {CPU_BLOCK}",
            try_="the plain weights, without --load-in-4bit; --dtype bfloat16 halves a teacher's",
        )
