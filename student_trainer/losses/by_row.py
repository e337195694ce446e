"""Distillation losses by position as pure functions of logits, in nats, without reduction.

Shapes: N positions, V vocabulary, K kept tokens, R draws. Student logits may be wider than the teacher's
vocabulary (padded columns): callers cut them to V first, so padding never enters a softmax.

The tail of the teacher (what top-k cut off) is one more outcome in mode `ghost`: its mass is exact at every
temperature of the stored grid, and the student's tail is a logsumexp over everything outside the kept ids, never
1 - sum(q), which loses all digits when the student is confident. On the demo's models at k=64 the student's gradient
is 3 % off the dense one at T=1 and 11 % at T=2, where renormalised top-k is off by 7 % and 73 % (docs/log.md).

Add a loss: a function here and one line in `kd.student_trainer.losses.loss_registry.LOSSES`; the test battery and the command
line find it there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.student_trainer.losses.by_group import generalised_jsd
from kd.student_trainer.losses.loss_targets import TAIL_FLOOR, LossTargets, drawn_tail, need


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
    returns  [N]     not multiplied by T^2; `loss_registry.Objective` does that

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

    Σ_i (c_i / R) (log(c_i / R) - log q_i) over the ids drawn from p at temperature 1. Where kept tokens have draws from their
    tail beside them, Σ_i p̂_i (log p̂_i - log q_i) with p̂_i = p_i for kept ids and m c_i / n for ids drawn c_i times of n, m the
    tail's mass: there is no outcome for the rest, because the draws stand for it. The value is above the dense KL by the
    entropy the draws lack; gradients are unbiased. Only at temperature 1: draws at T=1 say next to nothing about T >= 2
    (docs/log.md).

    logits   [N, V]  unnormalised
    returns  [N]

    Sparse Logit Sampling, ACL 2025, arXiv:2503.16870.
    """
    if temperature != 1.0:
        raise ValueError(f"draws were made at temperature 1, not {temperature}")
    if targets.tail_ids is not None:
        return _kl_with_drawn_tail(logits, targets)
    ids, counts = need(targets.sample_ids), need(targets.sample_counts).to(logits.dtype)
    share = counts / counts.sum(dim=1, keepdim=True)
    log_q = logits.gather(1, ids) - logits.logsumexp(dim=1, keepdim=True)
    return (torch.xlogy(share, share) - share * log_q).sum(dim=1)


def _kl_with_drawn_tail(logits: Tensor, targets: LossTargets) -> Tensor:
    """`kl_sampled` of rows that keep `token_ids [N, K]` and have draws from their tail."""
    ids, tail_ids, share, times = need(targets.token_ids), *drawn_tail(targets)
    p = torch.cat([need(targets.logprobs).exp(), share], dim=1)
    log_p = torch.cat([need(targets.logprobs), (share * times).clamp(min=1e-30).log()], dim=1)
    log_q = logits.gather(1, torch.cat([ids, tail_ids], dim=1)) - logits.logsumexp(dim=1, keepdim=True)
    return (p * (log_p - log_q)).sum(dim=1)


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
