"""Packing loses nothing, overfills nothing, and keeps examples from seeing each other."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.data.errors import DataError
from kd.data.packing import attention_mask, pack, positions, segment_ids, target_mask

LENGTHS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 8)), max_size=40)


def first_fit(lengths: list[tuple[int, int]], most: int) -> list[list[int]]:
    """The slow twin: look at every sequence in turn."""
    packed: list[list[int]] = []
    for example, size in enumerate(map(sum, lengths)):
        for sequence in packed:
            if sum(sum(lengths[i]) for i in sequence) + size <= most:
                sequence.append(example)
                break
        else:
            packed.append([example])
    return packed


@given(LENGTHS)
def test_packing_is_first_fit_in_order(lengths: list[tuple[int, int]]) -> None:
    assert [[s.example for s in sequence] for sequence in pack(lengths, max_tokens=20)] == first_fit(lengths, 20)


@given(LENGTHS)
def test_every_example_is_packed_once_and_whole_and_nothing_overflows(lengths: list[tuple[int, int]]) -> None:
    packed = pack(lengths, max_tokens=20)
    assert sorted(s.example for sequence in packed for s in sequence) == list(range(len(lengths)))
    for sequence in packed:
        assert sequence[0].start == 0
        assert sequence[-1].stop <= 20
        assert all(a.stop == b.start for a, b in pairwise(sequence))
        assert all((s.inputs, s.targets) == lengths[s.example] for s in sequence)


@given(LENGTHS)
def test_no_two_neighbours_would_fit_into_one_sequence(lengths: list[tuple[int, int]]) -> None:
    sizes = [sequence[-1].stop for sequence in pack(lengths, max_tokens=20)]
    firsts = [sum(lengths[sequence[0].example]) for sequence in pack(lengths, max_tokens=20)]
    assert all(earlier + first > 20 for earlier, first in zip(sizes[:-1], firsts[1:], strict=True))


@given(LENGTHS.filter(bool))
def test_positions_restart_and_padding_is_zero(lengths: list[tuple[int, int]]) -> None:
    for sequence in pack(lengths, max_tokens=20):
        ids, places, targets = segment_ids(sequence, 22), positions(sequence, 22), target_mask(sequence, 22)
        for number, segment in enumerate(sequence, 1):
            inside = ids == number
            assert list(places[inside]) == list(range(inside.sum()))
            assert list(np.flatnonzero(targets & inside)) == list(range(segment.start + segment.inputs, segment.stop))
        assert not places[ids == 0].any()
        assert not targets[ids == 0].any()


@given(LENGTHS.filter(bool), st.booleans())
def test_the_mask_lets_nothing_cross_a_border(lengths: list[tuple[int, int]], causal: bool) -> None:
    for sequence in pack(lengths, max_tokens=20):
        ids = segment_ids(sequence, 22)
        mask = attention_mask(ids, causal=causal)
        looks, seen = np.nonzero(mask)
        assert (ids[looks] == ids[seen]).all()
        assert mask.diagonal().all()  # nobody attends to nothing
        if causal:
            assert (seen <= looks).all()
        for number in range(1, len(sequence) + 1):
            size = int((ids == number).sum())
            block = mask[np.ix_(ids == number, ids == number)]
            assert block.sum() == (size * (size + 1) // 2 if causal else size**2)


def attend(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Plain self-attention of x [N, d] under mask [N, N]."""
    scores = np.where(mask, x @ x.T, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True) @ x


def test_attention_over_a_packed_sequence_equals_attention_over_each_example() -> None:
    [sequence] = pack([(3, 2), (1, 4), (2, 2)], max_tokens=16)
    tokens = np.random.default_rng(0).normal(size=(16, 5))
    together = attend(tokens, attention_mask(segment_ids(sequence, 16)))
    for s in sequence:
        alone = attend(tokens[s.start : s.stop], np.tri(s.stop - s.start, dtype=bool))
        np.testing.assert_allclose(together[s.start : s.stop], alone, rtol=1e-12)  # the order of float64 sums differs


def test_another_neighbour_changes_no_output() -> None:
    rng = np.random.default_rng(1)
    [sequence] = pack([(3, 2), (1, 4)], max_tokens=10)
    mask = attention_mask(segment_ids(sequence, 10), causal=False)
    one, two = rng.normal(size=(10, 3)), rng.normal(size=(10, 3))
    two[:5] = one[:5]
    np.testing.assert_allclose(attend(one, mask)[:5], attend(two, mask)[:5], rtol=1e-12)
    assert not np.allclose(attend(one, mask)[5:], attend(two, mask)[5:])


@pytest.mark.parametrize(
    ("lengths", "most", "words"),
    [([(3, 9)], 10, "longer"), ([(0, 0)], 10, "no tokens"), ([(-1, 4)], 10, "no tokens"), ([], 0, "too small")],
)
def test_what_cannot_be_packed_is_an_error(lengths: list[tuple[int, int]], most: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        pack(lengths, max_tokens=most)


def test_a_length_that_is_too_short_is_an_error() -> None:
    [sequence] = pack([(3, 2)], max_tokens=10)
    with pytest.raises(DataError, match="does not fit"):
        segment_ids(sequence, 4)
