"""Losses over groups together with their gradients, written over the logits: the twins of `kd.student_trainer.losses.by_group`.

With q a row's probabilities, a row's gradient by its tempered logits is

    q (M - S + c) - c onehot(gold)

M [V] is the loss's derivative by the probabilities of a group's first row (d loss / d q), S = Σ_v q_v M_v; c gathers all that
enters through the gold token: cross-entropy, and the chain-rule factor where the row is a further token of a group.

Sorting: ULD's gradient is a sign per rank. It needs the values in order and, per value, the sign at its rank. Signs change
rarely along the ranks, so on a CPU the values alone are sorted (by numpy, in a fraction of the time of torch's sort with
indices) and each value looks up the run of equal signs it lies in; other devices sort with indices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kd.student_trainer.losses.by_group import alm_of, generalised_jsd, group_sums, uld_bins
from kd.student_trainer.losses.loss_settings import GroupSettings, LossWeights
from kd.student_trainer.losses.loss_targets import GroupTargets, LossTargets, need
from kd.student_trainer.losses.ranks import sorted_row
from kd.student_trainer.losses.row_kernels import cross_entropy_apart, log_normaliser, softmax_, sums_of, tiles

Compared = tuple[Tensor, Tensor, Tensor, Tensor]
"""value [G], weight * d value / d further [G], M [G, V], S [G]"""
Comparison = Callable[[Tensor, Tensor, GroupTargets, Tensor, Tensor, GroupSettings], Compared]
"""Tempered logits [G, V], probabilities [G, V], targets of G groups, log-probability of further tokens [G], weight [G],
settings -> `Compared`."""


@dataclass(frozen=True)
class GroupKernel:
    """The kernel of a loss that compares the first rows of groups (`uld`, `hybrid`), beside cross-entropy."""

    comparisons: Mapping[str, Comparison]
    """Ranking (`exact`, `fast`) -> how a first row is compared."""

    def __call__(self, logits: Tensor, targets: LossTargets, weights: LossWeights) -> Tensor:
        """A `kd.student_trainer.losses.row_kernels.Kernel`."""
        groups, temperature = need(targets.groups), weights.temperature
        compare = self.comparisons[weights.settings.ranking]
        weight = _group_weights(groups, targets, weights, logits)
        shared = weights.ce if temperature == 1.0 else 0.0  # one softmax serves both losses
        gold_weight = torch.full_like(logits[:, 0], shared)  # c of every row
        further, late, late_group = _further(logits, groups, temperature)
        values, ce = logits.new_zeros(len(groups)), logits.new_zeros(())
        for rows in tiles(logits):
            z, gold = logits[rows], groups.gold_ids[rows].unsqueeze(1)
            plain = None
            if temperature != 1.0:
                row_ce, plain = cross_entropy_apart(z, gold.squeeze(1), weights.ce)
                ce += row_ce.sum()
                z.div_(temperature)
            else:
                ce -= z.gather(1, gold).sum()
            q = z.clone()
            log_z = softmax_(q)
            if temperature == 1.0:
                ce += log_z.sum()
            chosen = slice(*groups.bounds[0].searchsorted([rows.start, rows.stop]).tolist())
            first_rows = groups.first[chosen] - rows.start
            every = len(first_rows) == len(z)
            u, probabilities = (z, q) if every else (z[first_rows], q[first_rows])
            values[chosen], slope, direction, mean = compare(
                u, probabilities, groups[chosen], further[chosen], weight[chosen], weights.settings
            )
            if len(late):  # rows of these groups may lie in this tile or in a later one: their first row comes before
                slopes = logits.new_zeros(len(groups))
                slopes[chosen] = slope
                gold_weight[late] -= slopes[late_group]
            c = gold_weight[rows].unsqueeze(1)
            if every:
                torch.mul(probabilities, direction.add_(c - mean.unsqueeze(1)), out=z)
            else:
                torch.mul(q, c, out=z)
                z.index_add_(0, first_rows, direction.sub_(mean.unsqueeze(1)).mul_(probabilities))
            z.scatter_add_(1, gold, -c)
            if temperature != 1.0:
                z.div_(temperature)
            if plain is not None:
                z.add_(plain)
        kd = values * groups.weight.to(values.dtype)
        return sums_of((values * weight).sum(), weights.ce, kd.sum(), ce)


def alm_kernel(logits: Tensor, targets: LossTargets, weights: LossWeights) -> Tensor:
    """`alm` beside cross-entropy: every row enters through its gold token alone."""
    groups = need(targets.groups)
    gold = groups.gold_ids.unsqueeze(1)
    log_q = logits.gather(1, gold).squeeze(1)
    for rows in tiles(logits):
        log_q[rows] -= softmax_(logits[rows])
    with torch.enable_grad():
        leaf = group_sums(log_q, groups.first, groups.stop).requires_grad_()
        value = alm_of(leaf, groups)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
    weight = _group_weights(groups, targets, weights, logits)
    members, owner = _members(groups)
    c = torch.full_like(log_q, weights.ce)
    c.index_add_(0, members, -(weight * slope)[owner])
    for rows in tiles(logits):
        logits[rows].mul_(c[rows].unsqueeze(1))
    logits.scatter_add_(1, gold, -c.unsqueeze(1))
    value = value.detach()
    kd = value * groups.weight.to(value.dtype)
    return sums_of((value * weight).sum(), weights.ce, kd.sum(), -log_q.sum())


def _group_weights(groups: GroupTargets, targets: LossTargets, weights: LossWeights, like: Tensor) -> Tensor:
    """`[G]` weight of each group's value in the total."""
    weight = weights.kd * groups.weight.to(like.dtype)
    return weight if targets.kd_scale is None else weight * targets.kd_scale.to(like.dtype)


