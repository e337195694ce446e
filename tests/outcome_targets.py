"""Targets of `text-kl` with made-up outcomes, for tests of all losses."""

from __future__ import annotations

import torch
from torch import Tensor

from kd.student_trainer.losses.loss_targets import LossTargets


def outcome_targets(
    gold_ids: Tensor, width: int, *, dtype: torch.dtype = torch.float64, seed: int = 3, most: int = 4
) -> LossTargets:
    """1 to `most` ranges of random bounds for each row, with random probabilities; every third row leaves no rest."""
    generator = torch.Generator().manual_seed(seed)
    starts, stops, masses, kept, tails = [], [], [], [], []
    for row in range(len(gold_ids)):
        count = int(torch.randint(1, most + 1, (), generator=generator))
        bounds = torch.randperm(width + 1, generator=generator)[: 2 * count].sort().values
        share = torch.rand(count + 1, generator=generator, dtype=torch.float64) + 0.05
        share[-1] *= row % 3 > 0
        share /= share.sum()
        starts.append(bounds[0::2])
        stops.append(bounds[1::2])
        masses.append(share[:-1].log())
        tails.append(share[-1])
        kept.append(count)
    return LossTargets(
        gold_ids,
        logprobs=torch.cat(masses).to(dtype),
        tail_mass=torch.stack(tails).to(dtype),
        kept=torch.tensor(kept),
        range_starts=torch.cat(starts).int(),
        range_stops=torch.cat(stops).int(),
        places=torch.randperm(width, generator=generator).int(),
    )
