"""The student's output layer and the loss in one step, `chunk` rows at a time.

`[N, V]` logits are the largest tensor of training (GPT-2, 8,192 positions: 1.6 GB in float32, several copies).
Here each chunk of rows computes its logits, its loss and, at once, its gradient, which is folded into the
gradients of hidden states and weight; nothing of size V outlives its chunk. One matrix product forward and two
backward, as in plain training, with no recomputation. Idea: Liger-Kernel's fused linear losses, arXiv:2410.10989.
How many rows: `rows_at_once`.

A `FusedLoss` writes its gradient over the products in their own type, by a Triton kernel. Its chunks have as many bytes as others
and so more rows, and each row begins at a multiple of 64 columns, so that rows are read 16 bytes at a time.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.models.batching.padded_batches import head_rows
from kd.models.families.logit_transform import PLAIN, LogitTransform
from kd.models.families.output_columns import counted_columns, with_final_bias
from kd.models.heads import split_head
from kd.student_trainer.batches.collate import loss_targets
from kd.student_trainer.faster.fused_loss import FusedLoss
from kd.student_trainer.losses.loss_targets import LossTargets

ALIGNED = 64
"""Columns: rows of products for a fused loss begin at a multiple of them."""


class ChunkLoss(Protocol):
    """A loss over a chunk of logits."""

    def gradient_(self, logits: Tensor, targets: LossTargets, /) -> Tensor:
        """`logits [n, V]` -> the sums `[3]` of (total, kd, ce); `logits` become d total / d logits."""


def chunked_head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    loss: ChunkLoss,
    targets: LossTargets,
    *,
    vocabulary_size: int,
    chunk: int,
    transform: LogitTransform = PLAIN,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of `(total, kd, ce)`, nats; gradients flow from `total` to hidden, weight and bias.

    hidden   [N, d]
    weight   [V', d], V' >= vocabulary_size; columns of padding are cut off before the loss
    bias     [V'] or None
    loss     as `kd.student_trainer.losses.loss_registry.Objective`
    transform   what the model does to the logits
    returns  three scalars; kd and ce carry no gradient
    """
    total, parts = _ChunkedHead.apply(hidden, weight, bias, loss, targets, vocabulary_size, chunk, transform)  # type: ignore[no-untyped-call]
    return total, parts[0], parts[1]


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        loss: ChunkLoss,
        targets: LossTargets,
        vocabulary_size: int,
        chunk: int,
        transform: LogitTransform,
    ) -> tuple[Tensor, Tensor]:
        device, dtype = hidden.device.type, product_type(weight)
        w = weight.detach()[:vocabulary_size].to(dtype)
        # gradients of the parameters are summed in at least float32, whatever the products are computed in
        wide = torch.promote_types(weight.dtype, torch.float32)
        b = None if bias is None else bias.detach()[:vocabulary_size].to(wide)  # 19 nats in bfloat16 are off by 0.06
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if ctx.needs_input_grad[1] else None
        grad_bias = (
            torch.zeros(bias.shape, dtype=wide, device=weight.device)
            if bias is not None and ctx.needs_input_grad[2]
            else None
        )
        sums = torch.zeros(3, dtype=wide, device=hidden.device)
        pieces = targets.pieces(chunk)
        buffer = None  # one for all chunks: fresh pages of this size cost more than the arithmetic in them
        fused = loss if isinstance(loss, FusedLoss) else None
        if dtype == wide or fused is not None:
            most = max((p.stop - p.start for p in pieces), default=0)
            width = vocabulary_size if fused is None else -(-vocabulary_size // ALIGNED) * ALIGNED
            buffer = w.new_empty(most, width)[:, :vocabulary_size]
        slopes = None if buffer is None or transform.cap is None or fused is not None else torch.empty_like(buffer)
        with torch.autocast(device, enabled=False):
            for rows in pieces:
                h, slope = hidden.detach()[rows].to(dtype), None
                if fused is not None and buffer is not None:
                    grad = torch.mm(h, w.T, out=buffer[: len(h)])
                    grad = grad if grad_bias is None else grad.to(wide)  # a bias's gradient is a sum of unrounded ones
                    sums += fused.product_gradient_(grad, b, transform, targets[rows])
                elif buffer is None:
                    grad = F.linear(h, w).to(wide)
                    grad = grad if b is None else grad.add_(b)
                else:
                    grad = buffer[: len(h)]
                    torch.mm(h, w.T, out=grad) if b is None else torch.addmm(b, h, w.T, out=grad)
                if fused is None:
                    slope = transform.slope(transform.apply_(grad), slopes)
                    sums += loss.gradient_(grad, targets[rows]).to(wide)
                    transform.chain_(grad, slope)
                narrow = grad.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = (narrow @ w).to(hidden.dtype)
                if grad_weight is not None and dtype == wide:
                    grad_weight[:vocabulary_size].addmm_(narrow.T, h)
                elif grad_weight is not None:
                    grad_weight[:vocabulary_size] += narrow.T @ h
                if grad_bias is not None:
                    grad_bias[:vocabulary_size] += grad.sum(dim=0)
                del grad, narrow, slope  # or they would still be there while the next chunk's are made
        ctx.save_for_backward(  # freed by the backward pass, unless it is told to retain the graph
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
        )
        parts = sums[1:].clone()
        ctx.mark_non_differentiable(parts)
        return sums[0].clone(), parts

    @staticmethod
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        scaled = tuple(None if g is None else g * grad_total.to(g.dtype) for g in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)


def product_type(weight: Tensor) -> torch.dtype:
    """The type in which hidden states are multiplied with the output layer's weight: that of autocast, or the weight's."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def rows_at_once(weight: Tensor, bias: Tensor | None, loss: ChunkLoss, vocabulary_size: int) -> int:
    """Rows per chunk that suit the vocabulary and the device; more where a fused loss makes no float32 copy of narrow products."""
    rows = head_rows(vocabulary_size, weight.device.type, training=True)
    widened = not isinstance(loss, FusedLoss) or (bias is not None and bias.requires_grad)
    return rows if widened else rows * max(1, 4 // product_type(weight).itemsize)


class Unrounded:
    """Float targets of a batch on their way into `forward`.

    FSDP in mixed precision casts every floating-point tensor among a forward's arguments, in dictionaries, lists and
    dataclasses too, to the precision of the weights: log-probabilities would lose all but 8 bits, and nothing would say so.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors = tensors


def forward_arguments(batch: dict[str, Tensor]) -> dict[str, Any]:
    """A collated batch as arguments of the forward that `attach_loss` makes, its float targets kept as they are."""
    floats = {name: value for name, value in batch.items() if value.is_floating_point()}
    return {name: value for name, value in batch.items() if name not in floats} | {"unrounded": Unrounded(floats)}


def attach_loss(model: Any, loss: ChunkLoss, vocabulary_size: int, chunk: int | None = None) -> tuple[Any, ...]:
    """Replace `model.forward` by one that returns loss sums of a collated batch instead of logits; see `forward_arguments`.

    `chunk` rows of the output layer at once; None = `rows_at_once`. Returns the modules that compute the hidden states.
    """
    parts = split_head(model)

    def forward(self: Any, positions: Tensor, unrounded: Unrounded | None = None, **batch: Any) -> dict[str, Tensor]:
        batch |= {} if unrounded is None else unrounded.tensors
        rows = parts.batch_hidden(batch).flatten(0, 1).index_select(0, positions)
        weight, bias = output_layer(model)
        total, kd, ce = chunked_head_loss(
            rows,
            weight,
            bias,
            loss,
            loss_targets(batch),
            vocabulary_size=vocabulary_size,
            chunk=chunk or rows_at_once(weight, bias, loss, vocabulary_size),
            transform=parts.transform,
        )
        return {"loss": total, "kd": kd, "ce": ce}

    model.forward = MethodType(forward, model)
    return parts.bodies


def output_layer(model: Any) -> tuple[Tensor, Tensor | None]:
    """Weight `[V, d]` and bias `[V]` of a model's output layer as they count now.

    LoRA adapters on it are added, with gradients, and so is the `final_logits_bias` of a model that has one. Columns that the
    model drops are left out.
    """
    weight, bias = layer_parameters(model.get_output_embeddings())
    return counted_columns(model, weight, with_final_bias(model, bias))


def layer_parameters(layer: Any) -> tuple[Tensor, Tensor | None]:
    """Weight `[V, d]` and bias `[V]` of a linear layer; LoRA adapters on it are added, with gradients."""
    if not hasattr(layer, "base_layer"):
        return layer.weight, layer.bias
    weight = layer.base_layer.weight
    for name in layer.active_adapters:
        weight = weight + layer.get_delta_weight(name)
    return weight, layer.base_layer.bias


def detach_loss(model: Any) -> None:
    """Give the model its own forward back."""
    del model.forward
