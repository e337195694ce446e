"""Merging as arithmetic: laws of each method, and every method against plain numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.student_trainer.merging.merge_methods import (
    ELECTIONS,
    average,
    dare,
    fisher_average,
    fisher_weights,
    regmean,
    task_arithmetic,
    ties,
    trimmed,
)

ULP = 2**-52
"""Float64 sums of a handful of terms near 1 differ by a few of these when the order changes."""


def float32_values(seed: int, *shape: int) -> torch.Tensor:
    """What is read from files: float32 numbers, as float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


@pytest.fixture
def values() -> torch.Tensor:
    return float32_values(1, 5, 6, 4)


@pytest.fixture
def base() -> torch.Tensor:
    return float32_values(2, 6, 4)


def everything(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.float32)


@given(st.integers(1, 9), st.integers(0, 10_000))
@settings(max_examples=40)
def test_equal_models_average_to_themselves_exactly(count: int, seed: int) -> None:
    one = float32_values(seed, 7)
    assert torch.equal(average(one.expand(count, 7)), one)


def test_average_is_task_arithmetic_at_one_over_n(values: torch.Tensor, base: torch.Tensor) -> None:
    assert torch.allclose(average(values), task_arithmetic(values, base, scaling=1 / 5), rtol=0, atol=16 * ULP)


@pytest.mark.parametrize("elect", ELECTIONS)
def test_scaling_zero_is_the_base_exactly(values: torch.Tensor, base: torch.Tensor, elect: str) -> None:
    assert torch.equal(task_arithmetic(values, base, scaling=0.0), base)
    assert torch.equal(ties(values, base, thresholds=everything(5), majority=1, elect=elect, scaling=0.0), base)
    assert torch.equal(dare(values, base, density=0.5, scaling=0.0, seed=3), base)


@pytest.mark.parametrize("elect", ELECTIONS)
def test_ties_of_one_whole_task_vector_is_task_arithmetic_exactly(
    values: torch.Tensor, base: torch.Tensor, elect: str
) -> None:
    result = ties(values[:1], base, thresholds=everything(1), majority=-1, elect=elect, scaling=0.7)
    assert torch.equal(result, task_arithmetic(values[:1], base, scaling=0.7))


def test_models_that_agree_in_sign_lose_nothing_in_ties(base: torch.Tensor) -> None:
    values = base + float32_values(3, 4, 6, 4).abs()
    result = ties(values, base, thresholds=everything(4), majority=-1, scaling=0.5)
    assert torch.equal(result, task_arithmetic(values, base, scaling=0.5))


def test_ties_drops_what_disagrees_by_hand() -> None:
    values = torch.tensor([[3.0, 1.0, 0.1], [2.0, -2.0, -5.0], [-4.0, -1.0, 0.0]], dtype=torch.float64)
    thresholds = torch.tensor([0.5, 0.5, 0.5])
    zero = torch.zeros(3, dtype=torch.float64)
    # sums 1, -2, -5 (0.1 is trimmed): keep 3 + 2; -2 - 1; -5
    by_elect = {"sum": [5.0, -3.0, -5.0], "mean": [2.5, -1.5, -5.0], "max": [3.0, -2.0, -5.0]}
    for elect, expected in by_elect.items():
        result = ties(values, zero, thresholds=thresholds, majority=1, elect=elect, scaling=1.0)
        assert result.tolist() == expected, elect


