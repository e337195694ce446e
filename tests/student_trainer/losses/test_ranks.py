"""A row rebuilt from its head and bands: exact where the cache is exact, and one shape in its two forms."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kd.cache_builder.store.encoding.rank_bands import LOG_MASS_FLOOR
from kd.cache_builder.store.targets import band_edges
from kd.student_trainer.losses.ranks import cumulative_curve, mass_of_first, sorted_row

SHAPES = [(4, 40, 5), (1, 40, 3), (16, 512, 16), (8, 13, 16), (6, 40, 1), (39, 40, 4), (16, 2048, 8)]
"""(K, V, B); in (8, 13, 16) and (39, 40, 4) bands run out of ranks."""


def stored(
    rows: int, k: int, v: int, b: int, *, scale: float = 3.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """A sorted row of random logits `[rows, v]`, and what a cache keeps of it: head, bands, edges."""
    generator = torch.Generator().manual_seed(seed)
    row = (scale * torch.randn(rows, v, generator=generator, dtype=torch.float64)).softmax(dim=1)
    row = row.sort(dim=1, descending=True).values
    edges = tuple(band_edges(k, v, b))
    bands = torch.stack(
        [row[:, low:high].sum(dim=1).log().clamp(min=LOG_MASS_FLOOR) for low, high in itertools.pairwise(edges)], dim=1
    )
    return row, row[:, :k].log().to(dtype), bands.to(dtype), edges


@pytest.mark.parametrize(("k", "v", "b"), SHAPES)
def test_the_head_and_the_mass_of_every_band_are_exact(k: int, v: int, b: int) -> None:
    row, head, bands, edges = stored(7, k, v, b)
    found = sorted_row(head, bands, edges)
    assert found.shape == row.shape
    # float64, sums of at most 2048 terms
    assert torch.allclose(found[:, :k], row[:, :k], rtol=1e-12, atol=0)
    for low, high in itertools.pairwise(edges):
        assert torch.allclose(found[:, low:high].sum(dim=1), row[:, low:high].sum(dim=1), rtol=1e-12, atol=1e-25)
    assert torch.allclose(found.sum(dim=1), torch.ones(7, dtype=torch.float64), rtol=1e-12, atol=0)


@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 12), st.integers(0, 99), st.floats(0.1, 12.0))
def test_any_shape_keeps_mass_and_order_of_the_head(k: int, beyond: int, b: int, seed: int, scale: float) -> None:
    v = k + beyond
    row, head, bands, edges = stored(3, k, v, b, seed=seed, scale=scale)
    found = sorted_row(head, bands, edges)
    assert found.shape == (3, v)
    assert found.isfinite().all()
    assert (found >= 0).all()
    assert (found[:, :k].diff(dim=1) <= 0).all()
    # bands are floored at e^-60
    assert torch.allclose(found.sum(dim=1), row.sum(dim=1), rtol=1e-11, atol=0)


def test_with_every_rank_kept_the_row_is_the_head() -> None:
    row, head, bands, edges = stored(5, 40, 40, 4)
    assert edges == (40,) * 5
    for given_bands in (None, bands):  # bands without ranks hold e^-60
        assert torch.allclose(sorted_row(head, given_bands, edges), row, rtol=1e-14, atol=0)
        knots, curve = cumulative_curve(head, given_bands, edges)
        assert knots.tolist() == list(range(41))
        assert torch.allclose(curve[:, 1:], row.cumsum(dim=1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("exponent", [1.0, 1.5, 3.0])
def test_a_power_law_is_rebuilt(exponent: float) -> None:
    k, v, b = 16, 2048, 16
    row = torch.arange(1, v + 1, dtype=torch.float64).pow(-exponent)[None]
    row = row / row.sum()
    edges = tuple(band_edges(k, v, b))
    bands = torch.stack([row[:, low:high].sum(dim=1).log() for low, high in itertools.pairwise(edges)], 1)
    found = sorted_row(row[:, :k].log(), bands, edges)
    # the band's mean is not quite the value at its geometric middle: a relative error of (width in log rank)² / 8
    # times exponent², with 16 bands over a factor of 128 that is 1.1 % for a cube
    assert ((found / row).log().abs()).max() < 0.012 * max(1.0, exponent**2 / 9)
    assert (found.diff(dim=1) <= 1e-9).all()


@pytest.mark.parametrize(("k", "v", "b"), SHAPES)
def test_the_curve_is_the_row_s_running_sum_at_head_ranks_and_band_edges(k: int, v: int, b: int) -> None:
    _, head, bands, edges = stored(7, k, v, b)
    total = torch.nn.functional.pad(sorted_row(head, bands, edges).cumsum(dim=1), (1, 0))
    knots, curve = cumulative_curve(head, bands, edges)
    assert knots[0] == 0
    assert int(knots[-1]) == v
    assert (knots.diff() > 0).all()
    exact = [n for n, knot in enumerate(knots.tolist()) if knot <= k or knot in edges]
    assert torch.allclose(curve[:, exact], total[:, knots[exact]], rtol=1e-12, atol=1e-12)
    # inside a band: 8 steps of one density each against one per rank; the mass of a band of random rows is up to
    # 10 %, and the middle of a step misses its mean by the curvature over an eighth of the band
    assert (curve - total[:, knots]).abs().max() < 1e-3


@pytest.mark.parametrize(("k", "v", "b"), SHAPES)
def test_the_mass_of_the_first_ranks_grows_and_is_exact_at_knots(k: int, v: int, b: int) -> None:
    _, head, bands, edges = stored(4, k, v, b)
    knots, curve = cumulative_curve(head, bands, edges)
    ranks = torch.arange(v + 1, dtype=torch.float64).repeat(4, 1)
    found = mass_of_first(ranks, knots, curve)
    assert (found.diff(dim=1) >= 0).all()
    assert torch.allclose(found[:, knots], curve, rtol=1e-14, atol=0)
    assert (mass_of_first(ranks + v, knots, curve) == curve[:, -1:]).all()
    assert (found[:, 0] == 0).all()


def test_a_row_as_float32_holds_it_is_as_good() -> None:
    _row, head, bands, edges = stored(7, 16, 512, 16, dtype=torch.float32)
    wide = sorted_row(head.double(), bands.double(), edges)
    narrow = sorted_row(head, bands, edges)
    assert narrow.dtype == torch.float32
    # seven digits each, and logarithms of size 20 carry 1e-6
    assert torch.allclose(narrow.double(), wide, rtol=2e-5, atol=1e-12)
    assert math.isclose(float(narrow.sum()), 7.0, rel_tol=1e-5)


def test_a_certain_teacher_leaves_a_tail_of_nothing() -> None:
    head = torch.tensor([[0.0, -65504.0, -65504.0]])  # what float16 makes of a logit far below the top
    edges = tuple(band_edges(3, 50, 4))
    bands = torch.full((1, 4), LOG_MASS_FLOOR)
    found = sorted_row(head, bands, edges)
    assert found.isfinite().all()
    assert float(found[0, 0]) == 1.0
    assert float(found[0, 1:].sum()) < 1e-20
    assert cumulative_curve(head, bands, edges)[1].isfinite().all()


# rows that differ in length: the bands begin at the same ranks, and hold what a row does not keep

LENGTHS = [
    (1, 12, 40, 5),
    (2, 30, 512, 16),
    (4, 13, 13, 16),
    (1, 40, 40, 4),
    (6, 6, 40, 3),
    (1, 60, 61, 1),
    (3, 3, 3, 2),
]
"""(shortest, longest, V, B); in some, rows keep every rank, and bands run out of ranks."""


def uneven(
    shortest: int, longest: int, v: int, b: int, rows: int = 9
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...], Tensor]:
    """Sorted rows `[rows, v]`, and what a cache keeps: heads padded with minus infinity, bands, edges, lengths."""
    row, head, _, _ = stored(rows, longest, v, b)
    kept = torch.randint(shortest, longest + 1, (rows,), generator=torch.Generator().manual_seed(1))
    kept[0], kept[1] = shortest, longest
    edges = tuple(band_edges(shortest, v, b))
    beyond = row.masked_fill(torch.arange(v) < kept[:, None], 0.0)
    bands = torch.stack([beyond[:, low:high].sum(1) for low, high in itertools.pairwise(edges)], dim=1)
    head = head.masked_fill(torch.arange(longest) >= kept[:, None], -torch.inf)
    return row, head, bands.log().clamp(min=LOG_MASS_FLOOR), edges, kept


def alone(head: Tensor, bands: Tensor, edges: tuple[int, ...], kept: Tensor, n: int) -> Tensor:
    """The slow twin: row n by itself, as a row of a cache whose fixed k is that row's length."""
    length = int(kept[n])
    return sorted_row(head[n : n + 1, :length], bands[n : n + 1], tuple(max(edge, length) for edge in edges))


