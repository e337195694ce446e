"""The rank of one logit in its row, and seeded draws from a row."""

from __future__ import annotations

import numpy as np
import torch

Uniforms = np.ndarray | torch.Tensor


def count_larger(
    logits: torch.Tensor, gold: torch.Tensor, kept: torch.Tensor | None, marks: np.ndarray
) -> torch.Tensor:
    """`[n]` int64: how many of `logits [n, V]` are larger than `gold [n, 1]`.

    Where gold is not smaller than the smallest of the row's top-k, `kept [n, K]`, only those are compared. On a CPU `marks`
    is working memory, see `kd.models.top_k.marks_for`.
    """
    if logits.device.type != "cpu":
        return torch.gt(logits, gold).sum(dim=1)
    if kept is None:
        ranks, beyond = torch.zeros(len(gold), dtype=torch.long), list(range(len(gold)))
    else:
        ranks = (kept > gold).sum(dim=1)
        beyond = (gold < kept[:, -1:]).squeeze(1).nonzero().squeeze(1).tolist()
    rows, values, marked = logits.numpy(), gold.numpy(), marks[0, : logits.shape[1]]
    for row in beyond:  # numpy counts a row of booleans ten times as fast as torch sums it
        ranks[row] = int(np.count_nonzero(np.greater(rows[row], values[row], out=marked)))
    return ranks


def draw(shifted: torch.Tensor, uniforms: Uniforms) -> tuple[torch.Tensor, torch.Tensor]:
    """R draws per row from softmax(shifted) by inverting its cumulative sum (float64) at `uniforms [n, R]`.

    Returns unique ids `[n, R]` and their counts `[n, R]` (int64, most drawn first, unused slots 0). The draws depend only
    on the row's logits and its uniforms, not on batch or chunk.
    """
    points = torch.as_tensor(uniforms).to(shifted.device)
    cumulative = shifted.double().exp().cumsum(dim=1)
    drawn = torch.searchsorted(cumulative, points * cumulative[:, -1:], right=True)
    drawn = drawn.clamp(max=shifted.shape[1] - 1).sort(dim=1).values
    fresh = torch.ones_like(drawn, dtype=torch.bool)
    fresh[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    slot = fresh.cumsum(dim=1) - 1
    ids = torch.zeros_like(drawn).scatter_(1, slot, drawn)
    counts = torch.zeros_like(drawn).scatter_add_(1, slot, torch.ones_like(drawn))
    counts, order = counts.sort(dim=1, descending=True, stable=True)
    return ids.gather(1, order), counts