def test_an_entry_whose_sum_is_zero_gets_the_majority_sign() -> None:
    values = torch.tensor([[2.0], [-2.0]], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    result = [float(ties(values, zero, thresholds=everything(2), majority=m, scaling=1.0)) for m in (1.0, -1.0)]
    assert result == [2.0, -2.0]


def test_equal_information_and_weights_give_the_average(values: torch.Tensor) -> None:
    information = torch.full_like(values, 0.3)
    weights = fisher_weights([2.0] * 5)
    assert torch.allclose(fisher_average(values, information, weights=weights), average(values), rtol=0, atol=16 * ULP)


def test_information_of_one_model_alone_gives_that_model(values: torch.Tensor) -> None:
    information = torch.zeros_like(values)
    information[2] = 1.0
    result = fisher_average(values, information, weights=fisher_weights([1.0] * 5), minimal=1e-12)
    # four others of weight 1e-12 pull by at most their distance times 4e-12
    assert torch.allclose(result, values[2], rtol=0, atol=1e-10)


def test_fisher_of_equal_models_is_the_model(base: torch.Tensor) -> None:
    information = float32_values(5, 3, 6, 4).abs()
    result = fisher_average(base.expand(3, 6, 4), information, weights=fisher_weights([1.0, 2.0, 3.0]))
    assert torch.allclose(result, base, rtol=4 * ULP, atol=0)


def test_fisher_weights_fall_with_the_norm_and_add_up() -> None:
    weights = fisher_weights([1.0, 2.0, 4.0], minimal=0.0)
    assert torch.allclose(weights * 3, torch.tensor([4 / 7, 2 / 7, 1 / 7], dtype=torch.float64))
    assert fisher_weights([1.0, 9.0], normalize=False).tolist() == [0.5, 0.5]


def grams_of(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x.T @ x / len(x) for x in inputs]


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    return [float32_values(10 + m, 40, 6) * (1 + m) for m in range(5)]


@pytest.mark.parametrize("ratio", [0.0, 0.6, 1.0])
def test_regmean_of_one_model_and_of_equal_models_is_the_model_exactly(
    values: torch.Tensor, inputs: list[torch.Tensor], ratio: float
) -> None:
    grams = grams_of(inputs)
    assert torch.equal(regmean(values[:1], grams[:1], off_diagonal=ratio), values[0])
    assert torch.equal(regmean(values[:1].expand(5, 6, 4), grams, off_diagonal=ratio), values[0])


def test_regmean_solves_the_least_squares_problem_it_claims(values: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    rows = np.concatenate([x.numpy() for x in inputs])  # as many rows of each model: one weight for all
    wanted = np.concatenate([(x @ w).numpy() for x, w in zip(inputs, values, strict=True)])
    solution = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    result = regmean(values, grams_of(inputs), off_diagonal=1.0).numpy()
    # normal equations square the condition number of the rows, here about 5
    np.testing.assert_allclose(result, solution, rtol=1e-11, atol=1e-12)


def test_regmean_follows_the_reference_formula(values: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    total, pulled = np.zeros((6, 6)), np.zeros((6, 4))
    for gram, weight in zip(grams_of(inputs), values, strict=True):
        shrunk = gram.numpy() * (0.6 + 0.4 * np.eye(6))
        total += shrunk
        pulled += shrunk @ weight.numpy()
    result = regmean(values, grams_of(inputs), off_diagonal=0.6).numpy()
    np.testing.assert_allclose(result, np.linalg.inv(total) @ pulled, rtol=1e-11, atol=1e-12)


def test_regmean_leaves_the_mean_where_no_model_saw_an_input(values: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    for x in inputs:
        x[:, 3] = 0.0
    result = regmean(values, grams_of(inputs), off_diagonal=1.0)
    assert torch.allclose(result[3], values.mean(dim=0)[3], rtol=0, atol=1e-12)
    assert bool(torch.isfinite(result).all())


def test_dare_is_task_arithmetic_on_average_and_at_density_one(values: torch.Tensor, base: torch.Tensor) -> None:
    whole = task_arithmetic(values, base, scaling=0.5)
    assert torch.equal(dare(values, base, density=1.0, scaling=0.5, seed=0), whole)
    draws = torch.stack([dare(values, base, density=0.5, scaling=0.5, seed=s) for s in range(400)])
    assert not torch.equal(draws[0], draws[1])
    # a drawn entry is 0 or twice itself: standard deviation |v| each, 0.5 sqrt(sum v^2) together, over the root of 400
    error = 0.5 * (values - base).square().sum(dim=0).sqrt() / 20
    assert bool(((draws.mean(dim=0) - whole).abs() < 5 * error).all())


def test_dare_draws_by_seed_and_leaves_the_global_state_alone(values: torch.Tensor, base: torch.Tensor) -> None:
    before = torch.get_rng_state()
    first, again = (dare(values, base, density=0.5, scaling=1.0, seed=9) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(before, torch.get_rng_state())


@given(st.permutations(range(5)), st.integers(0, 1000))
@settings(max_examples=20)
def test_the_order_of_models_does_not_matter(order: list[int], seed: int) -> None:
    values, base, information = (
        float32_values(seed, 5, 4, 3),
        float32_values(seed + 1, 4, 3),
        float32_values(seed + 2, 5, 4, 3).abs(),
    )
    rows = [float32_values(seed + 3 + m, 12, 4) for m in range(5)]
    thresholds = torch.linspace(0.1, 1.0, 5)
    weights = fisher_weights([1.0, 2.0, 3.0, 4.0, 5.0])

    def merged(i: list[int]) -> list[torch.Tensor]:
        return [
            average(values[i]),
            task_arithmetic(values[i], base, scaling=0.3),
            ties(values[i], base, thresholds=thresholds[i], majority=1.0, scaling=0.3),
            fisher_average(values[i], information[i], weights=weights[i]),
            regmean(values[i], grams_of([rows[m] for m in i])),
        ]

    for left, right in zip(merged(list(range(5))), merged(order), strict=True):
        # sums in another order; regmean's system of 4 unknowns and 60 rows is well conditioned
        assert torch.allclose(left, right, rtol=0, atol=1e-11)


def test_trimming_keeps_entries_at_the_threshold() -> None:
    values = torch.tensor([[0.5, -0.5, 0.25, 1.0]], dtype=torch.float64)
    kept = trimmed(values, torch.zeros(4, dtype=torch.float64), torch.tensor([0.5]))
    assert kept.tolist() == [[0.5, -0.5, 0.0, 1.0]]
