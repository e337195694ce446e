"""Losses over groups of tokens that cover the same text: for students with any tokenizer (see `alignment`).

Shapes: n student positions (rows of logits), G groups, V student vocabulary, V_t teacher vocabulary, K kept tokens,
B rank bands. What stands for a group of several tokens (`GroupSettings.merge`), on either side:

    observed   p(v) p(rest of the text | its first token): the distribution at the first token, times the chain-rule probability
               of the tokens after it. TRL's GOLD calls it so too; its rows begin one position late, ours do not
    exact      p(beginning of the text) p(v | beginning): the distribution at the last token, times the chain-rule probability of
               the tokens before it. These are joint probabilities of the beginning and v (`bayesian` in TRL)

With one token the factor is 1, and the loss is the plain one. In `first` and `single` all groups have one token on both sides,
because batches are made so: of each group the first token, or only the groups that have no more.

Add a loss: one function `(logits, groups, settings) -> [G]` and one line in `LOSSES` of
`kd.student_trainer.losses.loss_registry`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.models.top_k import top_k_by_threshold
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.losses.loss_targets import GroupTargets, need
from kd.student_trainer.losses.ranks import cumulative_curve, mass_of_first, sorted_row

FAST_HEAD = 64
"""Ranks that the fast mode of `uld` compares one by one."""
FAST_BINS = 256
"""Bins of log-probability for all further ranks; the number of a bin is a byte."""
FAST_RANGE = 16.0
"""Most nats below the last of those ranks that the bins cover; lower values share the last bin."""
ALM_TEMPERATURE = 100.0
"""Temperature tau of `alm`."""


def _student(logits: Tensor, groups: GroupTargets, settings: GroupSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Logits over T of the token of each group that is compared `[G, V]`, their log-normaliser `[G]`, and the log-probability
    of the group's other tokens `[G]`."""
    scaled = logits / settings.temperature
    log_z = scaled.logsumexp(dim=1)
    gold = scaled.gather(1, groups.gold_ids.unsqueeze(1)).squeeze(1) - log_z
    first, stop = groups.first, groups.stop
    exact = settings.merge == "exact"
    compared, others = (stop - 1, (first, stop - 1)) if exact else (first, (first + 1, stop))
    factor = group_sums(gold, *others)
    factor = torch.where(stop - first > 1, factor, torch.zeros_like(factor))  # exactly, for one token
    return scaled[compared], log_z[compared], factor


def group_sums(values: Tensor, start: Tensor, stop: Tensor) -> Tensor:
    """`[G]` sums of `values[start:stop]`; in float64, for they are differences of long sums."""
    total = F.pad(values.double().cumsum(0), (1, 0))
    return (total[stop] - total[start]).to(values.dtype)


def uld(logits: Tensor, groups: GroupTargets, settings: GroupSettings) -> Tensor:
    """Universal Logit Distillation per group: sum over ranks of |sorted teacher - sorted student|, 0..2.

    The smaller vocabulary is padded with zeros. `exact` sorts the student's whole row; `fast` compares FAST_HEAD
    ranks one by one, counts the rest into FAST_BINS bins by value, and compares the mass of each bin with that of as many
    teacher ranks: a lower bound by the triangle inequality, off only where the two curves cross inside a bin.

    logits   [n, V]  unnormalised
    returns  [G]

    Boizard et al. 2024, arXiv:2402.12030, equation 4 with uniform cost.
    """
    z, log_z, further = _student(logits, groups, settings)
    q = (z - log_z.unsqueeze(1)).exp()
    if settings.ranking == "fast":
        return _binned_uld(z, q, further, groups, settings)
    groups = groups.wide()
    p = sorted_row(need(groups.logprobs), groups.bands, settings.edges, groups.kept).to(q.dtype)
    p = p * groups.log_scale.exp().unsqueeze(1)
    return sorted_distance(p, q * further.exp().unsqueeze(1))


def sorted_distance(p: Tensor, q: Tensor) -> Tensor:
    """`[G]`: sum over ranks of |p_(r) - q_(r)|, `p [G, V_t]` in descending order, `q [G, V]` in any."""
    q = q.sort(dim=1, descending=True).values
    common = min(p.shape[1], q.shape[1])
    rest = p[:, common:].sum(dim=1) + q[:, common:].sum(dim=1)
    return (p[:, :common] - q[:, :common]).abs().sum(dim=1) + rest


def _binned_uld(z: Tensor, q: Tensor, further: Tensor, groups: GroupTargets, settings: GroupSettings) -> Tensor:
    """Masses of the student's value bins against the teacher's mass in the same ranks."""
    with torch.no_grad():
        bins, p, beyond = uld_bins(z, groups, settings)
    mass = torch.zeros_like(p).scatter_add(1, bins, q)
    a, b = groups.log_scale.exp().unsqueeze(1).to(q.dtype), further.exp().unsqueeze(1)
    return (a * p - b * mass).abs().sum(dim=1) + a.squeeze(1) * beyond


