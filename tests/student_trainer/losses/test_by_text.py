"""`text-kl` against sums over sets written out, in float64: 1e-12 is a thousand roundings of a few nats."""

from __future__ import annotations

import math

import pytest
import torch
from outcome_targets import outcome_targets
from torch import Tensor

from kd.student_trainer.losses.by_row import kl_ghost
from kd.student_trainer.losses.by_text import text_kl
from kd.student_trainer.losses.loss_targets import LossTargets, need

N, V = 9, 31


def logits_of(seed: int) -> Tensor:
    return 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sets_of(targets: LossTargets) -> list[list[tuple[list[int], float]]]:
    """Of every row the ids of each outcome and the teacher's probability of it, the rest last."""
    rows, entry = [], 0
    places = need(targets.places).tolist()
    for count, rest in zip(need(targets.kept).tolist(), need(targets.tail_mass).tolist(), strict=True):
        row, named = [], set()
        for j in range(entry, entry + count):
            start, stop = int(need(targets.range_starts)[j]), int(need(targets.range_stops)[j])
            ids = [v for v in range(V) if start <= places[v] < stop]
            row.append((ids, math.exp(float(need(targets.logprobs)[j]))))
            named |= {*ids}
        rows.append([*row, ([v for v in range(V) if v not in named], rest)])
        entry += count
    return rows


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_it_is_the_divergence_of_the_masses_of_the_sets(temperature: float) -> None:
    logits, targets = logits_of(0), outcome_targets(torch.zeros(N, dtype=torch.int64), V)
    q = torch.softmax(logits / temperature, dim=1).tolist()
    expected = [
        sum(p * (math.log(p) - math.log(sum(q[row][v] for v in ids))) for ids, p in outcomes if p > 0)
        for row, outcomes in enumerate(sets_of(targets))
    ]
    value = text_kl(logits, targets, temperature=temperature)
    assert torch.allclose(value, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_student_with_the_teacher_s_masses_is_at_zero_however_it_spreads_them() -> None:
    targets = outcome_targets(torch.zeros(N, dtype=torch.int64), V)
    logits = logits_of(1)
    for row, outcomes in enumerate(sets_of(targets)):
        for ids, p in outcomes:
            if ids:
                logits[row, ids] += math.log(max(p, 1e-300)) - float(logits[row, ids].logsumexp(0))
    assert text_kl(logits, targets).abs().max() < 1e-12


def test_gradients_are_those_of_the_values() -> None:
    targets = outcome_targets(torch.zeros(N, dtype=torch.int64), V)
    assert torch.autograd.gradcheck(lambda z: text_kl(z, targets, temperature=1.5), logits_of(2).requires_grad_())


@pytest.mark.parametrize("k", [5, V])
def test_sets_of_one_token_each_give_kl(k: int) -> None:
    log_p, ids = logits_of(3).log_softmax(dim=1).topk(k, dim=1)
    gold, places = torch.zeros(N, dtype=torch.int64), torch.randperm(V, generator=torch.Generator().manual_seed(1))
    rest = (1 - log_p.exp().sum(dim=1)).clamp(min=0) if k < V else torch.zeros(N, dtype=torch.float64)
    starts = places[ids].flatten()
    targets = LossTargets(
        gold,
        logprobs=log_p.flatten(),
        tail_mass=rest,
        kept=torch.full((N,), k),
        range_starts=starts,
        range_stops=starts + 1,
        places=places,
    )
    expected = kl_ghost(logits_of(4), LossTargets(gold, ids, log_p, rest))
    assert torch.allclose(text_kl(logits_of(4), targets), expected, rtol=0, atol=1e-12)


def test_a_range_of_rows_has_its_own_outcomes() -> None:
    logits, targets = logits_of(5), outcome_targets(torch.arange(N), V)
    whole = text_kl(logits, targets)
    for rows in (slice(0, 4), slice(4, 9), slice(3, 3)):
        assert torch.allclose(text_kl(logits[rows], targets[rows]), whole[rows], rtol=0, atol=1e-12)
