"""A teacher's whole row of probabilities by rank, rebuilt from its top-k and the mass of rank bands.

ULD compares sorted probabilities, so ids do not matter and the tail's shape does: k = 16 with a tail of zeros errs by
10 %, with 16 bands by less than 0.1 % (benchmarks/uld.py). Between the k-th value and the bands' means, placed at each
band's geometric middle, log p is taken to be linear in log rank (a power law, as language models' tails are), and each
band is scaled to its exact mass.

Where rows differ in length (`kept`), the bands begin at the same ranks in all rows, and a row's bands hold the mass of the ranks
that it does not keep: in each row, what was said above begins at its own last value.

Shapes: G rows, K kept tokens, B bands with edges e_0 = K < … < e_B = V (or e_0 as many as the shortest row may keep); rank r
counts from 0.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

POINTS_PER_BAND = 8
"""Knots of the cumulative curve inside a band."""


def sorted_row(logprobs: Tensor, bands: Tensor | None, edges: tuple[int, ...], kept: Tensor | None = None) -> Tensor:
    """`[G, V]` probabilities in descending order of the head; bands keep their mass exactly.

    logprobs  [G, K]  nats, descending; minus infinity beyond the `kept` ones
    bands     [G, B]  log-mass of ranks [e_b, e_b+1); None where K = V
    edges     [B + 1] ranks, the last is V
    kept      [G]     int64, where rows differ in length
    """
    head = logprobs.exp()
    if bands is None:
        return head
    ranks, owner = _every_rank(edges, head.device)
    density = _density(logprobs, bands, edges, ranks, kept)
    # band by band: thousands of additions to one address are what a GPU is slow at
    sums = torch.stack([density[:, a - edges[0] : b - edges[0]].sum(dim=1) for a, b in pairwise(edges)], dim=1)
    tail = density.mul_((bands.exp() / sums.clamp(min=1e-38)).index_select(1, owner))
    if kept is None:
        return torch.cat([head, tail], dim=1)
    tail[:, : head.shape[1] - edges[0]] += head[:, edges[0] :]  # where the one has a value, the other is 0
    return torch.cat([head[:, : edges[0]], tail], dim=1)


def cumulative_curve(
    logprobs: Tensor, bands: Tensor | None, edges: tuple[int, ...], kept: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Knots `[P]` (numbers of ranks, ascending from 0) and `[G, P]` the mass of so many first ranks.

    Exact at every rank of the head and at every band's edge; inside a band the interpolated density is summed over
    at most `POINTS_PER_BAND` steps.
    """
    head = torch.nn.functional.pad(logprobs.exp().cumsum(dim=1), (1, 0))
    k = logprobs.shape[1]
    if bands is None:
        return torch.arange(k + 1, device=head.device), head
    if kept is not None:
        return _curve_beyond(logprobs, kept, bands, edges)
    points, owners = _steps(edges, head.device)
    low = torch.nn.functional.pad(points[:-1], (1, 0), value=edges[0])
    middle = ((low + 1).double() * points.double()).sqrt() - 1  # of the ranks [low, point)
    share = _density(logprobs, bands, edges, middle) * (points - low)
    sums = torch.zeros_like(bands).index_add_(1, owners, share)
    mass = share * (bands.exp() / sums.clamp(min=1e-38)).index_select(1, owners)
    knots = torch.cat([torch.arange(k + 1, device=head.device), points])
    return knots, torch.cat([head, head[:, -1:] + mass.cumsum(dim=1)], dim=1)


