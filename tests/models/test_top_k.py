"""The largest logits of each row against full sorts in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.models.top_k import SPARE, marks_for, top_k_at_once, top_k_by_threshold, top_k_by_topk


def by_sorting(logits: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The twin: a stable sort of whole rows in float64, the lowest id first where logits are equal."""
    order = np.argsort(-logits.astype(np.float64), axis=1, kind="stable")[:, :k]
    return np.take_along_axis(logits, order, 1), order


@st.composite
def rows_and_k(draw_from) -> tuple[np.ndarray, int]:
    """Few different logits (ties everywhere, some at minus infinity) or all different, any k up to V."""
    v = draw_from(st.integers(1, 700))
    rng = np.random.default_rng(draw_from(st.integers(0, 2**32)))
    n, different = draw_from(st.integers(1, 5)), draw_from(st.sampled_from([1, 2, 5, 40, 10**9]))
    logits = (rng.integers(0, different, (n, v)) * 4.0 / different).astype(np.float32)
    logits[rng.random((n, v)) < draw_from(st.sampled_from([0.0, 0.1, 0.99]))] = -np.inf
    return logits, draw_from(st.integers(1, min(v, 20)) | st.integers(1, v))


@pytest.mark.parametrize("top_k", [top_k_by_threshold, top_k_by_topk])
@settings(max_examples=300)
@given(case=rows_and_k())
def test_the_top_k_are_those_of_a_full_sort_and_ties_go_to_the_lowest_id(top_k, case):
    logits, k = case
    values, ids = top_k(torch.from_numpy(logits), k)
    expected, order = by_sorting(logits, k)
    np.testing.assert_array_equal(values.numpy(), expected)
    np.testing.assert_array_equal(ids.numpy(), order)
    np.testing.assert_array_equal(values.numpy(), torch.from_numpy(logits).topk(k, dim=1).values.numpy())


@settings(max_examples=300)
@given(case=rows_and_k())
def test_without_a_wait_the_top_k_are_the_same_but_where_many_equal_the_k_th(case):
    logits, k = case
    values, ids, tied = (x.numpy() for x in top_k_at_once(torch.from_numpy(logits), k))
    expected, order = by_sorting(logits, k)
    beyond = by_sorting(logits, k + SPARE)[0][:, k + SPARE - 1 :]  # empty where there are no others
    everything = k + SPARE >= logits.shape[1]
    np.testing.assert_array_equal(tied, False if everything else (expected[:, k - 1 :] == beyond).all(axis=1))
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(ids[~tied], order[~tied])
    np.testing.assert_array_equal(np.take_along_axis(logits, ids, 1), expected)  # of tied rows, some of the equal ones


@pytest.mark.parametrize("k", [1, 64, 256, 3000])
def test_the_top_k_of_a_real_vocabulary_are_those_of_a_full_sort(k: int):
    logits = (
        np.random.default_rng(0).normal(0, 3, (3, 50257)).astype(np.float32)[:, :-7]
    )  # rows with a stride of their own, as padded columns leave them
    values, ids = top_k_by_threshold(torch.from_numpy(logits), k)
    expected, order = by_sorting(logits, k)
    np.testing.assert_array_equal(values.numpy(), expected)
    np.testing.assert_array_equal(ids.numpy(), order)


def test_memory_that_is_used_again_changes_nothing():
    rng, marks = np.random.default_rng(0), marks_for(7, 999)
    for n in (7, 2, 5):  # what a larger block has marked is in rows and words that a smaller one does not look at
        logits = torch.from_numpy(rng.normal(0, 3, (n, 999)).astype(np.float32))
        for got, fresh in zip(top_k_by_threshold(logits, 20, marks), top_k_by_threshold(logits, 20), strict=True):
            assert torch.equal(got, fresh)


@pytest.mark.parametrize("top_k", [top_k_by_threshold, top_k_by_topk])
def test_no_rows_have_no_top_k(top_k):
    """Tiles of rows in which no group begins, in ULD."""
    values, ids = top_k(torch.empty(0, 50257), 64)
    assert values.shape == ids.shape == (0, 64)
    assert ids.dtype == torch.int64
