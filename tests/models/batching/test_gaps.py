"""Sequences with gaps between scored tokens, compared with loops over tokens."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.models.batching.gaps import NO_GAPS, Gaps


@st.composite
def sequences(draw: st.DrawFn) -> tuple[np.ndarray, list[tuple[int, bool]], Gaps]:
    """A context, the tokens after it with whether each is scored, and the gaps between turns, which may be empty."""
    context = np.arange(draw(st.integers(1, 4)), dtype=np.int32)
    turns = draw(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=4))
    tokens: list[tuple[int, bool]] = []
    rows, lengths, ids = [], [], []
    for number, (gap, scored) in enumerate(turns):
        if number:
            rows.append(sum(is_scored for _, is_scored in tokens))
            lengths.append(gap)
            ids += [200 + len(ids) + i for i in range(gap)]
            tokens += [(token, False) for token in ids[len(ids) - gap :]]
        tokens += [(100 + len(tokens) + i, True) for i in range(scored)]
    return context, tokens, Gaps(*(np.array(values, dtype=np.int32) for values in (rows, lengths, ids)))


@given(sequences())
def test_sequence_and_positions_are_those_of_a_walk_over_the_tokens(case) -> None:
    context, tokens, gaps = case
    target = np.array([t for t, scored in tokens if scored], dtype=np.int32)
    gaps.check(len(target))
    everything = gaps.sequence(context, target)
    assert everything.tolist() == [*context.tolist(), *(t for t, _ in tokens)]
    predicting = [len(context) + i - 1 for i, (_, scored) in enumerate(tokens) if scored]
    assert gaps.positions(len(context), len(target)).tolist() == predicting
    assert everything[gaps.positions(len(context), len(target)) + 1].tolist() == target.tolist()
    assert gaps.tokens == len(tokens) - len(target)
    turns = gaps.turns(len(target))
    assert len(turns) == len(gaps) + 1
    assert (turns[0, 0], turns[-1, 1]) == (0, len(target))
    assert (turns[1:, 0] == turns[:-1, 1]).all()
    for kept in range(1, len(target) + 1):
        head = gaps.head(kept)
        head.check(kept)
        assert np.array_equal(head.sequence(context, target[:kept]), everything[: predicting[kept - 1] + 2])


def test_without_gaps_a_sequence_is_context_and_target() -> None:
    context, target = np.array([1, 2]), np.array([3, 4, 5])
    assert NO_GAPS.sequence(context, target).tolist() == [1, 2, 3, 4, 5]
    assert NO_GAPS.positions(2, 3).tolist() == [1, 2, 3]
    assert Gaps() == NO_GAPS
    assert Gaps(*(np.array([1], dtype=np.int32),) * 3) != NO_GAPS


@pytest.mark.parametrize(
    ("rows", "lengths", "ids"),
    [
        ([1], [1], []),
        ([1], [1, 1], [7, 7]),
        ([0], [1], [7]),
        ([3], [1], [7]),
        ([2, 1], [1, 1], [7, 7]),
        ([1, 2], [2, -1], [7]),
    ],
)
def test_impossible_gaps_are_refused(rows, lengths, ids) -> None:
    with pytest.raises(ValueError, match="gap"):
        Gaps(*(np.array(v, dtype=np.int32) for v in (rows, lengths, ids))).check(3)
