"""Entropy is bounded by what a row keeps, and every character of a text belongs to one token."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.cache_builder.store.row_figures import LEVEL_EDGES, character_ends, entropy_bounds, shade_levels
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.common.errors import CacheError

V = 50


def distributions(seed: int, rows: int = 40) -> np.ndarray:
    """`[rows, V]` descending probabilities, from flat to peaked."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, V)) * rng.uniform(0, 9, size=(rows, 1))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return -np.sort(-p / p.sum(axis=1, keepdims=True), axis=1)


def targets_of(p: np.ndarray, kept: np.ndarray | int | None) -> SoftTargets:
    """The rows with their first `kept` tokens: a number for all, one for each row, or None for the normaliser alone."""
    rows = len(p)
    head: dict = {}
    log_z = -np.log(p[:, :1])
    if isinstance(kept, int):
        head = {"logprobs": np.log(p[:, :kept]), "tail_mass": p[:, kept:].sum(axis=1, keepdims=True)}
    elif kept is not None:
        inside = np.arange(V) < kept[:, None]
        head = {"logprobs": np.log(p[inside]), "kept": kept, "tail_mass": (p * ~inside).sum(axis=1, keepdims=True)}
    zeros = np.zeros(rows, dtype=np.int64)
    return SoftTargets(zeros, log_z, (1.0,), np.zeros(rows), zeros, zeros, **head)


def entropy(p: np.ndarray) -> np.ndarray:
    return np.array([-math.fsum(x * math.log(x) for x in row if x > 0) for row in p])


@pytest.mark.parametrize("kept", [None, 1, 2, 8, 49, "rows"])
def test_the_entropy_lies_between_its_bounds(kept: int | str | None) -> None:
    for seed in range(20):
        p = distributions(seed)
        count = np.random.default_rng(seed).integers(1, V + 1, size=len(p)) if kept == "rows" else kept
        least, most = entropy_bounds(targets_of(p, count), V)  # type: ignore[arg-type]
        true = entropy(p)
        assert (least <= true + 1e-12).all()  # rounding of float64 sums
        assert (true <= most + 1e-12).all()


def test_a_row_that_keeps_everything_has_its_entropy_as_both_bounds() -> None:
    p = distributions(3)
    for count in (V, np.full(len(p), V)):
        for bound in entropy_bounds(targets_of(p, count), V):
            np.testing.assert_allclose(bound, entropy(p), rtol=1e-12)


def test_the_bounds_are_those_of_the_slow_formula() -> None:
    p, kept = distributions(5), 7
    least, most = entropy_bounds(targets_of(p, kept), V)
    for row, x in enumerate(p.tolist()):
        head = math.fsum(-y * math.log(y) for y in x[:kept])
        m = math.fsum(x[kept:])
        assert least[row] == pytest.approx(head - m * math.log(min(m, x[kept - 1])), rel=1e-9)
        assert most[row] == pytest.approx(head - m * math.log(m / (V - kept)), rel=1e-9)


def test_bounds_are_reached() -> None:
    """A tail in pieces as large as the least kept token, and a tail that is spread evenly."""
    least, _ = entropy_bounds(targets_of(np.array([[0.4, 0.2, 0.2, 0.2] + [0.0] * (V - 4)]), 2), V)
    assert least[0] == pytest.approx(-0.4 * math.log(0.4) - 3 * 0.2 * math.log(0.2))
    even = np.array([[0.9, *[0.1 / (V - 1)] * (V - 1)]])
    assert entropy_bounds(targets_of(even, 1), V)[1][0] == pytest.approx(entropy(even)[0])


def test_a_row_without_head_and_normaliser_has_no_entropy() -> None:
    zeros = np.zeros(1, dtype=np.int64)
    with pytest.raises(CacheError, match="does not hold that temperature"):
        entropy_bounds(SoftTargets(zeros, np.zeros((1, 0)), (), np.zeros(1), zeros, zeros), V)


def test_shades_grow_with_the_entropy() -> None:
    assert shade_levels(np.array([0.0, *LEVEL_EDGES])).tolist() == list(range(len(LEVEL_EDGES) + 1))


@settings(max_examples=40)
@given(st.text(max_size=12), st.data())
def test_characters_end_where_their_last_byte_does(text: str, data: st.DataObject) -> None:
    size = len(text.encode())
    ends = [*sorted(data.draw(st.lists(st.integers(0, size), max_size=8))), size]
    whole = [max(n for n in range(len(text) + 1) if len(text[:n].encode()) <= end) for end in ends]
    assert character_ends(text, np.array(ends)).tolist() == whole
