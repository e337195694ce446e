"""The kernel of a divergence over rows that differ in length: kept ids one row after another, and nothing padded.

It computes what `row_kernels.outcomes_` computes, with sums over the entries of a row in place of sums over columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entries:
    """E entries of n rows."""

    ids: Tensor
    """[E] int64, unique within a row"""
    rows: Tensor
    """[E] int64: the row of each entry, ascending; every row has at least one"""
    count: int
    """Number of rows n."""

    def sums(self, values: Tensor) -> Tensor:
        """`[E] -> [n]` sums over each row's entries."""
        return values.new_zeros(self.count).index_add_(0, self.rows, values)

    def logsumexp(self, values: Tensor) -> Tensor:
        """`[E] -> [n]` logsumexp over each row's entries."""
        top = values.new_empty(self.count).scatter_reduce_(0, self.rows, values, "amax", include_self=False)
        return top + self.sums((values - top[self.rows]).exp_()).log()


Pairwise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""p, log q of the same outcomes -> each outcome's part of a divergence, and its derivative by log q."""


def entries_of(ids: Tensor, kept: Tensor) -> Entries:
    """Entries `ids [E]`, of which row i has `kept[i]`; the number of entries is known, so nothing waits for a device."""
    rows = torch.arange(len(kept), device=ids.device).repeat_interleave(kept, output_size=len(ids))
    return Entries(ids, rows, len(kept))


def ragged_outcomes_(
    logits: Tensor,
    entries: Entries,
    gold_ids: Tensor,
    p: Tensor,
    p_rest: Tensor,
    divergence: Pairwise,
    weight: float,
    ce_weight: float,
) -> tuple[Tensor, Tensor]:
    """Value of a divergence and cross-entropy, `[n]` each; `logits [n, V]` become
    weight dD/dlogits + ce_weight dCE/dlogits.

    p        [E]  the teacher's probabilities of the entries
    p_rest   [n]  and of everything else

    A row may keep all V ids: there is then nothing else, whatever rounding leaves in `p_rest`.
    """
    lowest = torch.finfo(logits.dtype).min
    kept = (entries.rows, entries.ids)
    chosen = logits.gather(1, gold_ids.unsqueeze(1)).squeeze(1)
    head = logits[kept]
    logits.index_put_(kept, logits.new_full((), -torch.inf))
    top = logits.amax(dim=1, keepdim=True).clamp_(min=lowest)
    total = logits.sub_(top).exp_().sum(dim=1)
    rest = top.squeeze(1) + total.log()
    log_z = torch.logaddexp(entries.logsumexp(head), rest)
    log_q = head - log_z[entries.rows]
    log_q_rest = (rest - log_z).clamp_(min=lowest)
    value, g = divergence(p, log_q)
    nothing = total == 0.0
    value_rest, g_rest = (part.masked_fill(nothing, 0.0) for part in divergence(p_rest, log_q_rest))
    slope = ce_weight - weight * (entries.sums(g) + g_rest)
    grad_rest = weight * g_rest + log_q_rest.exp() * slope
    logits.mul_((grad_rest / total.clamp(min=torch.finfo(logits.dtype).tiny)).unsqueeze(1))
    logits.index_put_(kept, weight * g + log_q.exp_() * slope[entries.rows])
    gold = gold_ids.unsqueeze(1)
    logits.scatter_add_(1, gold, torch.full_like(gold, -ce_weight, dtype=logits.dtype))
    return entries.sums(value) + value_rest, log_z - chosen
