"""Liger's Triton kernels in the student's layers: `kd train --liger` (arXiv:2410.10989).

As in transformers' `use_liger_kernel`, Liger chooses by the type of the model which of its norms, rotary positions and
feed-forward layers are replaced. Its losses are left out: a distillation loss has a kernel of its own (`head`).
The kernels are proven before use: hidden states and gradients of a few tokens, before and after. The rotary positions are
replaced for all models of the family in this process, which is how Liger does it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kd.common.errors import DataError
from kd.common.extras import needed
from kd.models.heads import EncoderDecoderHead, split_head

COMPARED = (2, 37)
"""Rows and tokens of the comparison: a length that is no multiple of any block."""
TOLERANCE = 1e-3
"""Largest relative difference of hidden states and of gradients. Roundings of float32 stay below 1e-4 through many layers; a
norm that adds no 1 to its weight, or a rotation of other pairs, is off by far more than 1e-2."""


def use_liger_kernels(model: Any, *, device: str) -> None:
    """Give the student Liger's kernels, in place; it is on `device` afterwards. Raises DataError, MissingPackageError."""
    if device != "cuda":
        raise DataError(
            "Liger's kernels run on a GPU",
            found=f"device {device}",
            expected="cuda",
            try_="--no-liger; the losses are the same without it",
        )
    with needed("liger_kernel", "--liger"):
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    kind = model.config.model_type
    if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise DataError(
            "Liger has no kernels for this student",
            found=kind,
            expected=", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN)),
            try_="--no-liger",
        )
    if not getattr(model, "is_quantized", False):  # else it is there already
        model.to(device)
    compare_kernels(
        model,
        lambda: _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False),
    )


def compare_kernels(model: Any, replace: Callable[[], object]) -> None:
    """Call `replace`, which changes the model's layers in place. Raises DataError unless the model computes the same after it."""
    before = _outcomes(model)
    try:
        replace()
        after = _outcomes(model)
    except DataError:
        raise
    except Exception as error:  # Triton raises many unrelated types
        raise DataError(
            "Liger's kernels do not run here",
            where=type(model).__name__,
            found=f"{type(error).__name__}: {(str(error).splitlines() or ['-'])[0]}",
            try_="--no-liger",
        ) from error
    for what in before:
        difference = float((after[what] - before[what]).norm() / before[what].norm())
        if not difference <= TOLERANCE:  # NaN is no agreement
            raise DataError(
                "Liger's kernels compute something else than the student's own layers",
                where=type(model).__name__,
                found=f"{what} differ by {difference:.2g} of their size",
                expected=f"at most {TOLERANCE:g}",
                try_="--no-liger, or another release of liger-kernel",
            )


def _outcomes(model: Any) -> dict[str, Tensor]:
    """What the model computes for a few random tokens: hidden states, and the gradients of all its trained weights."""
    parts, training = split_head(model), model.training
    generator = torch.Generator().manual_seed(0)
    size = parts.weight.shape[0]
    ids = torch.randint(0, size, COMPARED, generator=generator).to(parts.weight.device)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    model.eval()  # without dropout
    try:
        with torch.enable_grad():
            if isinstance(parts, EncoderDecoderHead):
                hidden = parts.decode(ids, None, ids)
            else:
                hidden = parts.hidden(ids, torch.ones_like(ids))
            weights = torch.randn(hidden.shape, generator=generator).to(hidden.device)
            grads = torch.autograd.grad((hidden * weights).sum(), trained, allow_unused=True)
    finally:
        model.train(training)
    gradients = [grad.float().flatten() for grad in grads if grad is not None]
    return {"hidden states": hidden.detach().float()} | ({"gradients": torch.cat(gradients)} if gradients else {})
