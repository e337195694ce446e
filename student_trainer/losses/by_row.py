"""Distillation losses as pure functions of logits, in nats, no reduction: those by position, and the registry of all.

Shapes: N positions, V vocabulary, K kept tokens, R draws. Student logits may be wider than the teacher's
vocabulary (padded columns): callers cut them to V first, so padding never enters a softmax.

The tail of the teacher (what top-k cut off) is one more outcome in mode `ghost`: its mass is exact at every
temperature of the stored grid, and the student's tail is a logsumexp over everything outside the kept ids, never
1 - sum(q), which loses all digits when the student is confident. On the demo's models at k=64 the student's gradient
is 3 % off the dense one at T=1 and 11 % at T=2, where renormalised top-k is off by 7 % and 73 % (docs/log.md).

Add a loss: one function and one line in `LOSSES`; the test battery and the CLI find it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd.common.errors import unknown_name
from kd.student_trainer.losses.by_group import GroupSettings, GroupTargets, alm, generalised_jsd, hybrid, need, uld
from kd.student_trainer.losses.group_kernels import alm_kernel, group_kernel
from kd.student_trainer.losses.row_kernels import (
    TAIL_FLOOR,
    Kernel,
    cross_entropy_kernel,
    divergence_kernel,
    sampled_kernel,
)


@dataclass(frozen=True)
class LossTargets:
    """What a loss compares the student with; fields a loss does not need are None."""

    gold_ids: Tensor
    """[N] int64"""
    token_ids: Tensor | None = None
    """[N, K] int64, unique within a row"""
    logprobs: Tensor | None = None
    """[N, K] teacher log-probabilities at the loss's temperature, nats"""
    tail_mass: Tensor | None = None
    """[N] teacher probability outside the kept ids, at the loss's temperature"""
    sample_ids: Tensor | None = None
    """[N, R] int64"""
    sample_counts: Tensor | None = None
    """[N, R] draws of each id, 0 in unused slots"""

    groups: GroupTargets | None = None
    """Of losses that compare aligned text; their rows count from 0 here"""
    kd_scale: Tensor | None = None
    """[] rows of the step / examples of the step: group losses are means over examples, the sum is divided by rows"""

    def __getitem__(self, rows: slice) -> LossTargets:
        """A range of rows of every field; only groups that lie in it as a whole stay (see `pieces`)."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("groups", "kd_scale")}
        cut = {name: v[rows] for name, v in values.items() if v is not None}
        if self.groups is not None:
            rows = slice(rows.start or 0, len(self.gold_ids) if rows.stop is None else rows.stop)
            first, stop = self.groups.bounds
            chosen, last = int(first.searchsorted(rows.start)), int(stop.searchsorted(rows.stop, side="right"))
            cut["groups"] = self.groups.within(rows, slice(chosen, max(last, chosen)))
        return replace(self, **cut)

    def pieces(self, size: int) -> list[slice]:
        """Row ranges of about `size` rows that cut no group in two; a longer group stays whole."""
        total = len(self.gold_ids)
        if self.groups is None:
            return [slice(start, min(start + size, total)) for start in range(0, total, size)]
        inside = np.zeros(total + 1, dtype=np.int64)  # +1 where a group's second row begins, -1 where it stops
        first, stop = self.groups.bounds
        np.add.at(inside, first + 1, 1)
        np.add.at(inside, stop, -1)
        allowed = np.flatnonzero(inside.cumsum() == 0)  # borders that no group crosses
        ranges, start = [], 0
        while start < total:
            fitting = allowed[(allowed > start) & (allowed <= start + size)]
            end = int(fitting[-1]) if len(fitting) else int(allowed[allowed > start][0])
            ranges.append(slice(start, end))
            start = end
        return ranges


def cross_entropy(logits: Tensor, targets: LossTargets, *, temperature: float = 1.0) -> Tensor:
    """-log q(gold) per position, nats.

    logits   [N, V]  unnormalised
    returns  [N]     `temperature` is accepted for the registry's sake and not used: labels have none
    """
    return F.cross_entropy(logits, targets.gold_ids, reduction="none")


def kl_ghost(logits: Tensor, targets: LossTargets, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per position, nats, with everything beyond the kept ids as one outcome.

    sum_k p_k (log p_k - log q_k) + m (log m - log q_tail), p and m at `temperature`, q = softmax(logits / T).
    Zero when the student equals the teacher; equal to the dense KL when K = V.

    logits   [N, V]  unnormalised
    returns  [N]     not multiplied by T^2 (see `objective`)

    Hinton et al. 2015, arXiv:1503.02531; the rest bucket with the exact normaliser is ours (docs/log.md).
    """
    ids, log_p, mass = need(targets.token_ids), need(targets.logprobs), need(targets.tail_mass)
    if ids.shape[1] == logits.shape[1]:
        log_q = (logits / temperature).log_softmax(dim=1).gather(1, ids)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1)
    head, tail = kept_and_rest(logits, ids, temperature)
    log_z = torch.logaddexp(head.logsumexp(dim=1), tail)
    log_q = head - log_z.unsqueeze(1)
    rest = torch.xlogy(mass, mass) - mass * (tail - log_z)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1) + rest


