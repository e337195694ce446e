"""How much of a teacher a cache has to keep for a wanted gradient: errors on rows whose whole distribution is known.

The gradient of `kl` by a row's logits is q - p. From the top k with the rest as one outcome it differs beyond the top k alone,
where the rest's mass m is spread as the student spreads its own:

    error_v = p_v - m q_v / q_rest          sqrt(Σ error² / Σ (q - p)²) over all rows and tokens

Before there is a student, `usual_student` stands for it: one that has learnt how often each token comes, the mean of the teacher's
own rows. On the embedded teacher its errors at k = 16, 64 and 256 are 0.057, 0.021 and 0.004, where a student after 200 steps has
0.063, 0.023 and 0.004, and an untrained one 0.043, 0.013 and 0.002 (docs/log/2026-11.md).

R draws have no bias. Their error per row is the root of Σ_v p_v (1 - p_v) / R, relative to the same dense gradient.

Shapes: n rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd.cache_builder.store.targets import TargetConfig

CERTAIN = 0.95
"""Probability above which a token is called certain."""


@dataclass(frozen=True)
class Pilot:
    """Rows of a teacher with all their probabilities, at one temperature."""

    probabilities: Tensor
    """[n, V] float64, descending within a row"""
    ids: Tensor
    """[n, V] int64: which token each of them is of"""

    @property
    def usual_student(self) -> Tensor:
        """`[n, V]` float64: how often each token comes, in the order of each row's ids."""
        mean = torch.zeros(self.ids.shape[1], dtype=torch.float64)
        mean.index_add_(0, self.ids.flatten(), self.probabilities.flatten())
        return (mean / len(self.ids))[self.ids]

    @property
    def entropies(self) -> Tensor:
        """`[n]` float64 entropy of each row in nats."""
        nats: Tensor = torch.special.entr(self.probabilities).sum(dim=1)
        return nats

    @property
    def entropy(self) -> float:
        """Mean entropy of a row in nats."""
        return float(self.entropies.mean())

    @property
    def certain(self) -> float:
        """Share of rows whose most probable token has more than `CERTAIN`."""
        return float((self.probabilities[:, 0] > CERTAIN).double().mean())

    def tempered(self, temperature: float) -> Pilot:
        """The same rows at another temperature."""
        softened = self.probabilities.clamp(min=1e-300).log().div(temperature).softmax(dim=1)
        return Pilot(softened, self.ids)


def error_of_first(pilot: Pilot, kept: Tensor) -> float:
    """Relative error of the gradient where each row keeps its `kept [n]` most probable tokens."""
    p, q = pilot.probabilities, pilot.usual_student
    beyond = torch.arange(p.shape[1]) >= kept.unsqueeze(1)
    tail_p, tail_q = p * beyond, q * beyond
    mass, total = tail_p.sum(dim=1, keepdim=True), tail_q.sum(dim=1, keepdim=True)
    spread = torch.where(total > 0, mass * tail_q / total.clamp(min=1e-300), tail_q)
    return float((tail_p - spread).norm() / (q - p).norm())


def lengths_kept(pilot: Pilot, config: TargetConfig) -> Tensor:
    """`[n]` int64: tokens that each row keeps under these settings."""
    most = pilot.probabilities[:, : config.top_k].numpy()
    return torch.from_numpy(config.lengths(most, pilot.entropies.numpy()))


def error_of_draws(pilot: Pilot, draws: int) -> float:
    """The same of so many draws for each row: what they differ by, which has a mean of zero."""
    p, q = pilot.probabilities, pilot.usual_student
    return float(((p * (1 - p)).sum() / draws).sqrt() / (q - p).norm())


def error_of_drawn_tails(pilot: Pilot, kept: Tensor, most: int) -> tuple[float, float]:
    """(draws per row, error) of kept tokens with draws from their tails, as `kd.cache_builder.teacher.tail_draws` makes them.

    An id whose expected number of draws is x is drawn floor(x) or floor(x) + 1 times: with f the part of x beyond the whole
    number, the variance is f (1 - f). The mean of what the gradient differs by is zero.
    """
    p, q = pilot.probabilities, pilot.usual_student
    tail = p * (torch.arange(p.shape[1]) >= kept.unsqueeze(1))
    mass = tail.sum(dim=1, keepdim=True)
    draws = (most * mass).ceil().clamp(min=1) * (mass > 0)
    share = torch.where(mass > 0, mass / draws.clamp(min=1), 1.0)
    part = (tail / share).frac()
    variance = (part * (1 - part) * share.square()).sum()
    return float(draws.mean()), float(variance.sqrt() / (q - p).norm())


def smallest_k(pilot: Pilot, error: float) -> int:
    """The smallest power of two, or the whole vocabulary, whose gradient is at most so far off."""
    size = pilot.ids.shape[1]
    for k in sizes_up_to(size):
        if error_of_first(pilot, torch.full((len(pilot.ids),), k)) <= error:
            return k
    return size


def sizes_up_to(vocabulary_size: int) -> list[int]:
    """4, 8, 16, … and the vocabulary's size."""
    return [*(2**i for i in range(2, math.ceil(math.log2(max(vocabulary_size, 5))))), vocabulary_size]


def largest_probability(
    pilot: Pilot, error: float, choices: Sequence[float], most: int
) -> tuple[float, float, float] | None:
    """(least probability, tokens kept per row, error) of the rule that keeps fewest tokens and is at most so far off.

    choices   least probabilities, descending
    most      tokens that a row keeps at most
    """
    for least in choices:
        kept = (pilot.probabilities >= least).sum(dim=1).clamp(min=1, max=most)
        measured = error_of_first(pilot, kept)
        if measured <= error:
            return least, float(kept.double().mean()), measured
    return None
