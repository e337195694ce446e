"""The objective is its parts, weighted; names that no registry holds are refused with the nearest."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kd.common.errors import DataError
from kd.student_trainer.losses.by_row import cross_entropy
from kd.student_trainer.losses.loss_registry import LOSSES, TAILS, Objective
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.losses.loss_targets import LossTargets

N, V, K = 7, 40, 6
CASES = [
    (name, tail, temperature)
    for name, loss in LOSSES.items()
    for tail in loss.variants
    for temperature in ((1.0,) if tail == "sampled" else (1.0, 2.0, 4.0))  # draws are made at temperature 1
    if not loss.any_tokenizer and name != "ce"
]


def random_logits(seed: int, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets_of(teacher: Tensor, *, k: int = K, temperature: float = 1.0) -> LossTargets:
    """What a cache without rounding holds: top-k of the softmax, the tail's mass, and the k ids as draws."""
    log_p, ids = (teacher / temperature).log_softmax(dim=1).sort(dim=1, descending=True)
    tail, gold = log_p[:, k:].exp().sum(dim=1), torch.arange(N)
    return LossTargets(gold, ids[:, :k], log_p[:, :k], tail, ids[:, :k], torch.ones_like(ids[:, :k]))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("loss", "tail", "temperature"), CASES)
def test_the_objective_is_alpha_t_squared_kd_plus_the_rest_ce(
    loss: str, tail: str, temperature: float, alpha: float
) -> None:
    logits, targets = random_logits(1), targets_of(random_logits(2), temperature=temperature)
    total, kd, ce = Objective(loss, tail, alpha, temperature)(logits, targets)
    assert torch.equal(kd, LOSSES[loss].variants[tail](logits, targets, temperature=temperature))
    assert torch.equal(ce, cross_entropy(logits, targets))
    expected = alpha * temperature**2 * kd + (1 - alpha) * ce
    assert torch.allclose(total, expected, rtol=0, atol=1e-12)  # float64: a few nats


def test_the_weight_of_the_cross_entropy_may_be_given() -> None:
    logits, targets = random_logits(1), targets_of(random_logits(2))
    total, kd, ce = Objective(alpha=2.0, ce_weight=0.5)(logits, targets)
    assert torch.allclose(total, 2 * kd + 0.5 * ce, rtol=0, atol=1e-12)


def test_the_objective_of_plain_fine_tuning_is_the_cross_entropy() -> None:
    logits, targets = random_logits(1), LossTargets(torch.arange(N))
    total, kd, ce = Objective("ce", "none", 0.0)(logits, targets)
    assert torch.equal(total, cross_entropy(logits, targets))
    assert torch.equal(ce, total)
    assert not kd.any()


def test_t_squared_keeps_the_size_of_gradients_as_temperature_grows() -> None:
    teacher, student = random_logits(2, 0.5), random_logits(1, 0.5)
    sizes = []
    for temperature in (50.0, 100.0):
        logits = student.clone()
        targets = targets_of(teacher, k=V, temperature=temperature)
        Objective("kl", "ghost", 1.0, temperature).autograd_gradient_(logits, targets)
        sizes.append(float(logits.norm()))
    # Hinton et al. 2015, eq. 4: towards (z - v) / V as T grows; what is left is of order |z| / T = 1 %
    assert math.isclose(sizes[0], sizes[1], rel_tol=0.01)


def test_the_options_of_a_row_loss_reach_it() -> None:
    logits, targets = random_logits(1), targets_of(random_logits(2))
    for name, loss in LOSSES.items():
        for option in loss.options:
            settings = replace(GroupSettings(), **{option: 0.2})  # type: ignore[arg-type]
            _, kd, _ = Objective(name, settings=settings)(logits, targets)
            assert torch.equal(kd, loss.variants["ghost"](logits, targets, **{option: 0.2}))
            assert not torch.equal(kd, loss.variants["ghost"](logits, targets))


def test_kernels_are_told_the_weights_and_the_temperature_of_the_objective() -> None:
    for name, loss in LOSSES.items():
        tail = next(iter(loss.variants))
        weights = Objective(name, tail, 0.25, 2.0).weights
        assert weights.kd == 0.25 * (4 if loss.squared else 1)
        assert (weights.ce, weights.temperature, weights.settings.temperature) == (0.75, 2.0, 2.0)


@pytest.mark.parametrize("name", ["kll", "ULD", ""])
def test_an_unknown_loss_lists_the_known_ones(name: str) -> None:
    with pytest.raises(DataError) as caught:
        Objective(name)
    assert caught.value.details["known"] == ", ".join(sorted(LOSSES))


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match="unknown loss 'kll'") as loss:
        Objective("kll")
    assert loss.value.details["did you mean"] == "kl"
    with pytest.raises(DataError, match="unknown tail mode of kl 'gost'") as tail:
        Objective("kl", "gost")
    assert tail.value.details["did you mean"] == "ghost"
    assert tail.value.details["known"] == ", ".join(sorted(TAILS))


@pytest.mark.parametrize(("alpha", "temperature"), [(-0.1, 1.0), (1.1, 1.0), (float("nan"), 1.0), (1.0, 0.0)])
def test_weights_outside_the_unit_interval_and_temperatures_of_zero_are_refused(
    alpha: float, temperature: float
) -> None:
    with pytest.raises(ValueError, match="alpha"):
        Objective("kl", "ghost", alpha, temperature)
