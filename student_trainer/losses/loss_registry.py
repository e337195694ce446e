"""The losses by name, and `Objective`: a loss with its weights and settings, as training runs it.

`LOSSES` names every loss, its variants, what it needs of a cache, and its kernels; `Objective` hands each what it takes. A
loss that has no kernel runs by autograd on each chunk of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from kd.common.errors import unknown_name
from kd.student_trainer.losses.by_group import alm, hybrid, uld
from kd.student_trainer.losses.by_row import cross_entropy, jsd, kl_ghost, kl_renorm, kl_reverse, kl_sampled
from kd.student_trainer.losses.by_text import text_kernel, text_kl
from kd.student_trainer.losses.group_kernels import GroupKernel, alm_kernel, exact_uld, fast_uld, hybrid_comparison
from kd.student_trainer.losses.loss_settings import GroupSettings, LossWeights
from kd.student_trainer.losses.loss_targets import LossTargets, need
from kd.student_trainer.losses.row_kernels import (
    DivergenceKernel,
    Kernel,
    cross_entropy_kernel,
    jsd_outcomes,
    kl_outcomes,
    outcomes_with_floored_tail,
    outcomes_with_tail,
    renormalised_outcomes,
    reverse_kl_outcomes,
    sampled_kernel,
)

LossFunction = Callable[..., Tensor]
"""A row loss `(logits, targets, temperature=…) -> [N]`, or a group loss `(logits, groups, settings) -> [G]`."""


@dataclass(frozen=True)
class Loss:
    """A way of learning from a teacher."""

    variants: Mapping[str, LossFunction]
    """Tail mode -> function."""
    groups: bool = False
    """Whether groups of aligned text are compared (any tokenizer), and not row by row (the teacher's tokenizer)."""
    text: bool = False
    """Whether the student's own tokens are compared row by row with what the teacher expects of the text (any tokenizer)."""
    squared: bool = False
    """Whether the loss is multiplied by T^2, so that gradients keep their size (Hinton et al. 2015)."""
    needs: tuple[str, ...] = ()
    """What the cache must hold: `ids`, `logprobs`, `bands`."""
    options: tuple[str, ...] = ()
    """Fields of `GroupSettings` that a row loss takes as keywords."""
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    """Tail mode -> the same loss with its gradient worked out; without one, and where groups are merged exactly, autograd runs on
    the chunk."""

    weights: tuple[float, float] = (1.0, 0.0)
    """Weights of the loss and of the cross-entropy, where the settings name none."""

    @property
    def any_tokenizer(self) -> bool:
        """Whether the student reads the text in its own tokens."""
        return self.groups or self.text


TAILS: dict[str, LossFunction] = {"ghost": kl_ghost, "sampled": kl_sampled, "renorm": kl_renorm}
"""How `kl` treats the probability outside the top-k."""

LOSSES: dict[str, Loss] = {
    "kl": Loss(
        TAILS,
        squared=True,
        needs=("ids",),
        kernels={
            "ghost": DivergenceKernel(kl_outcomes, outcomes_with_tail),
            "renorm": DivergenceKernel(kl_outcomes, renormalised_outcomes),
            "sampled": sampled_kernel,
        },
    ),
    "reverse-kl": Loss(
        {"ghost": kl_reverse},
        squared=True,
        needs=("ids",),
        kernels={"ghost": DivergenceKernel(reverse_kl_outcomes, outcomes_with_floored_tail)},
    ),
    "jsd": Loss(
        {"ghost": jsd},
        squared=True,
        needs=("ids",),
        options=("beta",),
        kernels={"ghost": DivergenceKernel(jsd_outcomes, outcomes_with_floored_tail)},
    ),
    "text-kl": Loss(
        {"none": text_kl},
        text=True,
        squared=True,
        needs=("ids", "logprobs"),
        kernels={"none": text_kernel},
        weights=(0.5, 0.5),
    ),
    "uld": Loss(
        {"bands": uld},
        groups=True,
        needs=("logprobs", "bands"),
        kernels={"bands": GroupKernel({"exact": exact_uld, "fast": fast_uld})},
        weights=(0.5, 0.5),
    ),
    "hybrid": Loss(
        {"bands": hybrid},
        groups=True,
        needs=("ids", "logprobs", "bands"),
        kernels={"bands": GroupKernel({"exact": hybrid_comparison, "fast": hybrid_comparison})},
        weights=(0.5, 0.5),
    ),
    "alm": Loss({"none": alm}, groups=True, kernels={"none": alm_kernel}, weights=(1.0, 1.0)),
    "ce": Loss({"none": cross_entropy}, kernels={"none": cross_entropy_kernel}),
}
"""Name -> loss. `ce` is plain fine-tuning on the same text, the baseline; `hybrid` always ranks exactly."""


@dataclass(frozen=True)
class Objective:
    """alpha * kd + ce_weight * CE; kd times T^2 where the loss asks for it. See `LOSSES`.

    `CacheDataset.objective` is the one that suits a cache; losses over aligned text need its settings.

    >>> import kd
    >>> objective = kd.Objective("kl", alpha=0.75, temperature=2.0)
    >>> objective.ce
    0.25
    >>> kd.Objective("kll")
    Traceback (most recent call last):
    kd.common.errors.DataError: unknown loss 'kll'
      did you mean  kl
      known         alm, ce, hybrid, jsd, kl, reverse-kl, text-kl, uld
    """

    loss: str = "kl"
    """Key of `LOSSES`."""
    tail: str = "ghost"
    """Key of the loss's variants."""
    alpha: float = 1.0
    """Weight of the distillation loss."""
    temperature: float = 1.0
    """Temperature of the softmaxes that the distillation loss compares."""
    ce_weight: float | None = None
    """Weight of the cross-entropy; None = 1 - alpha."""
    settings: GroupSettings = field(default_factory=GroupSettings)
    """Settings of group losses; `beta` is also that of `jsd`."""

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown_name("loss", self.loss, LOSSES)
        if self.tail not in LOSSES[self.loss].variants:
            raise unknown_name(f"tail mode of {self.loss}", self.tail, LOSSES[self.loss].variants)
        if not self.alpha >= 0.0 or not self.ce >= 0.0 or not self.temperature > 0.0:
            raise ValueError(
                f"alpha {self.alpha} and the weight {self.ce} of the cross-entropy must not be negative, "
                f"temperature {self.temperature} positive"
            )

    @property
    def ce(self) -> float:
        """Weight of the cross-entropy."""
        return 1.0 - self.alpha if self.ce_weight is None else self.ce_weight

    @property
    def groups(self) -> bool:
        """Whether the distillation loss compares groups of aligned text."""
        return LOSSES[self.loss].groups

    @property
    def weights(self) -> LossWeights:
        """The weights and settings as kernels take them."""
        squared = self.temperature**2 if LOSSES[self.loss].squared else 1.0
        settings = replace(self.settings, temperature=self.temperature)
        return LossWeights(self.alpha * squared, self.ce, self.temperature, settings)

    def gradient_(self, logits: Tensor, targets: LossTargets) -> Tensor:
        """`logits [N, V]` -> the sums `[3]` of (total, kd, ce), nats; `logits` become d total / d logits."""
        kernel = LOSSES[self.loss].kernels.get(self.tail)
        if kernel is not None and self.settings.merge != "exact":
            return kernel(logits, targets, self.weights)
        return self.autograd_gradient_(logits, targets)

    def autograd_gradient_(self, logits: Tensor, targets: LossTargets) -> Tensor:
        """The same by autograd on the definition, for losses without a kernel."""
        leaf = logits.detach().requires_grad_()
        with torch.enable_grad():
            sums = torch.stack([part.sum() for part in self(leaf, targets)])
            (grad,) = torch.autograd.grad(sums[0], leaf)
        logits.copy_(grad)
        return sums.detach()

    def __call__(self, logits: Tensor, targets: LossTargets) -> tuple[Tensor, Tensor, Tensor]:
        """`logits [N, V]` -> `(total, kd, ce)` in nats, by autograd's rules; kd without weights and T^2.

        Row losses: `[N]` each. Group losses: kd `[G]`, each group weighted so that an example's groups weigh 1;
        total `[G + N]`. What counts is the sum.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.ce > 0.0):  # else only reported
            ce = cross_entropy(logits, targets)
        if self.loss == "ce":
            return ce, torch.zeros_like(ce), ce
        loss, weights = LOSSES[self.loss], self.weights
        function = loss.variants[self.tail]
        if loss.groups:
            groups = need(targets.groups)
            kd = function(logits, groups, weights.settings) * groups.weight
            scaled = weights.kd * kd if targets.kd_scale is None else weights.kd * targets.kd_scale * kd
            return torch.cat([scaled, self.ce * ce]), kd, ce
        options = {name: getattr(self.settings, name) for name in loss.options}
        kd = _every_row(function, logits, targets, temperature=self.temperature, **options)
        total = weights.kd * kd
        if self.ce > 0.0:
            total = total + self.ce * ce
        return total, kd, ce


def _every_row(function: LossFunction, logits: Tensor, targets: LossTargets, **options: Any) -> Tensor:
    """A row loss `[N]`, also of rows that differ in length: those of one length at a time."""
    if targets.kept is None or targets.token_ids is None:
        return function(logits, targets, **options)
    losses = logits.new_zeros(len(logits))
    for rows, part in targets.by_length():
        losses = losses.index_put((rows,), function(logits[rows], part, **options))
    return losses
