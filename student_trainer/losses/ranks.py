"""A teacher's whole row of probabilities by rank, rebuilt from its top-k and the mass of rank bands.

ULD compares sorted probabilities, so ids do not matter and the tail's shape does: k = 16 with a tail of zeros errs by
10 %, with 16 bands by less than 0.1 % (benchmarks/uld.py). Between the k-th value and the bands' means, placed at each
band's geometric middle, log p is taken to be linear in log rank (a power law, as language models' tails are), and each
band is scaled to its exact mass.

Shapes: G rows, K kept tokens, B bands with edges e_0 = K < … < e_B = V; rank r counts from 0.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

POINTS_PER_BAND = 8
"""Knots of the cumulative curve inside a band."""


def sorted_row(logprobs: Tensor, bands: Tensor | None, edges: tuple[int, ...]) -> Tensor:
    """`[G, V]` probabilities in descending order of the head; bands keep their mass exactly.

    logprobs  [G, K]  nats, descending
    bands     [G, B]  log-mass of ranks [e_b, e_b+1); None where K = V
    edges     [B + 1] ranks, the last is V
    """
    head = logprobs.exp()
    if bands is None:
        return head
    ranks, owner = _every_rank(edges, head.device)
    density = _density(logprobs, bands, edges, ranks)
    # band by band: thousands of additions to one address are what a GPU is slow at
    sums = torch.stack([density[:, a - edges[0] : b - edges[0]].sum(dim=1) for a, b in pairwise(edges)], dim=1)
    return torch.cat([head, density * (bands.exp() / sums.clamp(min=1e-38)).index_select(1, owner)], dim=1)


def cumulative_curve(logprobs: Tensor, bands: Tensor | None, edges: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Knots `[P]` (numbers of ranks, ascending from 0) and `[G, P]` the mass of so many first ranks.

    Exact at every rank of the head and at every band's edge; inside a band the interpolated density is summed over
    at most `POINTS_PER_BAND` steps.
    """
    head = torch.nn.functional.pad(logprobs.exp().cumsum(dim=1), (1, 0))
    k = logprobs.shape[1]
    if bands is None:
        return torch.arange(k + 1, device=head.device), head
    points, owners = _steps(edges, head.device)
    low = torch.nn.functional.pad(points[:-1], (1, 0), value=edges[0])
    middle = ((low + 1).double() * points.double()).sqrt() - 1  # of the ranks [low, point)
    share = _density(logprobs, bands, edges, middle) * (points - low)
    sums = torch.zeros_like(bands).index_add_(1, owners, share)
    mass = share * (bands.exp() / sums.clamp(min=1e-38)).index_select(1, owners)
    knots = torch.cat([torch.arange(k + 1, device=head.device), points])
    return knots, torch.cat([head, head[:, -1:] + mass.cumsum(dim=1)], dim=1)


# what follows from the edges alone is made once per device: from the host's memory it would be waited for every time


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _every_rank(edges: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The ranks beyond the head, and the band of each."""
    ranks = torch.arange(edges[0], edges[-1], device=device)
    return ranks, torch.bucketize(ranks, torch.tensor(edges[1:], device=device), right=True)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _steps(edges: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Upper ends of the steps inside all bands, and the band of each; empty bands have none."""
    steps: list[int] = []
    owner: list[int] = []
    for band, (low, high) in enumerate(pairwise(edges)):
        if high <= low:
            continue
        inner = {
            round(low * (high / low) ** (i / POINTS_PER_BAND)) if low else round(high * i / POINTS_PER_BAND)
            for i in range(1, POINTS_PER_BAND)
        }
        ends = [*sorted(e for e in inner if low < e < high), high]
        steps += ends
        owner += [band] * len(ends)
    points, owners = (torch.tensor(numbers, device=device, dtype=torch.int64) for numbers in (steps, owner))
    return points, owners


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _middles(edges: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Bands that have ranks, their log-widths (float64), and the logs of the ranks of the knots (float64)."""
    filled = [b for b in range(len(edges) - 1) if edges[b + 1] > edges[b]]
    middles = [
        math.log((edges[b] + 1 + edges[b + 1]) / 2)
        if edges[b + 1] - edges[b] == 1
        else 0.5 * (math.log(edges[b] + 1) + math.log(edges[b + 1]))
        for b in filled
    ]
    widths = [math.log(edges[b + 1] - edges[b]) for b in filled]
    x = [math.log(max(edges[0], 1)), *middles]
    return (
        torch.tensor(filled, device=device, dtype=torch.int64),
        torch.tensor(widths, device=device, dtype=torch.float64),
        torch.tensor(x, device=device, dtype=torch.float64),
    )


def _density(logprobs: Tensor, bands: Tensor, edges: tuple[int, ...], ranks: Tensor) -> Tensor:
    """`[G, R]` interpolated probabilities at `ranks [R]` (from 0, beyond the head), before bands are scaled.

    Knots: the k-th value at rank k - 1, then each band's mean at its geometric middle; beyond the last knot its
    slope goes on.
    """
    filled, widths, x = _middles(edges, bands.device)
    y = torch.cat([logprobs[:, -1:], bands.index_select(1, filled) - widths.to(bands.dtype)], dim=1)
    at = (ranks.double() + 1).log()
    right = torch.bucketize(at, x).clamp(1, len(x) - 1)
    weight = ((at - x[right - 1]) / (x[right] - x[right - 1]).clamp(min=1e-12)).to(y.dtype)
    left = y.index_select(1, right - 1)
    return (left + (y.index_select(1, right) - left) * weight).exp()


def mass_of_first(ranks: Tensor, knots: Tensor, curve: Tensor) -> Tensor:
    """`[G, R]` mass of the first `ranks [G, R]` ranks, linear between knots; beyond the last knot all of it."""
    right = torch.bucketize(ranks.contiguous(), knots.to(ranks.dtype)).clamp(1, len(knots) - 1)
    low, high = knots[right - 1].to(curve.dtype), knots[right].to(curve.dtype)
    weight = ((ranks.to(curve.dtype) - low) / (high - low)).clamp(0, 1)
    left = curve.gather(1, right - 1)
    return left + (curve.gather(1, right) - left) * weight
