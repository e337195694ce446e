"""Losses whose gradient a Triton kernel writes over the output layer's products: `kd train --kernels`.

The kernel (`triton_kernels`) covers `kl` with its tail as one outcome or renormalised, for rows of one length and of many, and
`ce`. Everything else, and every CPU, keeps torch's kernels (`kd.student_trainer.losses.row_kernels`), which are also the twin
that proves the Triton kernel before use: on the first rows of every kind that it meets, both compute sums and gradients.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.common.errors import DataError, unknown_name
from kd.common.extras import is_installed
from kd.models.families.logit_transform import LogitTransform
from kd.student_trainer.faster.triton_launch import KeptIds, gradient_rows_
from kd.student_trainer.losses.loss_registry import LOSSES, Objective
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.losses.loss_targets import LossTargets, need
from kd.student_trainer.losses.row_kernels import DivergenceKernel, kl_outcomes, sums_of

KERNELS = ("auto", "torch", "triton")
"""What `--kernels` may be."""
PROOF_ROWS = 16
"""Rows on which both kernels are compared."""
ROUNDINGS = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 2**-9, torch.bfloat16: 2**-6}
"""Largest relative difference of a gradient: the exponential of a GPU in float32, or two steps of a narrower type."""
NEGLIGIBLE = 1e-5
"""Part of the largest gradient of a row that may be off: q - p of equal q and p is as small as their roundings."""
FURTHER = "--kernels torch"


class FusedLoss:
    """An objective whose gradient is written over products of hidden states and output layer, in their own type."""

    def __init__(self, objective: Objective, say: Callable[[str], object], *, required: bool = False) -> None:
        self.objective = objective
        self.required = required
        """Whether a kernel that does not run is an error; else it is said, and torch's kernels go on."""
        self._say = say
        self._proven: set[tuple[object, ...]] = set()
        self._refused = False

    def gradient_(self, logits: Tensor, targets: LossTargets) -> Tensor:
        """As `Objective.gradient_`, with torch's kernels."""
        return self.objective.gradient_(logits, targets)

    def product_gradient_(
        self, products: Tensor, bias: Tensor | None, transform: LogitTransform, targets: LossTargets
    ) -> Tensor:
        """`products [n, V]` -> the sums `[3]` of (total, kd, ce), nats; `products` become d total / d products.

        bias        [V] in at least float32, or None
        transform   what the model does to its logits, bias included
        """
        arguments = (bias, transform, targets)
        kind = (products.dtype, bias is None, transform, targets.kept is None)
        if not self._refused and len(products) and kind not in self._proven:
            self._prove(products[:PROOF_ROWS], bias, transform, targets[: min(PROOF_ROWS, len(products))])
            self._proven.add(kind)
        if self._refused:
            return torch_gradient_(self.objective, products, *arguments)
        return triton_gradient_(self.objective, products, *arguments)

    def _prove(self, products: Tensor, bias: Tensor | None, transform: LogitTransform, targets: LossTargets) -> None:
        """Compare both kernels on some rows, which stay as they are. Raises DataError where Triton's are required."""
        # with the strides of all rows: Triton compiles another kernel for strides that are no multiple of 16
        written = torch.empty_strided(products.shape, products.stride(), dtype=products.dtype, device=products.device)
        expected, failure = written.copy_(products).clone(), None
        try:
            sums = triton_gradient_(self.objective, written, bias, transform, targets)
            twin = torch_gradient_(self.objective, expected, bias, transform, targets)
            if not alike(written, expected, sums, twin):
                difference = float((written.double() - expected.double()).abs().max())
                failure = f"gradients differ by {difference:.2g}, sums are {sums.tolist()} and {twin.tolist()}"
        except Exception as error:  # Triton raises many unrelated types
            failure = f"{type(error).__name__}: {(str(error).splitlines() or ['-'])[0]}"
        if failure is None:
            return
        if self.required:
            raise DataError(
                "the Triton kernels of the loss do not compute here what torch's kernels do",
                found=failure,
                expected="the same sums and gradients on the first rows",
                try_=FURTHER,
            )
        self._refused = True
        self._say(f"the loss uses torch's kernels, because Triton's do not run here as they should: {failure}")


def alike(written: Tensor, expected: Tensor, sums: Tensor, twin: Tensor) -> bool:
    """Whether gradients `[n, V]` and sums `[3]` are the same up to roundings."""
    wide, other = written.double(), expected.double()
    negligible = NEGLIGIBLE * other.abs().amax(dim=1, keepdim=True)
    near = (wide - other).abs() <= ROUNDINGS[written.dtype] * other.abs() + negligible
    same = near | (wide == other) | (wide.isnan() & other.isnan())
    return bool(same.all()) and torch.allclose(sums.double(), twin.double(), rtol=1e-4, atol=1e-3, equal_nan=True)


