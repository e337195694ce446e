"""Losses over rows that differ in length: their kernel against autograd on the definition, in float64, and its laws."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kd.student_trainer.head import chunked_head_loss
from kd.student_trainer.losses.loss_registry import LOSSES, Objective
from kd.student_trainer.losses.loss_targets import LossTargets, need

N, V = 31, 40
CASES = [
    (name, tail, temperature, alpha)
    for name, tail in (("kl", "ghost"), ("kl", "renorm"), ("reverse-kl", "ghost"), ("jsd", "ghost"))
    for temperature in (1.0, 2.0)
    for alpha in (1.0, 0.6)
] + [("kl", "sampled", 1.0, alpha) for alpha in (1.0, 0.6)]
LOSS_CASE = pytest.mark.parametrize(("loss", "tail", "temperature", "alpha"), CASES)
EXACT: dict[str, Any] = {"rtol": 0, "atol": 1e-12}
"""float64: sums of forty terms of a few nats, in another order"""


def logits_of(seed: int) -> Tensor:
    return 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets_of(temperature: float, kept: Tensor | None = None) -> LossTargets:
    """Rows of one to V tokens of a random teacher; the first row keeps one, the second all."""
    if kept is None:
        kept = torch.randint(1, V + 1, (N,), generator=torch.Generator().manual_seed(3))
        kept[0], kept[1] = 1, V
    log_p, ids = (logits_of(2) / temperature).log_softmax(1).sort(1, descending=True)
    inside = torch.arange(V) < kept[:, None]
    tail = torch.where(inside, 0.0, log_p.exp()).sum(1)
    gold = torch.arange(N) % V
    # some are drawn twice, and a row that keeps all draws nothing
    places = torch.minimum(kept.unsqueeze(1) + torch.tensor([0, 2, 2, 5]), torch.tensor(V - 1))
    draws = torch.where(kept < V, 1 + torch.arange(N) % 4, 0)
    return LossTargets(
        gold, ids[inside], log_p[inside], tail, kept=kept, tail_ids=ids.gather(1, places), tail_draws=draws
    )


def gradient(objective: Objective, targets: LossTargets) -> tuple[Tensor, Tensor]:
    logits = logits_of(1)
    return objective.gradient_(logits, targets), logits


@LOSS_CASE
def test_the_kernel_is_the_definition_with_its_gradient(loss: str, tail: str, temperature: float, alpha: float):
    objective, targets = Objective(loss, tail, alpha, temperature), targets_of(temperature)
    sums, found = gradient(objective, targets)
    expected = logits_of(1)
    torch.testing.assert_close(sums, objective.autograd_gradient_(expected, targets), **EXACT)
    torch.testing.assert_close(found, expected, **EXACT)


@LOSS_CASE
def test_the_definition_is_each_row_alone(loss: str, tail: str, temperature: float, alpha: float):
    """The slow twin: one row at a time, as a row of a cache with that k."""
    targets, logits = targets_of(temperature), logits_of(1)
    _, found, _ = Objective(loss, tail, alpha, temperature)(logits, targets)
    starts = targets.offsets
    for row in range(N):
        entries = slice(starts[row], starts[row + 1])
        alone = LossTargets(
            targets.gold_ids[row : row + 1],
            need(targets.token_ids)[entries][None],
            need(targets.logprobs)[entries][None],
            need(targets.tail_mass)[row : row + 1],
            tail_ids=need(targets.tail_ids)[row : row + 1],
            tail_draws=need(targets.tail_draws)[row : row + 1],
        )
        expected = LOSSES[loss].variants[tail](logits[row : row + 1], alone, temperature=temperature)
        torch.testing.assert_close(found[row : row + 1], expected, **EXACT)


@LOSS_CASE
def test_rows_of_one_length_are_a_fixed_top_k(loss: str, tail: str, temperature: float, alpha: float):
    objective, flat = Objective(loss, tail, alpha, temperature), targets_of(temperature, torch.full((N,), 6))
    ids, logprobs = (need(field).reshape(N, 6) for field in (flat.token_ids, flat.logprobs))
    even = replace(flat, token_ids=ids, logprobs=logprobs, kept=None)
    for found, expected in zip(gradient(objective, flat), gradient(objective, even), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)


def test_a_student_like_the_teacher_has_no_loss_and_no_gradient():
    for name, tail in (("kl", "ghost"), ("jsd", "ghost")):
        logits = logits_of(2)
        sums = Objective(name, tail).gradient_(logits, targets_of(1.0))
        assert abs(float(sums[1])) < 1e-5  # a tail without mass counts as TAIL_FLOOR in jsd
        assert float(logits.abs().max()) < 1e-6


@LOSS_CASE
def test_ranges_of_rows_add_up(loss: str, tail: str, temperature: float, alpha: float):
    objective, targets = Objective(loss, tail, alpha, temperature), targets_of(temperature)
    whole, gradients = gradient(objective, targets)
    logits = logits_of(1)
    parts = [objective.gradient_(logits[rows], targets[rows]) for rows in (slice(0, 9), slice(9, 10), slice(10, N))]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, **EXACT)
    torch.testing.assert_close(logits, gradients, **EXACT)
    assert np.array_equal(targets[9:20].offsets, np.pad(need(targets[9:20].kept).numpy().cumsum(), (1, 0)))


def test_chunks_of_the_output_layer_change_nothing():
    targets, objective = targets_of(1.0), Objective("kl", "ghost", 0.7)
    hidden, weight = torch.randn(N, 8, dtype=torch.float64), torch.randn(V, 8, dtype=torch.float64)
    found = []
    for chunk in (4, N):
        leaf = hidden.clone().requires_grad_()
        total, *_ = chunked_head_loss(leaf, weight, None, objective, targets, vocabulary_size=V, chunk=chunk)
        total.backward()
        found.append((total.detach(), leaf.grad))
    torch.testing.assert_close(found[0], found[1], **EXACT)
