"""Seeded draws from what lies beyond the kept tokens of a row, at temperature 1.

With the mass m of the tail and n draws, the estimate p̂_v = m c_v / n of every probability in the tail has p_v as its mean, and so
has a gradient that is linear in p. The draws are systematic: one random number u, and n points (u + j) m / n, evenly spaced over
the cumulated probabilities. So an id is drawn n p_v / m times, rounded up or down. No n draws of equal weight vary less in any p̂_v
(independent draws vary 1.0 to 1.8 times as much on the embedded teacher). They are without replacement where n p_v <= m.

A row draws R m tokens, rounded up. For a given number of draws over all rows, the variance, a sum of m^2 / n, is then least. Every
draw stands for at most 1 / R. With a head of all tokens above 1 / R the chances are nearly those of VarOpt sampling (Cohen et al.
2009, arXiv:0803.0473). Of all unbiased estimates from so many tokens, it has the least variance on average over the sums of
any number of tokens, and so has systematic sampling with its chances (Szegedy and Thorup 2007, On the variance of subset sum
estimation). What VarOpt has besides, that no two estimates are positively correlated, systematic draws do not have. Sparse Logit
Sampling (arXiv:2503.16870) draws independently, from whole rows.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kd.cache_builder.teacher.normalisers import SEGMENT, exp_of_quotient
from kd.cache_builder.teacher.selection import Uniforms


def draw_tail(
    shifted: Tensor, log_z: Tensor, ids: Tensor, kept: Tensor, most: int, uniforms: Uniforms, powers: Tensor
) -> tuple[Tensor, Tensor]:
    """Draws of each row from its tokens beyond the first `kept`: ids `[n, most]` int32, and how many of them are used `[n]`.

    shifted   [n, V]   logits with maximum 0
    log_z     [n]      their log-normaliser at temperature 1
    ids       [n, K]   the most probable tokens
    kept      [n]      how many of `ids` each row keeps
    uniforms  [n, 1]   in [0, 1)
    powers    [n, W]   is overwritten; W >= V, and what is beyond V holds zeros

    The draws of a row depend on its logits and its uniform alone, not on batch or chunk.
    """
    blocks, sums = _tail_blocks(shifted, ids, kept, powers)
    cumulative = sums.cumsum(dim=1)
    total = cumulative[:, -1:]
    mass = total.squeeze(1) * (-log_z.double()).exp()
    draws = torch.where(mass > 0, (most * mass).ceil().clamp(min=1, max=most), 0.0)
    slots = torch.arange(most, device=shifted.device)
    used = slots < draws.unsqueeze(1)
    points = (torch.as_tensor(uniforms).to(shifted.device) + slots) / draws.clamp(min=1).unsqueeze(1) * total
    block = _first_above(cumulative, points)
    rows, columns = _slots(used)
    chosen = block[rows, columns]
    before = cumulative[rows, chosen] - sums[rows, chosen]
    inside = blocks[rows, chosen].double().cumsum(dim=1)
    # a block's sum in float32 differs from the cumulated values in the last bits
    rest = (points[rows, columns] - before) / sums[rows, chosen].clamp(min=1e-300) * inside[:, -1]
    inner = _first_above(inside, rest.unsqueeze(1)).squeeze(1)
    drawn = torch.zeros_like(used, dtype=torch.int32)
    drawn[rows, columns] = (chosen * SEGMENT + inner).to(torch.int32)
    return drawn * used, draws.long()


def _tail_blocks(shifted: Tensor, ids: Tensor, kept: Tensor, powers: Tensor) -> tuple[Tensor, Tensor]:
    """exp of the logits beyond the kept ones, in blocks of ids `[n, blocks, SEGMENT]`, and the blocks' sums in float64."""
    filled = powers[:, : shifted.shape[1]]
    exp_of_quotient(shifted, 1.0, filled)
    beyond = torch.arange(ids.shape[1], device=ids.device) >= kept.unsqueeze(1)
    filled.scatter_(1, ids, filled.gather(1, ids) * beyond)
    width = -(-powers.shape[1] // SEGMENT) * SEGMENT
    blocks = F.pad(powers, (0, width - powers.shape[1])).view(len(powers), -1, SEGMENT)
    if shifted.device.type == "cpu":
        ones = np.ones(SEGMENT, dtype=np.float32)
        return blocks, torch.from_numpy(np.vecdot(blocks.numpy(), ones)).double()
    return blocks, blocks.sum(dim=2).double()


def _slots(used: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the slots that are drawn: those in use. On a GPU all are, because to know which are would be to wait."""
    if used.device.type == "cpu":
        rows, columns = used.nonzero(as_tuple=True)
        return rows, columns
    count, width = used.shape
    every = torch.arange(count * width, device=used.device)
    return every // width, every % width


def _first_above(cumulative: Tensor, points: Tensor) -> Tensor:
    """Index of the first of ascending values `[n, S]` above each point `[n, R]`, and at most the first that is the last value:
    what follows has no mass. Of a row of NaN, which is refused later, some index."""
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    places = torch.minimum(torch.searchsorted(cumulative, points.contiguous(), right=True), last)
    return places.clamp(max=cumulative.shape[1] - 1)
