"""LoRA adapters on any model, through peft (arXiv:2106.09685).

Which layers are adapted, unless they are named: the family's of `LORA_TARGETS`, else peft's own for the model type, else all
linear layers but the output layer. Of Mamba's layers that is the first projection alone: its fused kernels read
the weights of the others past the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from kd.common.errors import DataError
from kd.common.extras import needed
from kd.student_trainer.configuration.model_settings import LORA_TARGETS, LoraSettings

STATE_SPACE = "A_log"
"""A parameter by which a state space block (Mamba and its like) is known."""
OTHER_LINEAR = ("router", "gate", "grouped")
"""Words in the names of classes that are made of a linear layer and compute something else."""
BEFORE_KERNELS = ("in_proj",)
"""Layers of such a block that are called as layers, whatever kernels there are."""


def with_adapters(model: Any, settings: LoraSettings, *, task_type: str, saved: Sequence[str] | None = None) -> Any:
    """The model with the adapters that `settings` ask for; modules in `saved` are trained whole.

    task_type   as peft calls it: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS
    Raises MissingPackageError without peft. Raises DataError where peft cannot adapt the model, or where an adapted output
    layer is the embedding too.
    """
    with needed("peft", "LoRA"):
        from peft import LoraConfig, get_peft_model
    assert settings.lora is not None
    targets = settings.lora_targets
    _refuse_tied_head(model, targets)
    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2 keeps its weights as [in, out]
    adapters = LoraConfig(
        r=settings.lora,
        lora_alpha=settings.scale,
        lora_dropout=settings.lora_dropout or 0.0,
        fan_in_fan_out=transposed,
        task_type=task_type,
        modules_to_save=None if saved is None else list(saved),
        target_modules=targets.split(",") if targets else default_targets(model, saved or ()),
    )
    try:
        return get_peft_model(model, adapters)
    except ValueError as error:
        raise DataError(
            "LoRA cannot adapt this model",
            found=str(error).splitlines()[0],
            try_="--lora-targets with names of its linear layers",
        ) from error


def default_targets(model: Any, saved: Sequence[str] = ()) -> list[str]:
    """Names of the layers that adapters go on by default: ends of names, or whole names where all linear layers are meant."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as OF_PEFT

    linear = _linear_layers(model, saved)
    text = model.config.get_text_config()
    kind = text.model_type
    if text is not model.config:  # beside the text model there is one for images, with layers of the same names
        inside = tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "config", None) is text)
        return [layer for layer in linear if layer.startswith(inside)]
    for names in (LORA_TARGETS.get(kind), OF_PEFT.get(kind), OF_PEFT.get(kind.removesuffix("_text"))):
        if isinstance(names, list) and any(layer.rpartition(".")[2] in names for layer in linear):
            return list(names)
    return linear


def _linear_layers(model: Any, saved: Sequence[str]) -> list[str]:
    """Names of all plain linear layers that an adapter changes the output of.

    Not among them are the output layer, what is `saved` whole, and routers that are made of a linear layer (Llama 4, Phi-MoE).
    """
    head = model.get_output_embeddings()
    blocks = tuple(f"{name}." for name, module in model.named_modules() if hasattr(module, STATE_SPACE))
    layers = []
    for name, module in model.named_modules():
        kind = type(module).__name__.lower()
        plain = isinstance(module, nn.Linear | Conv1D) and not any(word in kind for word in OTHER_LINEAR)
        if not plain or module is head or not set(saved).isdisjoint(name.split(".")):
            continue
        if not name.startswith(blocks) or name.rpartition(".")[2] in BEFORE_KERNELS:
            layers.append(name)
    return layers


def _refuse_tied_head(model: Any, targets: str | None) -> None:
    head = model.get_output_embeddings()
    if head is None or not targets or head.weight is not model.get_input_embeddings().weight:
        return
    name = next(name for name, module in model.named_modules() if module is head)
    if any(f".{name}".endswith(f".{target}") for target in targets.split(",")):
        raise DataError(
            "an adapter on the output layer cannot be merged where the embedding is the same tensor",
            where=type(model).__name__,
            found=f"--lora-targets {targets}",
            try_=f"leave {name} out",
        )


@dataclass(frozen=True)
class TrainedAdapter:
    """The adapters of a model, taken out of it: it may be written more than once, and after they were merged."""

    config: Any
    """peft's configuration."""
    tensors: dict[str, Tensor]
    """The trained weights by the names that peft gives them in files."""

    @classmethod
    def of(cls, model: Any, base: str | None) -> TrainedAdapter:
        """The adapters in a PeftModel; `base` is the name of the model that they belong to, None where it has random weights."""
        from peft import get_peft_model_state_dict

        config = model.peft_config["default"]
        config.base_model_name_or_path = base
        config.inference_mode = True
        tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
        return cls(config, {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write the two files by which peft knows an adapter."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        self.config.save_pretrained(str(folder))
        save_file(self.tensors, str(Path(folder) / "adapter_model.safetensors"), metadata={"format": "pt"})