def uld_bins(z: Tensor, groups: GroupTargets, settings: GroupSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Each logit's bin `[G, V]`, the teacher's mass in the ranks of each bin `[G, bins]`, and beyond the student's
    ranks `[G]`. The first FAST_HEAD ranks have a bin each, the last bins; all others share FAST_BINS by value.
    """
    head = min(FAST_HEAD, z.shape[1])
    on_host = z.device.type == "cpu" and z.dtype == torch.float32
    top, ids = top_k_by_threshold(z, head) if on_host else z.topk(head, dim=1)
    span = (top[:, -1:] - z.amin(dim=1, keepdim=True)).clamp(min=1e-6, max=FAST_RANGE)  # a flat row: finer bins
    positions = (top[:, -1:] - z).mul_(FAST_BINS / span).clamp_(0, FAST_BINS - 1)
    bins = positions.to(torch.uint8).long()  # NaN, of a student that has diverged, becomes some byte: still a bin
    bins.scatter_(1, ids, FAST_BINS + torch.arange(head, device=z.device).expand_as(ids))
    counts = torch.zeros(len(z), FAST_BINS + head, device=z.device, dtype=z.dtype)
    counts.scatter_add_(1, bins, torch.ones_like(z))
    ends = counts[:, :FAST_BINS].cumsum(dim=1).add_(head)
    ranks = torch.cat([ends, torch.arange(1, head + 1, device=z.device).expand_as(ids)], dim=1)
    groups = groups.wide()
    curve = cumulative_curve(need(groups.logprobs), groups.bands, settings.edges, groups.kept)
    first = mass_of_first(ranks, *curve)
    tail, top_mass = first[:, :FAST_BINS], first[:, FAST_BINS:]
    p = torch.cat([torch.cat([top_mass[:, -1:], tail], dim=1).diff(dim=1), F.pad(top_mass, (1, 0)).diff(dim=1)], dim=1)
    beyond = (curve[1][:, -1] - tail[:, -1]).clamp(min=0)
    return bins, p.to(z.dtype), beyond.to(z.dtype)


def hybrid(logits: Tensor, groups: GroupTargets, settings: GroupSettings) -> Tensor:
    """Generalised JSD on the pieces both sides have, sorted L1 on all others, weighted by the vocabularies' overlap.

    The teacher's kept pieces that the student has too are compared by name, everything else being one outcome; the
    rest of both rows is compared by rank, as in `uld`.

    logits   [n, V]  unnormalised
    returns  [G]

    TRL's GOLD (hybrid ULD), with pieces compared as bytes and the cut tail accounted for.
    """
    z, log_z, further = _student(logits, groups, settings)
    groups = groups.wide()
    ids, log_p = need(groups.student_ids), need(groups.logprobs)
    shared = ids >= 0
    safe = ids.clamp(min=0)
    scale_p, scale_q = groups.log_scale.unsqueeze(1), further.unsqueeze(1)
    q = (z - log_z.unsqueeze(1)).exp()
    keep = torch.ones_like(q).scatter_reduce(1, safe, (~shared).to(q.dtype), "amin")
    matched_q = torch.where(shared, q.gather(1, safe), 0.0) * scale_q.exp()
    matched_p = torch.where(shared, log_p.exp().to(q.dtype), 0.0) * scale_p.exp()
    # the student's rest is summed: 1 - sum has no digits, and no gradient, where the student is confident
    rest_q = (q * keep).sum(dim=1, keepdim=True) * scale_q.exp() - torch.expm1(scale_q)
    rest_p = (1 - matched_p.sum(dim=1, keepdim=True)).clamp(min=0)
    matched = generalised_jsd(
        torch.cat([matched_p, rest_p], dim=1), torch.cat([matched_q, rest_q], dim=1), settings.beta
    )
    others = sorted_row(log_p, groups.bands, settings.edges, groups.kept).to(q.dtype)
    head = torch.where(shared, 0.0, others[:, : shared.shape[1]])
    others = torch.cat([head, others[:, shared.shape[1] :]], dim=1).sort(dim=1, descending=True).values
    unmatched = sorted_distance(others * scale_p.exp(), q * keep * scale_q.exp())
    return settings.overlap * matched + (1 - settings.overlap) * unmatched


def generalised_jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """`[G]`: beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, over outcomes `[G, C]`.

    Agarwal et al. 2023 (GKD), arXiv:2306.13649, equation 1.
    """
    m = (beta * p + (1 - beta) * q).clamp(min=1e-30)
    tiny = torch.finfo(q.dtype).tiny
    left = (p * (p.clamp(min=tiny).log() - m.log())).sum(dim=1)
    right = (q * (q.clamp(min=tiny).log() - m.log())).sum(dim=1)
    return beta * left + (1 - beta) * right


def alm(logits: Tensor, groups: GroupTargets, settings: GroupSettings) -> Tensor:
    """Approximate likelihood matching per group: how probable either side finds the group's text.

    tau * KL(Bernoulli(P^(1/tau)) || Bernoulli(Q^(1/tau))) with P, Q the chain-rule probabilities of the whole group at
    temperature 1 and tau = 100. Of the teacher it needs only the log-probabilities of the text's own tokens.

    logits   [n, V]  unnormalised
    returns  [G]

    Minixhofer et al. 2025, arXiv:2503.20083 (without its correction for biased chunk ends).
    """
    gold = logits.log_softmax(dim=1).gather(1, groups.gold_ids.unsqueeze(1)).squeeze(1)
    return alm_of(group_sums(gold, groups.first, groups.stop), groups)


def alm_of(log_q: Tensor, groups: GroupTargets) -> Tensor:
    """`alm` from the student's log-probability of each group's text `[G]`."""
    # a certain token has log-probability 0, where log(1 - p) has no value
    x, y = (v.clamp(max=-1e-6) / ALM_TEMPERATURE for v in (groups.chunk_logprob.to(log_q.dtype), log_q))
    other_x, other_y = torch.log(-torch.expm1(x)), torch.log(-torch.expm1(y))
    return ALM_TEMPERATURE * (x.exp() * (x - y) + other_x.exp() * (other_x - other_y))
