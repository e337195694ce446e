"""Sums over the vocabulary against float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kd.cache_builder.teacher.normalisers import SEGMENT, log_normalisers, padded_width, row_sums, row_sums_of_squares

WIDTHS = [1, 31, 32, 33, 999, SEGMENT, 50257]


def in_padded(values: np.ndarray) -> torch.Tensor:
    """`values [n, V]` in the first V of `padded_width(V)` columns of zeros."""
    padded = np.zeros((len(values), padded_width(values.shape[1], "cpu")), dtype=np.float32)
    padded[:, : values.shape[1]] = values
    return torch.from_numpy(padded)


def powers_of(v: int, n: int = 5) -> np.ndarray:
    return np.exp(np.random.default_rng(v).normal(0, 8, (n, v))).astype(np.float32)


@pytest.mark.parametrize("width", WIDTHS)
def test_sums_are_those_of_float64(width: int):
    values = powers_of(width)
    exact = values.astype(np.float64)
    # one rounding of 2^-24 per addition to the same lane of a segment, 32 with the shortest vectors there are (16 lanes), and
    # 8 where numpy adds by pairs, all with one sign; a product is rounded once more
    np.testing.assert_allclose(row_sums(in_padded(values)).numpy(), exact.sum(1), rtol=40 * 2**-24)
    squares = row_sums_of_squares(in_padded(values)).numpy()
    np.testing.assert_allclose(squares, np.square(exact).sum(1), rtol=41 * 2**-24)


@pytest.mark.parametrize(
    "temperatures", [(1.0, 2.0, 4.0), (0.25, 0.5, 1.0, 2.0, 4.0, 8.0), (1.0, 4.0), (0.7, 1.0, 2.0)]
)
@pytest.mark.parametrize("width", WIDTHS)
def test_normalisers_are_those_of_float64_and_memory_used_again_changes_no_bit(
    width: int, temperatures: tuple[float, ...]
):
    powers = torch.zeros(4, padded_width(width, "cpu"))
    fresh = None
    for _ in range(2):
        shifted = np.random.default_rng(width).normal(0, 3, (4, width)).astype(np.float32)
        shifted -= shifted.max(axis=1, keepdims=True)
        got = log_normalisers(torch.from_numpy(shifted), temperatures, powers)
        exact = np.stack([np.log(np.exp(shifted.astype(np.float64) / t).sum(1)) for t in temperatures], axis=1)
        # float32 holds a number up to 11 to within 4.8e-7; squared five times, exp's own 1e-7 is 32 times as much
        np.testing.assert_allclose(got.numpy(), exact, rtol=0, atol=1.5e-6 if len(temperatures) < 6 else 4e-6)
        assert fresh is None or torch.equal(fresh, got)
        fresh = got


def test_in_place_and_beside_the_logits_agree_bit_for_bit():
    shifted = torch.from_numpy(-np.random.default_rng(0).exponential(3, (3, 999)).astype(np.float32))
    beside = log_normalisers(shifted, (1.0, 2.0, 4.0), torch.zeros(3, padded_width(999, "cpu")))
    together = in_padded(shifted.numpy())
    assert torch.equal(log_normalisers(together[:, :999], (1.0, 2.0, 4.0), together), beside)


def test_one_token_alone_has_a_normaliser_of_zero():
    shifted = torch.full((1, 77), -math.inf)
    shifted[0, 3] = 0.0
    assert log_normalisers(shifted, (1.0, 2.0), torch.zeros(1, padded_width(77, "cpu"))).tolist() == [[0.0, 0.0]]
