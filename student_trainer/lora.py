"""LoRA adapters on any model, through peft (arXiv:2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers.pytorch_utils import Conv1D

from kd.common.errors import DataError
from kd.common.extras import needed
from kd.student_trainer.config import LORA_TARGETS


def with_adapters(
    model: Any, rank: int, targets: str | None, *, task_type: str, saved: Sequence[str] | None = None
) -> Any:
    """The model with adapters of `rank` (alpha = 2 x rank); modules in `saved` are trained whole.

    targets     names of linear layers, separated by commas; None = the family's, else peft's own
    task_type   as peft calls it: CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS
    Raises MissingPackageError without peft. Raises DataError where peft cannot adapt the model, or where an adapted output
    layer is the embedding too.
    """
    with needed("peft", "LoRA"):
        from peft import LoraConfig, get_peft_model
    _refuse_tied_head(model, targets)
    transposed = any(isinstance(module, Conv1D) for module in model.modules())  # GPT-2 keeps its weights as [in, out]
    adapters = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        fan_in_fan_out=transposed,
        task_type=task_type,
        modules_to_save=None if saved is None else list(saved),
        target_modules=targets.split(",") if targets else LORA_TARGETS.get(model.config.model_type),
    )
    try:
        return get_peft_model(model, adapters)
    except ValueError as error:
        raise DataError(
            "LoRA cannot adapt this model",
            found=str(error).splitlines()[0],
            try_="--lora-targets with names of its linear layers",
        ) from error


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
