"""`text-kl`: KL between what teacher and student expect of the text, for students with any tokenizer.

The targets are outcomes (`kd.student_trainer.expected.outcome_rows`): sets of student tokens with the teacher's probability of
each, and the rest. Sets are ranges of `places`: the student's ids have an order in which each set lies side by side.

    KL = Σ_j P_j (log P_j - log Q_j) + rest (log rest - log Q_rest),   Q_j = Σ_(v in j) q_v

With q = softmax(u) a logit's derivative is q_v - P_c r_v, where c is the outcome that v belongs to and r_v = q_v / Q_c the share
of v in it: the P's sum to one. With equal tokenizers every set is one token, and this is `kl`.

Shapes: N positions, V vocabulary, E outcomes in all, J outcomes of a position at the most.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kd.student_trainer.losses.loss_settings import LossWeights
from kd.student_trainer.losses.loss_targets import LossTargets, need
from kd.student_trainer.losses.row_kernels import cross_entropy_apart, softmax_, subtract_, sums_of, tiles


def text_kl(logits: Tensor, targets: LossTargets, *, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) per position over the outcomes, nats.

    logits   [N, V]  unnormalised
    returns  [N]     zero where the student gives every outcome the teacher's probability
    """
    p, owner = outcomes_of(targets, logits)
    scaled = logits / temperature
    top, _, mass = _shares(scaled, owner, p)
    log_q = top + mass.log() - scaled.logsumexp(dim=1, keepdim=True)
    return _divergence(p, log_q)


def _shares(scaled: Tensor, owner: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each outcome's largest logit `[N, J + 1]`, exp(logit - largest) `[N, V]`, and its sum over the tokens of each outcome.

    Outcomes have a largest logit of their own: the mass of one that the student rules out would be lost in float32. One
    without tokens has 0 and a sum of 1.
    """
    with torch.no_grad():
        top = torch.full_like(p, -torch.inf).scatter_reduce_(1, owner, scaled, "amax")
        empty = top == -torch.inf
        top = top.masked_fill_(empty, 0.0)
    share = (scaled - top.gather(1, owner)).exp()
    return top, share, empty.to(p.dtype).scatter_add(1, owner, share)


def _divergence(p: Tensor, log_q: Tensor) -> Tensor:
    """`[N]`: Σ p (log p - log q), over outcomes `[N, J + 1]`."""
    return (torch.xlogy(p, p) - p * log_q).sum(dim=1)


def outcomes_of(targets: LossTargets, like: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's probabilities `[N, J + 1]`, the rest last, and the outcome `[N, V]` of every student id.

    like   `[N, V]`, whose dtype the probabilities get
    """
    kept, places = need(targets.kept), need(targets.places)
    count, width, longest = len(kept), like.shape[1], int(targets.lengths.max(initial=1))
    row = torch.arange(count, device=kept.device).repeat_interleave(kept, output_size=int(targets.offsets[-1]))
    begin = kept.cumsum(0) - kept
    number = torch.arange(len(row), device=kept.device) - begin[row]
    p = torch.zeros(count, longest + 1, dtype=like.dtype, device=like.device)
    p[row, number] = need(targets.logprobs).to(like.dtype).exp()
    p[:, longest] = need(targets.tail_mass).to(like.dtype)
    # ranges do not overlap: the number of the range that a place lies in changes at starts and stops alone
    steps = torch.zeros(count * (width + 1), dtype=torch.int32, device=like.device)
    change = (number - longest).to(torch.int32)
    steps.index_add_(0, row * (width + 1) + need(targets.range_starts).long(), change)
    steps.index_add_(0, row * (width + 1) + need(targets.range_stops).long(), -change)
    in_order = steps.view(count, width + 1)[:, :width].cumsum(dim=1).add_(longest)
    return p, in_order.index_select(1, places)


def text_kernel(logits: Tensor, targets: LossTargets, weights: LossWeights) -> Tensor:
    """`text_kl` beside cross-entropy: the sums of (total, kd, ce); `logits` become the gradient of the total."""
    sums = logits.new_zeros(3)
    for rows in tiles(logits):
        z, part = logits[rows], targets[rows]
        gold = part.gold_ids.unsqueeze(1)
        plain = None
        if weights.temperature != 1.0:
            ce, plain = cross_entropy_apart(z, part.gold_ids, weights.ce)
            z.div_(weights.temperature)
        chosen = z.gather(1, gold).squeeze(1)
        p, owner = outcomes_of(part, z)
        top, share, mass = _shares(z, owner, p)
        log_z = softmax_(z)
        kd = _divergence(p, top + mass.log() - log_z.unsqueeze(1))
        shared = weights.ce if weights.temperature == 1.0 else 0.0  # one softmax serves both losses
        if weights.temperature == 1.0:
            ce = log_z - chosen
        slope = weights.kd / weights.temperature
        z.mul_(slope + shared).sub_(share.mul_((p * slope / mass).gather(1, owner)))
        if shared:
            subtract_(z, part.gold_ids, shared)
        if plain is not None:
            z.add_(plain)
        sums += sums_of(weights.kd * kd.sum(), weights.ce, kd.sum(), ce.sum())
    return sums