def kept_and_rest(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tempered logits of the kept ids `[N, K]`, and the logsumexp of all others `[N]`; needs K < V."""
    scaled = logits / temperature
    return scaled.gather(1, ids), scaled.scatter(1, ids, -torch.inf).logsumexp(dim=1)


def kl_renorm(logits: Tensor, targets: LossTargets, *, temperature: float = 1.0) -> Tensor:
    """KL(renormalised kept teacher || student) per position, nats: what most systems do, for comparison.

    The kept probabilities are divided by their sum; the student's softmax runs over all of V. The minimiser is
    biased (0 outside the kept ids): the student equal to the teacher scores -log(kept mass), not 0.

    logits   [N, V]  unnormalised
    returns  [N]
    """
    ids, log_p = need(targets.token_ids), need(targets.logprobs)
    log_p = log_p - log_p.logsumexp(dim=1, keepdim=True)
    scaled = logits / temperature
    log_q = scaled.gather(1, ids) - scaled.logsumexp(dim=1, keepdim=True)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1)


def kl_sampled(logits: Tensor, targets: LossTargets, *, temperature: float = 1.0) -> Tensor:
    """KL(drawn frequencies || student) per position, nats; its expected gradient is the dense KL's.

    Σ_i (c_i / R) (log(c_i / R) - log q_i) over the ids drawn from p at temperature 1. The value is above the dense
    KL by the entropy the draws lack; gradients are unbiased. Only at temperature 1: draws at T=1 say next to
    nothing about T >= 2 (docs/log.md).

    logits   [N, V]  unnormalised
    returns  [N]

    Sparse Logit Sampling, ACL 2025, arXiv:2503.16870.
    """
    if temperature != 1.0:
        raise ValueError(f"draws were made at temperature 1, not {temperature}")
    ids, counts = need(targets.sample_ids), need(targets.sample_counts).to(logits.dtype)
    share = counts / counts.sum(dim=1, keepdim=True)
    log_q = logits.gather(1, ids) - logits.logsumexp(dim=1, keepdim=True)
    return (torch.xlogy(share, share) - share * log_q).sum(dim=1)


def kl_reverse(logits: Tensor, targets: LossTargets, *, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) per position, nats, with everything beyond the kept ids as one outcome.

    On the kept ids alone it would reward a student for leaving them. A tail of no mass counts as TAIL_FLOOR.

    logits   [N, V]  unnormalised
    returns  [N]
    """
    log_p, log_q = _outcomes(logits, targets, temperature)
    return (log_q.exp() * (log_q - log_p)).sum(dim=1)


def jsd(logits: Tensor, targets: LossTargets, *, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence per position, nats, over the kept ids and everything else as one outcome.

    beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    logits   [N, V]  unnormalised
    returns  [N]

    Agarwal et al. 2023 (GKD), arXiv:2306.13649, equation 1.
    """
    log_p, log_q = _outcomes(logits, targets, temperature)
    return generalised_jsd(log_p.exp(), log_q.exp(), beta)


def _outcomes(logits: Tensor, targets: LossTargets, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities `[N, K + 1]` of teacher and student: kept ids, then everything else (`[N, V]` where K = V)."""
    ids, log_p, mass = need(targets.token_ids), need(targets.logprobs), need(targets.tail_mass)
    if ids.shape[1] == logits.shape[1]:
        return log_p, (logits / temperature).log_softmax(dim=1).gather(1, ids)
    head, tail = kept_and_rest(logits, ids, temperature)
    log_q = torch.cat([head, tail.unsqueeze(1)], dim=1).log_softmax(dim=1)
    return torch.cat([log_p, mass.clamp(min=TAIL_FLOOR).log().unsqueeze(1)], dim=1), log_q


PositionLoss = Callable[..., Tensor]

TAILS: dict[str, PositionLoss] = {"ghost": kl_ghost, "sampled": kl_sampled, "renorm": kl_renorm}
"""How the truncated part of the teacher enters a KL."""


@dataclass(frozen=True)
class Loss:
    """A way of learning from a teacher."""

    variants: Mapping[str, PositionLoss]
    """Tail mode -> function. Of a row loss: `(logits, targets, temperature=…) -> [N]`; of a group loss:
    `(logits, groups, settings) -> [G]`."""
    groups: bool = False
    """Compared over groups of aligned text (any tokenizer), not row by row (the teacher's)?"""
    squared: bool = False
    """Multiplied by T^2, so that gradients keep their size (Hinton et al. 2015)?"""
    needs: tuple[str, ...] = ()
    """What the cache must hold: `ids`, `logprobs`, `bands`."""
    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    """Tail mode -> the same with its gradient worked out; without one, autograd runs on the chunk."""


LOSSES: dict[str, Loss] = {
    "kl": Loss(
        TAILS,
        squared=True,
        needs=("ids",),
        kernels={"ghost": divergence_kernel, "renorm": divergence_kernel, "sampled": sampled_kernel},
    ),
    "reverse-kl": Loss({"ghost": kl_reverse}, squared=True, needs=("ids",), kernels={"ghost": divergence_kernel}),
    "jsd": Loss({"ghost": jsd}, squared=True, needs=("ids",), kernels={"ghost": divergence_kernel}),
    "uld": Loss({"bands": uld}, groups=True, needs=("logprobs", "bands"), kernels={"bands": group_kernel}),
    "hybrid": Loss({"bands": hybrid}, groups=True, needs=("ids", "logprobs", "bands"), kernels={"bands": group_kernel}),
    "alm": Loss({"none": alm}, groups=True, kernels={"none": alm_kernel}),
    "ce": Loss({"none": cross_entropy}, kernels={"none": cross_entropy_kernel}),
}
"""`ce` is plain fine-tuning on the same text: the baseline."""


@dataclass(frozen=True)
class Objective:
    """alpha * kd + ce_weight * CE; kd times T^2 where the loss asks for it. See `LOSSES`."""

    loss: str = "kl"
    tail: str = "ghost"
    alpha: float = 1.0
    """Weight of the distillation loss."""
    temperature: float = 1.0
    ce_weight: float | None = None
    """Of the cross-entropy; None = 1 - alpha."""
    settings: GroupSettings = field(default_factory=GroupSettings)
    """Of group losses; its beta is that of `jsd` too."""

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
        """Does the distillation loss compare groups of aligned text?"""
        return LOSSES[self.loss].groups

    @property
    def kd_weight(self) -> float:
        """Weight of the distillation loss in the total."""
        return self.alpha * (self.temperature**2 if LOSSES[self.loss].squared else 1.0)

    def gradient_(self, logits: Tensor, targets: LossTargets) -> Tensor:
        """`logits [N, V]` -> the sums `[3]` of (total, kd, ce), nats; `logits` become d total / d logits."""
        kernel = LOSSES[self.loss].kernels.get(self.tail)
        if kernel is not None:
            return kernel(logits, targets, self)
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
        loss = LOSSES[self.loss]
        weight = self.kd_weight
        function = loss.variants[self.tail]
        if loss.groups:
            groups = need(targets.groups)
            kd = function(logits, groups, replace(self.settings, temperature=self.temperature)) * groups.weight
            scaled = weight * kd if targets.kd_scale is None else weight * targets.kd_scale * kd
            return torch.cat([scaled, self.ce * ce]), kd, ce
        options = {"beta": self.settings.beta} if self.loss == "jsd" else {}
        kd = function(logits, targets, temperature=self.temperature, **options)
        total = weight * kd
        if self.ce > 0.0:
            total = total + self.ce * ce
        return total, kd, ce
