"""The estimate of what a truncated teacher costs: exact for the kind of teacher it assumes, silent where nothing is lost."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_targets import LossTargets, need
from kd.student_trainer.losses.tail_advice import AdvisedLoss, gradient_errors, likely_teacher, tail_advice

N, V, K = 24, 300, 16


def student_logits(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def zipf_targets(power: float = 1.2, k: int = K) -> LossTargets:
    """The top `k` of teachers whose probabilities fall off as a power of the rank, each in an order of its own."""
    generator = torch.Generator().manual_seed(2)
    order = torch.stack([torch.randperm(V, generator=generator) for _ in range(N)])
    by_rank = (-power * torch.arange(1, V + 1, dtype=torch.float64).log()).log_softmax(0).expand(N, V)
    return LossTargets(order[:, 0], order[:, :k], by_rank[:, :k], by_rank[:, k:].exp().sum(1))


def test_the_likely_teacher_keeps_what_is_known_and_is_a_distribution():
    targets = zipf_targets()
    likely = likely_teacher(targets, V)
    assert torch.equal(likely.ids.sort(dim=1).values, torch.arange(V).expand(N, V))
    assert torch.equal(likely.ids[:, :K], need(targets.token_ids))
    assert torch.equal(likely.logprobs[:, :K], need(targets.logprobs))
    torch.testing.assert_close(likely.logprobs.exp().sum(1), torch.ones(N, dtype=torch.float64))
    assert bool((likely.logprobs.diff(dim=1) <= 1e-9).all())


def test_a_tail_that_falls_off_as_a_power_of_the_rank_is_found_again():
    likely, dense = likely_teacher(zipf_targets(), V), zipf_targets(k=V)
    torch.testing.assert_close(likely.logprobs, need(dense.logprobs), rtol=0, atol=1e-6)  # 40 halvings of a power of 50


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "jsd"])
def test_the_error_falls_with_k_to_nothing_at_the_whole_vocabulary(loss):
    likely = likely_teacher(zipf_targets(), V)
    errors = gradient_errors(Objective(loss, temperature=2.0), student_logits(), likely, [4, 16, 64, 200, V])
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-12


def test_the_advice_names_a_k_that_is_enough_and_none_where_the_cache_is():
    objective, logits, targets = Objective("reverse-kl"), student_logits(), zipf_targets()
    sentence = tail_advice(objective, logits, targets)
    assert sentence is not None
    enough = int(re.search(r"k = ([\d,]+)", sentence)[1].replace(",", ""))
    likely = likely_teacher(targets, V)
    assert K < enough <= V
    assert gradient_errors(objective, logits, likely, [enough])[0] <= 0.1
    assert f"about {gradient_errors(objective, logits, likely, [K])[0]:.2f} of its length" in sentence
    assert tail_advice(Objective("kl"), logits, targets) is None
    assert tail_advice(objective, logits, zipf_targets(k=V)) is None
    sure = replace(targets, logprobs=(logits.log_softmax(1)).gather(1, logits.topk(K).indices))
    assert tail_advice(objective, 60 * logits, replace(sure, token_ids=logits.topk(K).indices)) is None


def test_rows_that_differ_in_length_are_judged_by_the_most_frequent_one():
    targets = zipf_targets()
    kept = torch.full((N,), 4)
    kept[:6] = K
    entries = [(need(targets.token_ids)[i, :k], need(targets.logprobs)[i, :k]) for i, k in enumerate(kept.tolist())]
    rest = 1 - torch.stack([p.exp().sum() for _, p in entries])
    ragged = LossTargets(
        targets.gold_ids, torch.cat([i for i, _ in entries]), torch.cat([p for _, p in entries]), rest, kept=kept
    )
    sentence = tail_advice(Objective("jsd"), student_logits(), ragged)
    assert sentence is not None
    assert "from the top 4 of 300 tokens" in sentence


def test_it_is_said_once_and_the_gradient_is_the_objective_s_own():
    said: list[str] = []
    objective, targets = Objective("reverse-kl", alpha=0.5), zipf_targets()
    loss = AdvisedLoss(objective, said.append)
    expected = student_logits()
    sums = objective.gradient_(expected, targets)
    for _ in range(2):
        logits = student_logits()
        assert torch.equal(loss.gradient_(logits, targets), sums)
        assert torch.equal(logits, expected)
    assert len(said) == 1