@pytest.mark.parametrize("shape", LENGTHS)
def test_a_row_of_any_length_is_that_of_a_cache_with_this_k(shape: tuple[int, int, int, int]) -> None:
    _, head, bands, edges, kept = uneven(*shape)
    found = sorted_row(head, bands, edges, kept)
    for n in range(len(kept)):
        # float64; a line through two points is worked out in two ways, and logarithms of e^-60 have a size of 60
        torch.testing.assert_close(found[n : n + 1], alone(head, bands, edges, kept, n), rtol=1e-10, atol=1e-24)


@pytest.mark.parametrize("shape", LENGTHS)
def test_rows_of_any_length_keep_their_heads_and_the_mass_of_every_band(shape: tuple[int, int, int, int]) -> None:
    row, head, bands, edges, kept = uneven(*shape)
    found = sorted_row(head, bands, edges, kept)
    assert found.shape == row.shape
    for n, length in enumerate(kept.tolist()):
        torch.testing.assert_close(found[n, :length], row[n, :length], rtol=1e-12, atol=0)
        for low, high in itertools.pairwise(edges):
            torch.testing.assert_close(found[n, low:high].sum(), row[n, low:high].sum(), rtol=1e-12, atol=1e-24)


@pytest.mark.parametrize("shape", LENGTHS)
def test_the_curve_of_rows_of_any_length_is_their_running_sum(shape: tuple[int, int, int, int]) -> None:
    _, head, bands, edges, kept = uneven(*shape)
    total = torch.nn.functional.pad(sorted_row(head, bands, edges, kept).cumsum(dim=1), (1, 0))
    knots, curve = cumulative_curve(head, bands, edges, kept)
    assert knots.tolist()[: shape[1] + 1] == list(range(shape[1] + 1))  # every rank of the longest head
    assert int(knots[-1]) == shape[2]
    assert (knots.diff() > 0).all()
    exact = [i for i, knot in enumerate(knots.tolist()) if knot <= shape[1] or knot in edges]
    # the band in which the last single rank lies goes on in steps, whose shares of its mass are not quite those of its ranks
    assert (curve[:, exact] - total[:, knots[exact]]).abs().max() < 1e-3
    ends = [i for i, knot in enumerate(knots.tolist()) if knot in edges]
    torch.testing.assert_close(curve[:, ends], total[:, knots[ends]], rtol=1e-12, atol=1e-12)


def test_rows_of_one_length_are_what_they_are_without_lengths() -> None:
    _, head, bands, edges = stored(7, 16, 512, 16)
    kept = torch.full((7,), 16)
    torch.testing.assert_close(sorted_row(head, bands, edges, kept), sorted_row(head, bands, edges), rtol=1e-11, atol=0)