def _members(groups: GroupTargets, skip: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of all groups but the first `skip` of each, group after group, and the group of each."""
    count = int((groups.bounds[1] - groups.bounds[0] - skip).sum())  # known on the host: no wait for a GPU
    size = groups.stop - groups.first - skip
    starts = groups.first + skip - (size.cumsum(0) - size)
    owner = torch.arange(len(groups), device=size.device).repeat_interleave(size, output_size=count)
    return starts[owner] + torch.arange(count, device=size.device), owner


def _further(logits: Tensor, groups: GroupTargets, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability of each group's tokens after the first `[G]`; those tokens' rows `[L]` and groups `[L]`."""
    rows, owner = _members(groups, skip=1)
    total = logits.new_zeros(len(groups))
    for part in tiles(logits, len(rows)):
        some = rows[part]
        z = logits[some] / temperature
        chosen = z.gather(1, groups.gold_ids[some].unsqueeze(1)).squeeze(1)
        total.index_add_(0, owner[part], chosen - log_normaliser(z))
    return total, rows, owner


# comparisons of a group's first row


def exact_uld(
    u: Tensor, q: Tensor, groups: GroupTargets, further: Tensor, weight: Tensor, settings: GroupSettings
) -> Compared:
    """Sum over ranks of |sorted teacher - sorted student|."""
    groups = groups.wide()
    p = sorted_row(need(groups.logprobs), groups.bands, settings.edges, groups.kept).to(q.dtype)
    scale = further.exp()
    value, signs, slope = rank_signs(p * groups.log_scale.exp().unsqueeze(1).to(q.dtype), q, scale)
    return value, weight * slope, signs.mul_((weight * scale).unsqueeze(1)), weight * slope


def fast_uld(
    u: Tensor, q: Tensor, groups: GroupTargets, further: Tensor, weight: Tensor, settings: GroupSettings
) -> Compared:
    """The same distance with few ranks compared one by one and the rest in bins of value; see `by_group.uld`."""
    bins, p, beyond = uld_bins(u, groups, settings)
    mass = torch.zeros_like(p).scatter_add_(1, bins, q)
    a, b = groups.log_scale.exp().unsqueeze(1).to(q.dtype), further.exp().unsqueeze(1)
    off = b * mass - a * p
    signs = off.sign()
    slope = weight * (signs * b * mass).sum(dim=1)
    direction = (signs * weight.unsqueeze(1) * b).gather(1, bins)
    return off.abs().sum(dim=1) + a.squeeze(1) * beyond, slope, direction, slope


def hybrid_comparison(
    u: Tensor, q: Tensor, groups: GroupTargets, further: Tensor, weight: Tensor, settings: GroupSettings
) -> Compared:
    """Generalised JSD on shared pieces and everything else, sorted L1 on the rest; see `hybrid`."""
    groups = groups.wide()
    ids, log_p = need(groups.student_ids), need(groups.logprobs)
    shared, safe = ids >= 0, ids.clamp(min=0)
    a, b = groups.log_scale.exp().unsqueeze(1).to(q.dtype), further.exp().unsqueeze(1)
    keep = torch.ones_like(q).scatter_reduce_(1, safe, (~shared).to(q.dtype), "amin")
    kept = q * keep
    p = torch.where(shared, log_p.exp().to(q.dtype), 0.0) * a
    left = torch.cat([p, (1 - p.sum(dim=1, keepdim=True)).clamp(min=0)], dim=1)
    rest = kept.sum(dim=1, keepdim=True) * b - torch.expm1(further).unsqueeze(1)
    with torch.enable_grad():
        right = torch.cat([torch.where(shared, q.gather(1, safe), 0.0) * b, rest], dim=1).requires_grad_()
        matched = generalised_jsd(left, right, settings.beta)
        (slopes,) = torch.autograd.grad(matched.sum(), right)
    others = _without(sorted_row(log_p, groups.bands, settings.edges, groups.kept), shared).to(q.dtype)
    unmatched, direction, slope = rank_signs(others * a, kept, further.exp())
    one, other = settings.overlap * weight.unsqueeze(1), (1 - settings.overlap) * weight.unsqueeze(1)
    direction.mul_(other).add_(one * slopes[:, -1:]).mul_(keep).mul_(b)
    pieces = torch.where(shared, slopes[:, :-1] * one * b, 0.0)
    direction.scatter_add_(1, safe, pieces)
    mean = other.squeeze(1) * slope + (one * slopes * right.detach()).sum(dim=1)
    mean += (one * slopes[:, -1:] * (kept.sum(dim=1, keepdim=True) * b - rest)).squeeze(1)
    value = settings.overlap * matched.detach() + (1 - settings.overlap) * unmatched
    # in the last outcome kept * b grows with b, and 1 - b falls
    return value, mean - (one * slopes[:, -1:] * b).squeeze(1), direction, mean


def _without(row: Tensor, left_out: Tensor) -> Tensor:
    """`row [G, V]`, descending, without those of its first K values that `left_out [G, K]` marks; padded with zeros."""
    count, k = left_out.sum(dim=1, keepdim=True), left_out.shape[1]
    order = left_out.long().argsort(dim=1, stable=True)
    columns = torch.arange(row.shape[1], device=row.device)
    moved = (columns + count).clamp(max=row.shape[1] - 1)
    moved[:, :k] = torch.where(columns[:k] < k - count, order, moved[:, :k])
    return row.gather(1, moved).masked_fill_(columns >= row.shape[1] - count, 0.0)


def rank_signs(p: Tensor, q: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over ranks of |scale q_(r) - p_(r)| `[G]`, the sign at each value's rank `[G, V]`, and Σ_v sign scale q `[G]`.

    p      [G, V_t]  descending
    q      [G, V]    in any order
    scale  [G]
    """
    column = scale.unsqueeze(1)
    width = q.shape[1]
    common = min(p.shape[1], width)
    order = None
    if q.device.type == "cpu":
        ordered = torch.from_numpy(np.sort(q.numpy(), axis=1)).flip(1)
    else:
        ordered, order = q.sort(dim=1, descending=True)
    scaled = ordered * column
    off = scaled.clone()
    off[:, :common] -= p[:, :common]
    signs = off.sign()
    value = off.abs().sum(dim=1) + p[:, common:].sum(dim=1)
    slope = (signs * scaled).sum(dim=1)
    if order is not None:
        return value, torch.empty_like(q).scatter_(1, order, signs), slope
    return value, _signs_of_values(q, ordered, signs), slope


def _signs_of_values(q: Tensor, ordered: Tensor, signs: Tensor) -> Tensor:
    """The sign at the rank of each value: `signs` are those along the ranks, `ordered` the values there, descending."""
    signs_of_values = torch.empty_like(q)
    changes = signs[:, 1:] != signs[:, :-1]
    for row in range(len(q)):
        start = changes[row].nonzero().squeeze(1) + 1  # ranks where a run of equal signs begins, but for the first
        borders = ordered[row, start].flip(0).contiguous().numpy()
        runs = torch.cat([signs[row, :1], signs[row, start]]).numpy()
        if len(borders) == 0:
            signs_of_values[row] = float(runs[0])
            continue
        run = len(borders) - np.searchsorted(borders, q[row].numpy(), side="left")  # borders not below the value
        signs_of_values[row] = torch.from_numpy(runs[run])
    return signs_of_values