def torch_gradient_(
    objective: Objective, products: Tensor, bias: Tensor | None, transform: LogitTransform, targets: LossTargets
) -> Tensor:
    """`FusedLoss.product_gradient_` by torch's kernels."""
    wide = torch.promote_types(products.dtype, torch.float32)
    logits = products.to(wide)
    if bias is not None:
        logits.add_(bias)
    slope = transform.slope(transform.apply_(logits))
    sums = objective.gradient_(logits, targets)
    transform.chain_(logits, slope)
    if logits is not products:
        products.copy_(logits)
    return sums


def triton_gradient_(
    objective: Objective, products: Tensor, bias: Tensor | None, transform: LogitTransform, targets: LossTargets
) -> Tensor:
    """`FusedLoss.product_gradient_` by the Triton kernel; only for objectives that it `covers`."""
    weights, kept = objective.weights, None
    kd_weight, ce_weight, temperature = weights.kd, weights.ce, weights.temperature
    if objective.loss == "ce":
        kd_weight, ce_weight, temperature = 0.0, 1.0, 1.0
    else:
        kernel = LOSSES[objective.loss].kernels[objective.tail]
        assert isinstance(kernel, DivergenceKernel)
        p, p_rest = kernel.teacher(targets)
        kept = KeptIds(need(targets.token_ids).flatten(), p.flatten(), p_rest, starts_of(targets))
    kd, ce = gradient_rows_(
        products,
        bias,
        targets.gold_ids,
        kept,
        kd_weight=kd_weight,
        ce_weight=ce_weight,
        temperature=temperature,
        transform=transform,
    )
    return sums_of(kd_weight * kd.sum(), ce_weight, kd.sum(), ce.sum())


def starts_of(targets: LossTargets) -> Tensor:
    """`[n + 1]` where each row's kept ids begin, on their device: nothing waits."""
    if targets.kept is not None:
        return F.pad(targets.kept.cumsum(0), (1, 0))
    rows, count = need(targets.token_ids).shape
    return torch.arange(rows + 1, device=targets.gold_ids.device) * count


def covers(objective: Objective) -> bool:
    """Whether the Triton kernel computes this loss."""
    kernel = LOSSES[objective.loss].kernels.get(objective.tail)
    return objective.loss == "ce" or (isinstance(kernel, DivergenceKernel) and kernel.divergence is kl_outcomes)


def with_kernels(
    objective: Objective, kernels: str, device: str, say: Callable[[str], object]
) -> Objective | FusedLoss:
    """The objective with the kernels that a run asks for: `auto`, `torch` or `triton`; see `reason_against`.

    device   type of the device that the student is trained on
    say      receives a sentence where `auto` cannot use Triton's kernels on a GPU

    Raises DataError for `triton` where its kernel cannot run.
    """
    if kernels not in KERNELS:
        raise unknown_name("kind of kernels", kernels, KERNELS)
    if kernels == "torch":
        return objective
    reason = reason_against(objective, device)
    if reason is None and (kernels == "triton" or device == "cuda"):
        return FusedLoss(objective, say, required=kernels == "triton")
    if kernels == "triton":
        raise DataError("the loss has no Triton kernel here", found=reason, try_="--kernels auto, or --kernels torch")
    if device == "cuda" and covers(objective):
        say(f"the loss uses torch's kernels: {reason}")
    return objective


def reason_against(objective: Objective, device: str) -> str | None:
    """Why the Triton kernel cannot be used, in words; None where it can. Triton is not imported.

    With TRITON_INTERPRET=1 it runs on a CPU too, a thousand times slower: for tests.
    """
    if not covers(objective):
        return f"loss {objective.loss}, tail {objective.tail}; there is one for kl (ghost, renorm) and ce"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"device {device}; it runs on a GPU (cuda)"
    if not is_installed("triton"):
        return "Triton is not installed; torch for CUDA brings it on Linux, and the extra triton"
    return None


def shared_with_kernels(objective: Objective, kernels: str, device: str) -> Objective | FusedLoss:
    """`with_kernels` for loops that ask at every step: one object for equal losses, so that its kernel is proven once.

    What `say` would receive is a warning.
    """
    if kernels == "torch" or not covers(objective):
        return with_kernels(objective, kernels, device, warnings.warn)
    return _shared(replace(objective, settings=GroupSettings()), kernels, device)


@lru_cache(maxsize=64)
def _shared(objective: Objective, kernels: str, device: str) -> Objective | FusedLoss:
    return with_kernels(objective, kernels, device, warnings.warn)
