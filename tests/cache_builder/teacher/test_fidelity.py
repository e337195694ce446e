"""What a pilot says of a cache's k, against gradients by autograd in float64."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from terminal import run_kd

from kd.cache_builder.teacher.fidelity import (
    Pilot,
    error_of_drawn_tails,
    error_of_draws,
    error_of_first,
    largest_probability,
    sizes_up_to,
    smallest_k,
)
from kd.cache_builder.teacher.tail_draws import draw_tail
from kd.student_trainer.losses.by_row import kl_ghost
from kd.student_trainer.losses.loss_targets import LossTargets

N, V = 12, 60


@pytest.fixture(scope="module")
def pilot() -> Pilot:
    logits = 2 * torch.randn(N, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Pilot(*logits.softmax(dim=1).sort(dim=1, descending=True))


@pytest.mark.parametrize("k", [1, 4, 16, 59])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_error_is_that_of_the_loss_that_trains(pilot: Pilot, k: int, temperature: float) -> None:
    tempered = pilot.tempered(temperature)
    student = torch.zeros(N, V, dtype=torch.float64).scatter(1, tempered.ids, tempered.usual_student.log())
    leaf = student.requires_grad_()
    p = tempered.probabilities
    targets = LossTargets(tempered.ids[:, 0], tempered.ids[:, :k], p[:, :k].log(), p[:, k:].sum(1))
    (kept,) = torch.autograd.grad(kl_ghost(leaf, targets).sum(), leaf)
    dense = student.detach().softmax(1) - torch.zeros_like(student).scatter(1, tempered.ids, p)
    expected = float((kept - dense).norm() / dense.norm())
    assert error_of_first(tempered, torch.full((N,), k)) == pytest.approx(expected, rel=1e-9)


def test_the_whole_vocabulary_has_no_error_and_errors_fall_with_k(pilot: Pilot) -> None:
    errors = [error_of_first(pilot, torch.full((N,), k)) for k in sizes_up_to(V)]
    assert sizes_up_to(V) == [4, 8, 16, 32, 60]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0.0


def test_the_proposals_are_good_enough_and_no_larger_than_they_need_to_be(pilot: Pilot) -> None:
    wanted = 0.05
    k = smallest_k(pilot, wanted)
    assert error_of_first(pilot, torch.full((N,), k)) <= wanted < error_of_first(pilot, torch.full((N,), k // 2))
    least, tokens, error = largest_probability(pilot, wanted, (0.2, 0.05, 0.01, 0.001), V) or pytest.fail("none found")
    assert error <= wanted
    assert tokens == float((pilot.probabilities >= least).double().sum(1).mean())
    assert largest_probability(pilot, 1e-9, (0.2, 0.05), V) is None


def test_the_error_of_draws_is_their_spread(pilot: Pilot) -> None:
    """Of one draw exactly: Σ_v p_v |onehot(v) - p|² = 1 - Σ p² for each row."""
    p, q = pilot.probabilities, pilot.usual_student
    eye = torch.eye(V, dtype=torch.float64)
    spread = sum(float((p[n] * (eye - p[n]).square().sum(1)).sum()) for n in range(N))
    assert error_of_draws(pilot, 1) == pytest.approx((spread / float((q - p).square().sum())) ** 0.5, rel=1e-12)
    assert error_of_draws(pilot, 100) == pytest.approx(error_of_draws(pilot, 1) / 10, rel=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_the_error_of_drawn_tails_is_their_spread(pilot: Pilot, adaptive: bool) -> None:
    """Over evenly spaced random numbers, of the draws that a build makes."""
    m, most = 400, 30
    kept = (pilot.probabilities >= 0.03).sum(1).clamp(min=1) if adaptive else torch.full((N,), 4)
    p, q = pilot.probabilities, pilot.usual_student
    uniforms = ((torch.arange(m) + 0.5) / m).unsqueeze(1)
    draws, spread = 0.0, 0.0
    for n in range(N):
        z = p[n].log().float().expand(m, V)
        shifted, log_z = z - z[:, :1], -z[:, 0]
        ids, powers = torch.arange(V).expand(m, V), torch.zeros(m, 512)
        drawn, counts = draw_tail(shifted, log_z, ids, kept[n].expand(m), most, uniforms, powers)
        draws += float(counts[0]) / N
        tail = p[n] * (torch.arange(V) >= kept[n])
        used = torch.arange(most) < counts.unsqueeze(1)
        found = torch.zeros(m, V, dtype=torch.float64).scatter_add_(
            1, drawn.long(), tail.sum() / counts.unsqueeze(1) * used
        )
        spread += float((found - tail).square().sum(1).mean())
    measured = error_of_drawn_tails(pilot, kept, most)
    assert measured[0] == pytest.approx(draws)
    assert measured[1] == pytest.approx(
        (spread / float((q - p).square().sum())) ** 0.5, rel=0.02
    )  # 1 in 400 of each step


def test_the_plan_proposes_and_writes_nothing(tmp_path: Path) -> None:
    words = ("cache", "plan", "--teacher", "demo", "--data", "demo", "--limit", "3", "--seq-len", "64")
    out = ("--out", str(tmp_path / "cache"))
    found = json.loads(run_kd(*words, *out, "--fidelity", "0.05", "--fidelity-rows", "150", "--json").stdout)[
        "fidelity"
    ]
    assert found["rows"] == 150
    assert found["errors_by_top_k"][str(found["top_k"])] <= 0.05
    assert 1.0 < found["entropy_nats"] < 4.0
    drawn = found["tail_samples"]
    assert drawn["tokens"] + drawn["draws"] < found["top_k"]
    assert found["adaptive"]["error"] < drawn["error_without_bias"] < found["error_of_50_draws_without_bias"]
    assert found["gain_to_expect"].startswith("something")
    assert found["bytes_by_top_k"]["4"] < found["bytes_by_top_k"]["64"]
    shown = run_kd(*words, *out, "--fidelity", "0.05", "--fidelity-rows", "150").stdout
    assert f"--profile kl --top-k {found['top_k']}:" in shown
    assert list(tmp_path.iterdir()) == []