def _curve_beyond(logprobs: Tensor, kept: Tensor, bands: Tensor, edges: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """`cumulative_curve` of rows that differ in length: up to the longest of them, every rank is a knot."""
    knots, low, owners = _steps_beyond(edges, -(-logprobs.shape[1] // 32) * 32, logprobs.device)  # few different widths
    high = knots[1 + edges[0] :]
    middle = ((low + 1).double() * high.double()).sqrt() - 1  # of the ranks [low, high)
    share = _density(logprobs, bands, edges, middle, kept) * (high - low)
    sums = torch.zeros_like(bands).index_add_(1, owners, share)
    mass = share * (bands.exp() / sums.clamp(min=1e-38)).index_select(1, owners)
    mass = torch.nn.functional.pad(mass, (edges[0], 0))
    mass[:, : logprobs.shape[1]] += logprobs.exp()
    return knots, torch.nn.functional.pad(mass.cumsum(dim=1), (1, 0))


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
    points, owners = (torch.tensor(numbers, device=device, dtype=torch.int64) for numbers in _step_ends(edges))
    return points, owners


def _step_ends(edges: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """`_steps` as lists."""
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
    return steps, owner


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _steps_beyond(edges: tuple[int, ...], width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Knots: every rank up to `width`, then the steps inside the bands. Of all steps behind the first edge: where they begin, and
    the band of each."""
    width = max(min(width, edges[-1]), edges[0])
    ends = [*range(edges[0] + 1, width + 1), *(point for point in _step_ends(edges)[0] if point > width)]
    band = [bisect_right(edges, end - 1) - 1 for end in ends]
    lists = ([*range(edges[0] + 1), *ends], [edges[0], *ends][: len(ends)], band)
    knots, low, owners = (torch.tensor(numbers, device=device, dtype=torch.int64) for numbers in lists)
    return knots, low, owners


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


def _density(
    logprobs: Tensor, bands: Tensor, edges: tuple[int, ...], ranks: Tensor, kept: Tensor | None = None
) -> Tensor:
    """`[G, R]` interpolated probabilities at `ranks [R]` (from 0, beyond the head), before bands are scaled.

    Knots: the k-th value at rank k - 1, then each band's mean at its geometric middle; beyond the last knot its
    slope goes on.
    """
    if kept is not None:
        return _density_beyond(logprobs, kept, bands, edges, ranks)
    filled, widths, x = _middles(edges, bands.device)
    y = torch.cat([logprobs[:, -1:], bands.index_select(1, filled) - widths.to(bands.dtype)], dim=1)
    at = (ranks.double() + 1).log()
    right = torch.bucketize(at, x).clamp(1, len(x) - 1)
    weight = ((at - x[right - 1]) / (x[right] - x[right - 1]).clamp(min=1e-12)).to(y.dtype)
    left = y.index_select(1, right - 1)
    return (left + (y.index_select(1, right) - left) * weight).exp()


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _filled(edges: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """First rank of each band that has ranks, and one past its last (float64)."""
    pairs = [(a, b) for a, b in pairwise(edges) if b > a]
    low, high = torch.tensor(pairs, device=device, dtype=torch.float64).reshape(-1, 2).T
    return low, high


def _density_beyond(logprobs: Tensor, kept: Tensor, bands: Tensor, edges: tuple[int, ...], ranks: Tensor) -> Tensor:
    """`_density` of rows that differ in length `[G, R]`: 0 at the ranks that a row keeps.

    Beyond the band in which a row ends, all rows have their knots at the same ranks, so the pieces of the line are looked up for
    all of them at once. The piece between a row's last value and the middle of what it leaves of that band is its own.
    """
    filled, _, shared_x = _middles(edges, bands.device)
    if not len(filled):  # every row keeps all ranks
        return bands.new_zeros(len(bands), len(ranks))
    low, high = _filled(edges, bands.device)
    end = kept.double().unsqueeze(1)
    begin = torch.maximum(low, end)
    width = high - begin
    inside = width > 0  # of the bands of a row, those that it does not keep as a whole
    middle = torch.where(width == 1, ((begin + 1 + high) / 2).log(), 0.5 * ((begin + 1).log() + high.log()))
    last = logprobs.gather(1, kept.unsqueeze(1) - 1).double()
    x = torch.cat([end.log(), torch.where(inside, middle, end.log())], dim=1)
    y = torch.cat([last, torch.where(inside, bands.index_select(1, filled) - width.clamp(min=1).log(), last)], dim=1)
    slope = y.diff(dim=1) / x.diff(dim=1).clamp(min=1e-12)
    start = (y[:, :-1] - slope * x[:, :-1]).to(bands.dtype)
    slope = slope.to(bands.dtype)
    at = (ranks.double() + 1).log()
    piece = torch.bucketize(at, shared_x).clamp(1, len(shared_x) - 1) - 1
    at = at.to(bands.dtype)
    line = slope.index_select(1, piece).mul_(at).add_(start.index_select(1, piece))
    partial = (~inside).sum(dim=1, keepdim=True).clamp(max=len(filled) - 1)
    until = x.gather(1, partial + 1).to(bands.dtype)
    line = torch.where(at <= until, slope.gather(1, partial) * at + start.gather(1, partial), line)
    return line.exp_().masked_fill_(ranks < kept.unsqueeze(1), 0.0)


def mass_of_first(ranks: Tensor, knots: Tensor, curve: Tensor) -> Tensor:
    """`[G, R]` mass of the first `ranks [G, R]` ranks, linear between knots; beyond the last knot all of it."""
    right = torch.bucketize(ranks.contiguous(), knots.to(ranks.dtype)).clamp(1, len(knots) - 1)
    low, high = knots[right - 1].to(curve.dtype), knots[right].to(curve.dtype)
    weight = ((ranks.to(curve.dtype) - low) / (high - low)).clamp(0, 1)
    left = curve.gather(1, right - 1)
    return left + (curve.gather(1, right) - left) * weight
