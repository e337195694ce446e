"""How far off a loss over a teacher's top-k is for the student at hand, and the k that would be enough.

`reverse-kl` and `jsd` weigh what the student believes, so the tokens beyond the teacher's top-k count as much as the student's
probability there. The cache does not say which of them has which probability. But it says how much they have together, and how
the kept ones fall off. `likely_teacher` continues their fall as a power of the rank (Zipf) to that mass, and gives the ranks to the
other tokens in a random order. On that teacher the loss over the first k ranks can be compared with the dense one.

Against the real distribution (`benchmarks/tails.py`, docs/log/2026-11.md) the estimate is within a tenth for kl and jsd; for
reverse-kl it is a quarter too high for a trained student and an eighth too low for an untrained one.

Shapes: n positions, V vocabulary, K kept tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_targets import LossTargets, need

ADVISED = ("reverse-kl", "jsd")
"""Losses that need more of the teacher than kl does."""
ENOUGH = 0.1
"""Largest relative error of the gradient about which nothing is said."""
VALUES = 1 << 21
"""Most values of a `[n, V]` tensor that an estimate is made on."""
STEEPEST = 50.0
"""Largest power with which probabilities fall off by rank."""
PAGE = "docs/training.md#how-much-of-the-teacher-a-loss-needs"


class AdvisedLoss:
    """An objective that is said to be far off the dense one, where it is, when it meets its first logits."""

    def __init__(self, objective: Objective, say: Callable[[str], object]) -> None:
        self.objective = objective
        self.say: Callable[[str], object] | None = say

    def gradient_(self, logits: Tensor, targets: LossTargets) -> Tensor:
        """As `Objective.gradient_`."""
        if self.say is not None:
            if (sentence := tail_advice(self.objective, logits, targets)) is not None:
                self.say(sentence)
            self.say = None
        return self.objective.gradient_(logits, targets)


def tail_advice(objective: Objective, logits: Tensor, targets: LossTargets) -> str | None:
    """A sentence where the loss is far off the dense one, with the k that would be enough; None where it is not.

    logits   [n, V]  the student's, at positions of `targets`; they are not changed
    """
    if objective.loss not in ADVISED or targets.token_ids is None:
        return None
    if targets.kept is not None:
        rows, targets = max(targets.by_length(), key=lambda part: len(part[0]))
        logits = logits[rows]
    count = min(len(logits), max(1, VALUES // logits.shape[1]))
    some, part = logits[:count].detach().double(), targets[:count]
    kept, size = need(part.token_ids).shape[1], some.shape[1]
    if kept >= size:
        return None
    likely = likely_teacher(part, size)
    (error,) = gradient_errors(objective, some, likely, [kept])
    if error <= ENOUGH:
        return None
    (beside,) = gradient_errors(replace(objective, loss="kl"), some, likely, [kept])
    outside = 1.0 - float((some / objective.temperature).softmax(1).gather(1, likely.ids[:, :kept]).sum(1).mean())
    enough = size_for(objective, some, likely, ENOUGH)
    return (
        f"{objective.loss} from the top {kept:,} of {size:,} tokens: the gradient is off the dense one by about {error:.2f} of its "
        f"length, because this student puts {outside:.2f} of its probability on other tokens. For {ENOUGH:g} the cache needs about "
        f"k = {enough:,}. kl from this cache is off by about {beside:.2f} ({PAGE})"
    )


@dataclass(frozen=True)
class RankedTeacher:
    """A teacher's whole distribution by rank."""

    ids: Tensor
    """[n, V] int64, descending by probability"""
    logprobs: Tensor
    """[n, V] nats"""

    def first(self, k: int) -> LossTargets:
        """What a cache of the top `k` would say."""
        logprobs = self.logprobs[:, :k]
        rest = self.logprobs[:, k:].exp().sum(1)
        return LossTargets(self.ids[:, 0], self.ids[:, :k], logprobs, rest)


def likely_teacher(targets: LossTargets, size: int) -> RankedTeacher:
    """The kept tokens as they are, and behind them all others in a random order, falling off as a power of their rank.

    size   V
    """
    ids, kept = need(targets.token_ids), need(targets.logprobs).double()
    rest = need(targets.tail_mass).double().clamp(min=1e-12)
    count, k = ids.shape
    draws = torch.rand(count, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    others = draws.to(ids.device).scatter(1, ids, 2.0).argsort(dim=1)[:, : size - k]
    ranks = torch.arange(k + 1, size + 1, dtype=torch.float64, device=ids.device).log() - math.log(k)
    low, high = torch.zeros_like(rest), torch.full_like(rest, STEEPEST)
    for _ in range(40):  # the power at which the tail, begun at the last kept probability, has the mass that it has
        power = (low + high) / 2
        heavy = (kept[:, -1:] - power.unsqueeze(1) * ranks).exp().sum(dim=1) > rest
        low, high = torch.where(heavy, power, low), torch.where(heavy, high, power)
    tail = -high.unsqueeze(1) * ranks
    tail = tail - tail.logsumexp(dim=1, keepdim=True) + rest.log().unsqueeze(1)
    return RankedTeacher(torch.cat([ids, others], dim=1), torch.cat([kept, tail], dim=1))


def gradient_errors(objective: Objective, logits: Tensor, teacher: RankedTeacher, sizes: Sequence[int]) -> list[float]:
    """|gradient from the top k - dense gradient| / |dense gradient| over all positions, for each k.

    The distillation loss alone is compared. logits   [n, V] float64; they are not changed
    """
    alone = replace(objective, alpha=1.0, ce_weight=0.0)

    def gradient(k: int) -> Tensor:
        changed = logits.clone()
        alone.gradient_(changed, teacher.first(k))
        return changed

    dense = gradient(logits.shape[1])
    return [float((gradient(k) - dense).norm() / dense.norm()) for k in sizes]


def size_for(objective: Objective, logits: Tensor, teacher: RankedTeacher, error: float) -> int:
    """The smallest k, to two digits, whose gradient is at most so far off the dense one."""
    low, high = 0, logits.shape[1]
    while high - low > max(1, high // 50):
        middle = (low + high) // 2
        if gradient_errors(objective, logits, teacher, [max(middle, 1)])[0] > error:
            low = middle
        else:
            high = middle
    return high
