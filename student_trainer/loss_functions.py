"""The training's loss as functions of a batch: from logits, or from hidden states and the output layer.

They are for training loops of your own. `kd.train` computes the same numbers with the same code: a loss by `Objective`, its
chunked form by `chunked_head_loss`. Shapes: B sequences, T tokens, d hidden size, N scored positions, V logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kd.models.families.logit_transform import PLAIN, LogitTransform
from kd.models.heads import proven_transform
from kd.student_trainer.batches.collate import loss_targets
from kd.student_trainer.faster.fused_loss import shared_with_kernels
from kd.student_trainer.head import chunked_head_loss, layer_parameters, rows_at_once
from kd.student_trainer.head import output_layer as output_layer_of
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_targets import LossTargets


class LossParts(NamedTuple):
    """A loss and what it is made of, as scalars in nats. Only `loss` carries a gradient.

    `loss` is alpha * kd + ce_weight * ce per position; divergences are multiplied by the squared temperature in it.
    `kd` is the distillation loss alone, `ce` the cross-entropy alone.

    >>> import kd, torch
    >>> batch = {"gold_ids": torch.tensor([1])}
    >>> parts = kd.distillation_loss(torch.zeros(1, 4), batch, kd.Objective("ce", "none", alpha=0.0))
    >>> isinstance(parts, kd.LossParts), round(float(parts.ce), 4)
    (True, 1.3863)
    """

    loss: Tensor
    """What to minimise, per position."""
    kd: Tensor
    """Distillation loss per position, or per example for losses over aligned text; 0 for `ce`."""
    ce: Tensor
    """Cross-entropy per position."""


def distillation_loss(
    logits: Any,
    batch: Mapping[str, Any],
    objective: Objective,
    *,
    vocabulary_size: int | None = None,
    step_positions: Tensor | float | None = None,
    step_units: Tensor | float | None = None,
) -> LossParts:
    """The loss of a batch, given the student's logits.

    logits            the model's output, or its logits `[B, T, V]`, or only the rows `[N, V]` that are scored
    batch             a batch of `kd.CacheDataset`, or tensors named as the fields of `LossTargets`
    objective         what is compared, and how it is weighed: `CacheDataset.objective`
    vocabulary_size   logits that count; the columns after them are padding. None = all of them
    step_positions    scored positions of the whole step, where it has several batches or devices; None = of this batch
    step_units        the same of `batch["units"]`, which losses over aligned text have; None = of this batch

    Sums are divided by these counts, so the losses of a step's batches add up to the loss of the step.

    >>> import kd, torch
    >>> batch = {
    ...     "gold_ids": torch.tensor([2]),
    ...     "token_ids": torch.tensor([[2, 0]]),
    ...     "logprobs": torch.tensor([[0.75, 0.125]]).log(),
    ...     "tail_mass": torch.tensor([0.125]),
    ... }
    >>> teacher = torch.tensor([[0.125, 0.0625, 0.75, 0.0625]]).log()
    >>> round(float(kd.distillation_loss(teacher, batch, kd.Objective("kl")).loss), 6)
    0.0
    >>> round(float(kd.distillation_loss(torch.zeros(1, 4), batch, kd.Objective("kl")).loss), 4)
    0.564
    """
    rows = scored_rows(getattr(logits, "logits", logits), batch)
    rows = rows[:, : vocabulary_size or rows.shape[1]]
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    counts = _counts(batch, step_positions, step_units)
    targets = _targets(batch, rows.device, counts)
    total, kd, ce = objective(rows, targets)
    return _means(total.sum(), kd.sum(), ce.sum(), counts)


def chunked_distillation_loss(
    hidden: Any,
    output_layer: Any,
    batch: Mapping[str, Any],
    objective: Objective,
    *,
    vocabulary_size: int | None = None,
    chunk: int | None = None,
    kernels: str = "auto",
    step_positions: Tensor | float | None = None,
    step_units: Tensor | float | None = None,
) -> LossParts:
    """The loss of a batch, given hidden states and the output layer: logits exist for `chunk` rows at a time.

    hidden            what enters the output layer: the body's output, or its hidden states `[B, T, d]`, or the rows `[N, d]`
                      that are scored
    output_layer      the model; or its output layer, with or without LoRA adapters; or `(weight [V, d], bias [V] or None)`.
                      Give the model where it changes its logits: a bias (BART, Marian), a scale (Cohere, Granite) or a soft
                      cap (Gemma)
    chunk             rows of logits at once; None = as many as suit the vocabulary and the device
    kernels           `auto`, `torch` or `triton`, as `--kernels` of `kd train`

    The other arguments are those of `distillation_loss`, and so is the result. Gradients are computed with the loss, so
    `loss.backward()` costs next to nothing. Where a model scales its hidden states (T5 with tied embeddings), scale them before
    you pass them.

    >>> import kd, torch
    >>> batch = {"gold_ids": torch.tensor([3, 1])}
    >>> hidden, layer = torch.randn(2, 8, requires_grad=True), torch.nn.Linear(8, 5)
    >>> objective = kd.Objective("ce", "none", alpha=0.0)
    >>> chunked = kd.chunked_distillation_loss(hidden, layer, batch, objective, chunk=1).loss
    >>> whole = kd.distillation_loss(layer(hidden), batch, objective).loss
    >>> torch.allclose(chunked, whole)
    True
    >>> chunked.backward()
    >>> hidden.grad.shape
    torch.Size([2, 8])
    """
    rows = scored_rows(getattr(hidden, "last_hidden_state", hidden), batch)
    weight, bias, transform = _output(output_layer)
    width = vocabulary_size or weight.shape[0]
    counts = _counts(batch, step_positions, step_units)
    loss = shared_with_kernels(objective, kernels, rows.device.type)
    sums = chunked_head_loss(
        rows,
        weight,
        bias,
        loss,
        _targets(batch, rows.device, counts),
        vocabulary_size=width,
        chunk=chunk or rows_at_once(weight, bias, loss, width),
        transform=transform,
    )
    return _means(*sums, counts)


def _output(layer: Any) -> tuple[Tensor, Tensor | None, LogitTransform]:
    """Weight `[V, d]` and bias `[V]` of a model, of an output layer, or as they were given; and what a model does to its logits."""
    if isinstance(layer, tuple):
        return *layer, PLAIN
    if hasattr(layer, "get_output_embeddings"):
        return *output_layer_of(layer), proven_transform(layer)
    return *layer_parameters(layer), PLAIN


def scored_rows(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """`[B, T, X]` of all tokens -> `[N, X]` of the positions that are scored; `[N, X]` stays as it is."""
    if values.dim() == 2:
        return values
    return values.flatten(0, 1).index_select(0, batch["positions"])


Count = Tensor | float


def _counts(batch: Mapping[str, Any], positions: Count | None, units: Count | None) -> tuple[Count, Count]:
    """What the cross-entropy and the distillation loss are divided by. A batch without any group must not divide by 0."""
    positions = len(batch["gold_ids"]) if positions is None else positions
    if "units" not in batch:
        return positions, positions
    return positions, torch.as_tensor(batch["units"] if units is None else units).reshape(()).clamp(min=1)


def _targets(batch: Mapping[str, Any], device: torch.device, counts: tuple[Count, Count]) -> LossTargets:
    tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    if "units" in batch:
        tensors["kd_scale"] = torch.as_tensor(counts[0] / counts[1], dtype=torch.float32, device=device)
    return loss_targets(tensors)


def _means(total: Tensor, kd: Tensor, ce: Tensor, counts: tuple[Count, Count]) -> LossParts:
    positions, units = counts
    return LossParts(total / positions, (kd / units).detach(), (ce / positions).detach())
