"""Distillation losses as pure functions of logits: per position, in nats, no reduction.

Shapes: N positions, V vocabulary, K kept tokens, R draws. Student logits may be wider than the teacher's
vocabulary (padded columns): callers cut them to V first, so padding never enters a softmax.

The tail of the teacher (what top-k cut off) is one more outcome in mode `ghost`: its mass is exact at every
temperature of the stored grid, and the student's tail is a logsumexp over everything outside the kept ids, never
1 - sum(q), which loses all digits when the student is confident. On the demo's models at k=64 the student's gradient
is 3 % off the dense one at T=1 and 11 % at T=2, where renormalised top-k is off by 7 % and 73 % (docs/log.md).

Add a loss: one function and one line in `LOSSES`; the test battery and the CLI find it there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.data.errors import unknown_name


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

    def __getitem__(self, rows: slice) -> LossTargets:
        """A range of rows of every field."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: v[rows] for name, v in values.items() if v is not None})


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
    ids, log_p, mass = _need(targets.token_ids), _need(targets.logprobs), _need(targets.tail_mass)
    if ids.shape[1] == logits.shape[1]:
        log_q = (logits / temperature).log_softmax(dim=1).gather(1, ids)
        return (log_p.exp() * (log_p - log_q)).sum(dim=1)
    head, tail = kept_and_rest(logits, ids, temperature)
    log_z = torch.logaddexp(head.logsumexp(dim=1), tail)
    log_q = head - log_z.unsqueeze(1)
    rest = torch.xlogy(mass, mass) - mass * (tail - log_z)
    return (log_p.exp() * (log_p - log_q)).sum(dim=1) + rest


def kept_and_rest(logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Tempered logits of the kept ids `[N, K]`, and the logsumexp of all others `[N]`; needs K < V.

    The same as `(logits / T).gather(1, ids)` and `(logits / T).scatter(1, ids, -inf).logsumexp(1)`, with one tensor of
    size [N, V] each for the way forward and back instead of about ten.
    """
    head, tail = _KeptAndRest.apply(logits, ids, temperature)  # type: ignore[no-untyped-call]
    return head, tail


class _KeptAndRest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        scaled = logits / temperature
        head = scaled.gather(1, ids)
        scaled.scatter_(1, ids, -torch.inf)
        top = scaled.amax(dim=1, keepdim=True)
        weights = scaled.sub_(top).exp_()
        total = weights.sum(dim=1)
        ctx.save_for_backward(weights, total, ids)
        ctx.temperature = temperature
        return head, top.squeeze(1) + total.log()

    @staticmethod
    def backward(ctx: Any, grad_head: Tensor, grad_tail: Tensor) -> tuple[Tensor, None, None]:
        weights, total, ids = ctx.saved_tensors
        grad = weights * (grad_tail / (total * ctx.temperature)).unsqueeze(1)
        return grad.scatter_(1, ids, grad_head / ctx.temperature), None, None


def kl_renorm(logits: Tensor, targets: LossTargets, *, temperature: float = 1.0) -> Tensor:
    """KL(renormalised kept teacher || student) per position, nats: what most systems do, for comparison.

    The kept probabilities are divided by their sum; the student's softmax runs over all of V. The minimiser is
    biased (0 outside the kept ids): the student equal to the teacher scores -log(kept mass), not 0.

    logits   [N, V]  unnormalised
    returns  [N]
    """
    ids, log_p = _need(targets.token_ids), _need(targets.logprobs)
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
    ids, counts = _need(targets.sample_ids), _need(targets.sample_counts).to(logits.dtype)
    share = counts / counts.sum(dim=1, keepdim=True)
    log_q = logits.gather(1, ids) - logits.logsumexp(dim=1, keepdim=True)
    return (torch.xlogy(share, share) - share * log_q).sum(dim=1)


PositionLoss = Callable[..., Tensor]

TAILS: dict[str, PositionLoss] = {"ghost": kl_ghost, "sampled": kl_sampled, "renorm": kl_renorm}
"""How the truncated part of the teacher enters a KL."""

LOSSES: dict[str, dict[str, PositionLoss]] = {
    "kl": TAILS,
    "ce": {"none": cross_entropy},
}
"""Loss name -> tail mode -> function. `ce` is plain fine-tuning on the same rows: the baseline."""


@dataclass(frozen=True)
class Objective:
    """alpha * T^2 * KD + (1 - alpha) * CE, per position; alpha = 0 for `ce`."""

    loss: str = "kl"
    tail: str = "ghost"
    alpha: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown_name("loss", self.loss, LOSSES)
        if self.tail not in LOSSES[self.loss]:
            raise unknown_name(f"tail mode of {self.loss}", self.tail, LOSSES[self.loss])
        if not 0.0 <= self.alpha <= 1.0 or not self.temperature > 0.0:
            raise ValueError(f"alpha {self.alpha} must be in [0, 1] and temperature {self.temperature} positive")

    def __call__(self, logits: Tensor, targets: LossTargets) -> tuple[Tensor, Tensor, Tensor]:
        """`logits [N, V]` -> `(total, kd, ce)`, each `[N]` nats; kd without the factor T^2."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.alpha < 1.0):  # else only reported
            ce = cross_entropy(logits, targets)
        if self.loss == "ce":
            return ce, torch.zeros_like(ce), ce
        kd = LOSSES[self.loss][self.tail](logits, targets, temperature=self.temperature)
        total = self.alpha * self.temperature**2 * kd
        if self.alpha < 1.0:
            total = total + (1.0 - self.alpha) * ce
        return total, kd, ce


def _need(field: Tensor | None) -> Tensor:
    if field is None:
        raise ValueError("the targets hold no such field for this loss")
    return field
