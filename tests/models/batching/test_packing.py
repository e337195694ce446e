"""Packing loses nothing, overfills nothing, and says where each example lies and what it sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.models.batching.packing import Packer, Size, lay_out, pack_sequences, segment_mask

ONE_SIDE = st.lists(st.tuples(st.integers(1, 20)), max_size=40)
TWO_SIDES = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 9)), max_size=40)
CAPACITY = (20, 9)


def first_fit(sizes: list[Size], capacity: Size) -> list[list[int]]:
    """The slow twin: look at every sequence in turn, and count anew."""
    packed: list[list[int]] = []
    for example, size in enumerate(sizes):
        for sequence in packed:
            if all(sum(sizes[i][side] for i in sequence) + size[side] <= capacity[side] for side in range(len(size))):
                sequence.append(example)
                break
        else:
            packed.append([example])
    return packed


@given(ONE_SIDE | TWO_SIDES)
def test_packing_is_first_fit_in_order(sizes: list[Size]) -> None:
    capacity = CAPACITY[: len(sizes[0]) if sizes else 1]
    assert pack_sequences(sizes, capacity) == first_fit(sizes, capacity)


@given(ONE_SIDE | TWO_SIDES)
def test_every_example_is_packed_once_and_nothing_overflows(sizes: list[Size]) -> None:
    packed = pack_sequences(sizes, CAPACITY[: len(sizes[0]) if sizes else 1])
    assert sorted(i for sequence in packed for i in sequence) == list(range(len(sizes)))
    for sequence in packed:
        for side in range(len(sizes[0])):
            assert sum(sizes[i][side] for i in sequence) <= CAPACITY[side]


@given(ONE_SIDE | TWO_SIDES)
def test_without_a_capacity_every_example_is_alone(sizes: list[Size]) -> None:
    assert pack_sequences(sizes, None) == [[i] for i in range(len(sizes))]


@given(ONE_SIDE.filter(bool) | TWO_SIDES.filter(bool), st.booleans())
def test_a_packer_foresees_its_sequences_and_counts_its_padding(sizes: list[Size], alone: bool) -> None:
    packer = Packer(None if alone else CAPACITY[: len(sizes[0])])
    for number, size in enumerate(sizes):
        foreseen = packer.with_one_more(size)
        packer.add(number, size)
        assert foreseen == (len(packer.sequences), packer.padded)
        widths = [max(sum(sizes[i][side] for i in s) for s in packer.sequences) for side in range(len(size))]
        assert packer.padded == len(packer.sequences) * sum(widths)
        assert packer.tokens == sum(map(sum, sizes[: number + 1]))
    assert packer.examples == list(range(len(sizes)))


@given(TWO_SIDES.filter(bool), st.integers(0, 1))
def test_examples_lie_where_starts_says_with_positions_of_their_own(sizes: list[Size], side: int) -> None:
    rng = np.random.default_rng(0)
    ids = [rng.integers(1, 100, size[side]) for size in sizes]
    sequences = pack_sequences(sizes, CAPACITY)
    found = lay_out(ids, sequences)
    tokens, segments, positions = (found[n].flatten() for n in ("input_ids", "segment_ids", "position_ids"))
    width = found["input_ids"].shape[1]
    assert width == max(1, *(sum(len(ids[i]) for i in s) for s in sequences))
    for b, sequence in enumerate(sequences):
        for number, i in enumerate(sequence, 1):
            place = slice(found["starts"][i], found["starts"][i] + len(ids[i]))
            assert tokens[place].tolist() == ids[i].tolist()
            assert positions[place].tolist() == list(range(len(ids[i])))
            inside = segments[b * width : (b + 1) * width] == number  # of this length, and nothing else bears it
            assert inside.sum() == len(ids[i])
            assert (segments[place] == number).all()
    padding = segments == 0
    assert padding.sum() == segments.size - sum(map(len, ids))
    assert not tokens[padding].any()
    assert not positions[padding].any()


@pytest.mark.parametrize("size", [(21, 1), (1, 10)])
def test_an_example_larger_than_a_sequence_is_an_error_that_says_how_large(size: Size) -> None:
    with pytest.raises(DataError, match="longer than a packed sequence") as caught:
        pack_sequences([(1, 1), size], CAPACITY)
    assert caught.value.details["found"] == f"{size[0]} + {size[1]} tokens"
    assert caught.value.details["expected"] == "at most 20 + 9"
    assert caught.value.details["where"] == "example 1"


def test_the_mask_lets_nothing_cross_a_border() -> None:
    queries, keys = torch.tensor([[1, 1, 2, 0, 0]]), torch.tensor([[1, 2, 2, 2, 0]])
    found = segment_mask(queries, keys)[0]
    assert found.tolist() == [[q == k for k in keys[0].tolist()] for q in queries[0].tolist()]
    causal = segment_mask(queries, queries, causal=True)[0]
    assert causal.tolist() == [[bool(queries[0, q] == queries[0, k]) and k <= q for k in range(5)] for q in range(5)]
    assert causal.diagonal().all()  # nobody looks at nothing
