"""Losses by position together with their gradients, written over the logits they are taken from: what training runs.

`kd.student_trainer.losses.by_row` defines each loss; here its derivative is worked out as well, so that a chunk of logits is
read and written a few times and nothing else of its size is made. Tests compare every kernel with autograd on the
definition, in float64.

A kernel `(logits [n, V], targets, weights) -> [3]` returns the sums of (total, kd, ce) and leaves d total / d logits in
`logits`. On a CPU a few rows are processed at a time (`tiles`), so that the passes over them stay in the cache.

Divergences compare outcomes: the K kept ids and everything else as one. With g_j = dD / d log q_j and G = Σ_j g_j, a
softmax's chain rule gives, for the student's tempered logits u,

    kept id k          dD / du_k = g_k - q_k G
    any other id v     dD / du_v = (q_v / q_rest) (g_rest - q_rest G)

so each divergence only has to give its value and its g over K + 1 outcomes. Where rows differ in length, `ragged_kernel`
does the same over the entries of each row.

Add one: a `DivergenceKernel` of a function like `kl_outcomes`, or a kernel of its own, in
`kd.student_trainer.losses.loss_registry.LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.student_trainer.losses.loss_settings import LossWeights
from kd.student_trainer.losses.loss_targets import TAIL_FLOOR, LossTargets, drawn_tail, need
from kd.student_trainer.losses.ragged_kernel import entries_of, ragged_outcomes_

Kernel = Callable[[Tensor, LossTargets, LossWeights], Tensor]
"""Logits [n, V], targets, weights -> sums [3] of (total, kd, ce)."""
Divergence = Callable[[Tensor, Tensor, LossWeights], tuple[Tensor, Tensor]]
"""p and log q of the same outcomes, weights -> each outcome's part of the value, and its g."""
TeacherOutcomes = Callable[[LossTargets], tuple[Tensor, Tensor]]
"""Targets -> the teacher's probabilities of the kept ids, [n, K] or [E], and of everything else, [n]."""

TILE_BYTES = 4 << 20
"""Bytes of logits that a CPU processes at once: with scratch of the same size they stay in a shared cache."""


