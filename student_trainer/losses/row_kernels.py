"""Losses by position together with their gradients, written over the logits they are taken from: what training runs.

`kd.student_trainer.losses.by_row` says what each loss is; here is the same with its derivative worked out, so that a chunk of
logits is read and written a few times and nothing else of its size is made. Tests hold every kernel against autograd on
the definition, in float64.

A kernel `(logits [n, V], targets, objective) -> [3]` returns the sums of (total, kd, ce) and leaves d total / d logits in
`logits`. On a CPU the rows are taken a few at a time (`tiles`), so that the passes over them stay in the cache.

Divergences compare outcomes: the K kept ids and everything else as one. With g_j = dD / d log q_j and G = Σ_j g_j, a
softmax's chain rule gives, for the student's tempered logits u,

    kept id k          dD / du_k = g_k - q_k G
    any other id v     dD / du_v = (q_v / q_rest) (g_rest - q_rest G)

so each divergence only has to state its value and its g over K + 1 outcomes.

Add one: a function in `DIVERGENCES`, or a kernel of its own in `kd.student_trainer.losses.by_row.LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kd.student_trainer.losses.by_group import need

if TYPE_CHECKING:
    from kd.student_trainer.losses.by_row import LossTargets, Objective

Kernel = Callable[[Tensor, "LossTargets", "Objective"], Tensor]

TILE_BYTES = 4 << 20
"""Of logits that are worked on at once, on a CPU: with scratch of the same size they stay in a shared cache."""
TAIL_FLOOR = 1e-7
"""Probability of a teacher's tail that rounding has left without any (float32 sums to 1 no better than this)."""


def tiles(logits: Tensor, rows: int | None = None) -> Iterator[slice]:
    """Ranges of rows like those of `logits [n, V]` that fit a CPU's cache, one range on other devices; of all n, or `rows`."""
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


# divergences over outcomes: value [n] and g [n, C] = d value / d log q, of p [n, C] and log q [n, C]


def kl_outcomes(p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q)."""
    return (torch.xlogy(p, p) - p * log_q).sum(dim=1), -p


def reverse_kl_outcomes(p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(q || p)."""
    q, ratio = log_q.exp(), log_q - p.log()
    return (q * ratio).sum(dim=1), q * (ratio + 1)


def jsd_outcomes(p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""
    q = log_q.exp()
    log_m = (beta * p + (1 - beta) * q).clamp(min=1e-30).log()
    against = log_q.clamp(min=math.log(torch.finfo(q.dtype).tiny)) - log_m
    value = beta * (torch.xlogy(p, p) - p * log_m) + (1 - beta) * q * against
    return value.sum(dim=1), (1 - beta) * q * against


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


def _divergence(targets: LossTargets, objective: Objective) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The objective's divergence from the teacher's outcomes, as a function of the student's."""
    log_p = need(targets.logprobs)
    if objective.tail == "renorm":
        p = torch.nn.functional.pad(log_p.softmax(dim=1), (0, 1))
    else:
        mass = need(targets.tail_mass).unsqueeze(1)
        p = torch.cat([log_p.exp(), mass if objective.loss == "kl" else mass.clamp(min=TAIL_FLOOR)], dim=1)
    compare = DIVERGENCES[objective.loss]
    return lambda log_q: compare(p[:, : log_q.shape[1]], log_q, objective)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, Objective], tuple[Tensor, Tensor]]] = {
    "kl": lambda p, log_q, _: kl_outcomes(p, log_q),
    "reverse-kl": lambda p, log_q, _: reverse_kl_outcomes(p, log_q),
    "jsd": lambda p, log_q, objective: jsd_outcomes(p, log_q, objective.settings.beta),
}


def divergence_kernel(logits: Tensor, targets: LossTargets, objective: Objective) -> Tensor:
    """Any divergence over kept ids and the rest, at any temperature, beside cross-entropy."""
    weight, temperature = objective.kd_weight, objective.temperature
    sums = logits.new_zeros(3)
    for rows in tiles(logits):
        z, part = logits[rows], targets[rows]
        divergence = _divergence(part, objective)
        if temperature == 1.0:
            kd, ce = outcomes_(z, need(part.token_ids), part.gold_ids, divergence, weight, objective.ce)
        else:
            ce, plain = cross_entropy_apart(z, part.gold_ids, objective.ce)
            z.div_(temperature)
            kd, _ = outcomes_(z, need(part.token_ids), part.gold_ids, divergence, weight / temperature, 0.0)
            if plain is not None:
                z.add_(plain)
        sums += sums_of(weight * kd.sum(), objective.ce, kd.sum(), ce.sum())
    return sums


def cross_entropy_apart(logits: Tensor, gold_ids: Tensor, weight: float) -> tuple[Tensor, Tensor | None]:
    """Cross-entropy `[n]` at temperature 1 and its gradient in a tensor of its own; None where it has no weight."""
    if weight == 0.0:
        return log_normaliser(logits) - logits.gather(1, gold_ids.unsqueeze(1)).squeeze(1), None
    plain = logits.clone()
    return cross_entropy_(plain, gold_ids, weight), plain


def sums_of(weighted: Tensor, ce_weight: float, kd: Tensor, ce: Tensor) -> Tensor:
    """`[3]` (total, kd, ce)."""
    return torch.stack([weighted + ce_weight * ce if ce_weight else weighted, kd, ce])


def sampled_kernel(logits: Tensor, targets: LossTargets, objective: Objective) -> Tensor:
    """KL from the frequencies of draws: the gradient is q minus the frequencies."""
    if objective.temperature != 1.0:
        raise ValueError(f"draws were made at temperature 1, not {objective.temperature}")
    weight = objective.kd_weight
    sums = logits.new_zeros(3)
    for rows in tiles(logits):
        z, part = logits[rows], targets[rows]
        ids, counts = need(part.sample_ids), need(part.sample_counts).to(z.dtype)
        share = counts / counts.sum(dim=1, keepdim=True)
        drawn = z.gather(1, ids)
        chosen = z.gather(1, part.gold_ids.unsqueeze(1)).squeeze(1)
        log_z = softmax_(z)
        subtract_(z.mul_(weight + objective.ce).scatter_add_(1, ids, -weight * share), part.gold_ids, objective.ce)
        kd = (torch.xlogy(share, share) - share * (drawn - log_z.unsqueeze(1))).sum()
        sums += sums_of(weight * kd, objective.ce, kd, (log_z - chosen).sum())
    return sums


def cross_entropy_kernel(logits: Tensor, targets: LossTargets, objective: Objective) -> Tensor:
    """Plain fine-tuning."""
    ce = logits.new_zeros(())
    for rows in tiles(logits):
        ce += cross_entropy_(logits[rows], targets.gold_ids[rows], 1.0).sum()
    return torch.stack([ce, torch.zeros_like(ce), ce])
