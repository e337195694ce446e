"""Columns of the output layer: what some families add to their logits, which ids they never predict, and which columns they drop.

BART, Marian, mBART, Pegasus and their like add a `final_logits_bias`. Chameleon writes the smallest number of the dtype over the
logits of images, which no text contains; here those columns get a bias that leaves them no probability. Inkling's output layer
is padded, and its model drops the columns of the padding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NEVER = -1e4
"""Bias of a column that is never predicted, in nats: exp(-10000) is 0 in float64 too, and sums of such numbers stay finite."""


def final_bias(model: Any) -> torch.Tensor | None:
    """`[V]`: what a model adds to the output layer's logits, `NEVER` for ids that it never predicts; None for most models."""
    added = getattr(model, "final_logits_bias", None)
    bias: torch.Tensor | None = None if added is None else added.view(-1)
    masked = _masked_ids(model)
    if not masked:
        return bias
    import torch

    weight = model.get_output_embeddings().weight
    device = "cpu" if weight.device.type == "meta" else weight.device  # a weight that is offloaded
    bias = torch.zeros(weight.shape[0], dtype=weight.dtype, device=device) if bias is None else bias.clone()
    bias[masked] = NEVER
    return bias


def with_final_bias(model: Any, bias: torch.Tensor | None) -> torch.Tensor | None:
    """The bias `[V]` of the output layer, and what the model adds to its logits."""
    final = final_bias(model)
    return bias if final is None else final if bias is None else bias + final.to(bias.device)


def counted_columns(
    model: Any, weight: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`[V', d]` and `[V']`: the columns that the model's logits have. Most models have all, and get their own tensors back."""
    width = getattr(model.config.get_text_config(decoder=True), "unpadded_vocab_size", None)
    if not isinstance(width, int) or not 0 < width < weight.shape[0]:
        return weight, bias
    return weight[:width], None if bias is None else bias[:width]


def _masked_ids(model: Any) -> list[int]:
    mapping = getattr(getattr(model, "model", None), "vocabulary_mapping", None)
    return [int(i) for i in getattr(mapping, "image_tokens", ())]