def tiles(logits: Tensor, rows: int | None = None) -> Iterator[slice]:
    """Ranges of the n rows of `logits [n, V]` (or of `rows` rows as wide) that fit a CPU's cache; one range on other devices."""
    count, width = len(logits) if rows is None else rows, logits.shape[1]
    size = max(1, TILE_BYTES // (width * logits.element_size())) if logits.device.type == "cpu" else max(count, 1)
    yield from (slice(start, min(start + size, count)) for start in range(0, count, size))


def softmax_(logits: Tensor) -> Tensor:
    """`logits [n, V]` become probabilities; returns their log-normalisers `[n]`."""
    top = logits.amax(dim=1, keepdim=True)
    total = logits.sub_(top).exp_().sum(dim=1)
    logits.mul_(total.reciprocal().unsqueeze(1))
    return top.squeeze(1) + total.log()


def log_normaliser(logits: Tensor) -> Tensor:
    """logsumexp `[n]` of `logits [n, V]`, which stay."""
    top = logits.amax(dim=1, keepdim=True)
    return top.squeeze(1) + torch.sub(logits, top).exp_().sum(dim=1).log()


def subtract_(gradient: Tensor, gold_ids: Tensor, weight: float) -> None:
    """Take `weight` from the gold column of every row of `gradient [n, V]`."""
    gold = gold_ids.unsqueeze(1)
    gradient.scatter_add_(1, gold, torch.full_like(gold, -weight, dtype=gradient.dtype))


def cross_entropy_(logits: Tensor, gold_ids: Tensor, weight: float) -> Tensor:
    """-log q(gold) `[n]`; `logits` become weight (q - onehot(gold))."""
    chosen = logits.gather(1, gold_ids.unsqueeze(1)).squeeze(1)
    log_z = softmax_(logits)
    subtract_(logits.mul_(weight), gold_ids, weight)
    return log_z - chosen


# divergences over outcomes: each outcome's part of the value, and g = d value / d log q


def kl_outcomes(p: Tensor, log_q: Tensor, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """KL(p || q)."""
    return torch.xlogy(p, p) - p * log_q, -p


def reverse_kl_outcomes(p: Tensor, log_q: Tensor, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """KL(q || p)."""
    q, ratio = log_q.exp(), log_q - p.log()
    return q * ratio, q * (ratio + 1)


def jsd_outcomes(p: Tensor, log_q: Tensor, weights: LossWeights) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""
    beta, q = weights.settings.beta, log_q.exp()
    log_m = (beta * p + (1 - beta) * q).clamp(min=1e-30).log()
    against = log_q.clamp(min=math.log(torch.finfo(q.dtype).tiny)) - log_m
    value = beta * (torch.xlogy(p, p) - p * log_m) + (1 - beta) * q * against
    return value, (1 - beta) * q * against


def outcomes_(
    logits: Tensor,
    ids: Tensor,
    gold_ids: Tensor,
    divergence: Callable[[Tensor], tuple[Tensor, Tensor]],
    weight: float,
    ce_weight: float,
) -> tuple[Tensor, Tensor]:
    """Value of a divergence and cross-entropy, `[n]` each; `logits [n, V]` become
    weight dD/dlogits + ce_weight dCE/dlogits.

    ids          [n, K]  unique within a row
    divergence   log q [n, K + 1] (kept ids, everything else; [n, V] where K = V) -> value [n], g [n, K + 1]
    """
    whole = ids.shape[1] == logits.shape[1]
    chosen = logits.gather(1, gold_ids.unsqueeze(1)).squeeze(1)
    head = logits.gather(1, ids)
    log_z = head.logsumexp(dim=1)
    log_outcomes = head
    if not whole:
        logits.scatter_(1, ids, -torch.inf)
        top = logits.amax(dim=1, keepdim=True)
        total = logits.sub_(top).exp_().sum(dim=1)
        rest = top.squeeze(1) + total.log()
        log_z = torch.logaddexp(log_z, rest)
        log_outcomes = torch.cat([head, rest.unsqueeze(1)], dim=1)
    log_q = log_outcomes - log_z.unsqueeze(1)
    value, g = divergence(log_q)
    grad = weight * g + log_q.exp() * (ce_weight - weight * g.sum(dim=1, keepdim=True))
    if not whole:
        logits.mul_((grad[:, -1] / total).unsqueeze(1))
        grad = grad[:, :-1]
    subtract_(logits.scatter_(1, ids, grad), gold_ids, ce_weight)
    return value, log_z - chosen


def outcomes_with_tail(targets: LossTargets) -> tuple[Tensor, Tensor]:
    """The teacher's kept probabilities and the mass of its tail, as stored."""
    return need(targets.logprobs).exp(), need(targets.tail_mass)


def outcomes_with_floored_tail(targets: LossTargets) -> tuple[Tensor, Tensor]:
    """The teacher's kept probabilities and at least TAIL_FLOOR in the tail, for divergences that take its logarithm."""
    return need(targets.logprobs).exp(), need(targets.tail_mass).clamp(min=TAIL_FLOOR)


def renormalised_outcomes(targets: LossTargets) -> tuple[Tensor, Tensor]:
    """The teacher's kept probabilities divided by their sum, and a tail of zero."""
    logprobs = need(targets.logprobs)
    rest = logprobs.new_zeros(len(targets.gold_ids))
    if targets.kept is None:
        return logprobs.softmax(dim=1), rest
    entries = entries_of(need(targets.token_ids), targets.kept)
    return (logprobs - entries.logsumexp(logprobs)[entries.rows]).exp(), rest


@dataclass(frozen=True)
class DivergenceKernel:
    """The kernel of a divergence over kept ids and the rest, at any temperature, beside cross-entropy."""

    divergence: Divergence
    """Value and derivative over the outcomes."""
    teacher: TeacherOutcomes
    """The teacher's side: what becomes of the tail that top-k cut off."""

    def __call__(self, logits: Tensor, targets: LossTargets, weights: LossWeights) -> Tensor:
        """A `Kernel`."""
        sums = logits.new_zeros(3)
        for rows in tiles(logits):
            kd, ce = self._tile_(logits[rows], targets[rows], weights)
            sums += sums_of(weights.kd * kd.sum(), weights.ce, kd.sum(), ce.sum())
        return sums

    def _tile_(self, logits: Tensor, targets: LossTargets, weights: LossWeights) -> tuple[Tensor, Tensor]:
        """Value of the divergence and cross-entropy `[n]`; `logits [n, V]` become the gradient of the total."""
        if weights.temperature == 1.0:
            return self._outcomes_(logits, targets, weights, weights.kd, weights.ce)
        ce, plain = cross_entropy_apart(logits, targets.gold_ids, weights.ce)
        logits.div_(weights.temperature)
        kd, _ = self._outcomes_(logits, targets, weights, weights.kd / weights.temperature, 0.0)
        if plain is not None:
            logits.add_(plain)
        return kd, ce

    def _outcomes_(
        self, logits: Tensor, targets: LossTargets, weights: LossWeights, weight: float, ce_weight: float
    ) -> tuple[Tensor, Tensor]:
        """As `outcomes_`, for rows of one length or of many."""
        p, rest = self.teacher(targets)
        ids, gold_ids = need(targets.token_ids), targets.gold_ids
        if targets.kept is not None:
            entries = entries_of(ids, targets.kept)

            def pairwise(p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
                return self.divergence(p, log_q, weights)

            return ragged_outcomes_(logits, entries, gold_ids, p, rest, pairwise, weight, ce_weight)
        outcomes = torch.cat([p, rest.unsqueeze(1)], dim=1)

        def compare(log_q: Tensor) -> tuple[Tensor, Tensor]:
            value, g = self.divergence(outcomes[:, : log_q.shape[1]], log_q, weights)
            return value.sum(dim=1), g

        return outcomes_(logits, ids, gold_ids, compare, weight, ce_weight)


def cross_entropy_apart(logits: Tensor, gold_ids: Tensor, weight: float) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy `[n]` at temperature 1 and its gradient in a tensor of its own; None where it has no weight."""
    if weight == 0.0:
        return log_normaliser(logits) - logits.gather(1, gold_ids.unsqueeze(1)).squeeze(1), None
    plain = logits.clone()
    return cross_entropy_(plain, gold_ids, weight), plain


def sums_of(weighted: Tensor, ce_weight: float, kd: Tensor, ce: Tensor) -> Tensor:
    """`[3]` (total, kd, ce)."""
    return torch.stack([weighted + ce_weight * ce if ce_weight else weighted, kd, ce])


def sampled_kernel(logits: Tensor, targets: LossTargets, weights: LossWeights) -> Tensor:
    """KL from draws, or from kept tokens and draws from the tail: the gradient is q minus the estimate of p."""
    if weights.temperature != 1.0:
        raise ValueError(f"draws were made at temperature 1, not {weights.temperature}")
    sums = logits.new_zeros(3)
    for rows in tiles(logits):
        z, part = logits[rows], targets[rows]
        estimates = _estimates(part, z.dtype)
        heads = [z[estimate.places] for estimate in estimates]
        chosen = z.gather(1, part.gold_ids.unsqueeze(1)).squeeze(1)
        log_z = softmax_(z)
        mass = torch.stack([estimate.mass for estimate in estimates]).sum(dim=0)
        z.mul_((mass * weights.kd + weights.ce).unsqueeze(1))
        kd = z.new_zeros(())
        for estimate, head in zip(estimates, heads, strict=True):
            z.index_put_(estimate.places, -weights.kd * estimate.p, accumulate=True)
            kd += (estimate.p * (estimate.log_p - head + log_z[estimate.places[0]])).sum()
        subtract_(z, part.gold_ids, weights.ce)
        sums += sums_of(weights.kd * kd, weights.ce, kd, (log_z - chosen).sum())
    return sums


@dataclass(frozen=True)
class _Estimate:
    """A part of an estimate of the teacher's probabilities: E entries of n rows."""

    places: tuple[Tensor, Tensor]
    """[E] row and id of each"""
    p: Tensor
    """[E]"""
    log_p: Tensor
    """[E] logarithm of what the id has in all, where it is there more than once; anything where it has nothing"""
    mass: Tensor
    """[n] sum of each row's"""


def _estimates(targets: LossTargets, dtype: torch.dtype) -> list[_Estimate]:
    if targets.tail_ids is None:
        ids, counts = need(targets.sample_ids), need(targets.sample_counts).to(dtype)
        share = counts / counts.sum(dim=1, keepdim=True)
        return [_of_table(ids, share, share)]
    tail_ids, share, times = drawn_tail(targets)
    share = share.to(dtype)
    drawn = _of_table(tail_ids, share, share * times)
    ids, logprobs = need(targets.token_ids), need(targets.logprobs).to(dtype)
    if targets.kept is None:
        return [_of_table(ids, logprobs.exp(), logprobs.exp(), logprobs), drawn]
    entries, p = entries_of(ids, targets.kept), logprobs.exp()
    return [_Estimate((entries.rows, entries.ids), p, logprobs, entries.sums(p)), drawn]


def _of_table(ids: Tensor, p: Tensor, whole: Tensor, log_p: Tensor | None = None) -> _Estimate:
    """The entries of `ids [n, R]`; `whole` is what each id has in all."""
    rows = torch.arange(len(ids), device=ids.device).unsqueeze(1).expand_as(ids)
    log_p = whole.clamp(min=1e-30).log() if log_p is None else log_p
    return _Estimate((rows.flatten(), ids.flatten()), p.flatten(), log_p.flatten(), p.sum(dim=1))


def cross_entropy_kernel(logits: Tensor, targets: LossTargets, weights: LossWeights) -> Tensor:
    """Plain fine-tuning."""
    ce = logits.new_zeros(())
    for rows in tiles(logits):
        ce += cross_entropy_(logits[rows], targets.gold_ids[rows], 1.0).sum()
    return torch.stack([ce, torch.zeros_like(ce), ce])
