"""A large mixture has the shares of its weights at every place, and each cache's own epochs in its lanes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.cache_builder.store.readers import mixed_order as module
from kd.cache_builder.store.readers.epoch_order import EpochOrder, epoch_order
from kd.cache_builder.store.readers.mixed_order import MixedOrder, mixed_order, shares_of_first

SHARDS = (np.full(40, 30), np.full(25, 40))
FIRSTS = np.array([0, 1200, 2200])
WEIGHTS = np.array([0.7, 0.3])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and mixtures of a size to be listed here."""
    monkeypatch.setattr(module, "LISTED", 100)
    monkeypatch.setattr(module, "BLOCK", 32)


def part(number: int, epoch: int) -> EpochOrder:
    counts = SHARDS[number]
    return epoch_order(5, epoch, np.cumsum(counts) - counts, counts, 8)


def mixed(epoch: int = 0, seed: int = 5) -> EpochOrder:
    return mixed_order(seed, epoch, WEIGHTS, FIRSTS, part)


def test_any_part_of_it_can_be_asked_for() -> None:
    order = mixed(1)
    assert isinstance(order, MixedOrder)
    whole = order.tolist()
    assert len(whole) == len(order) == 2200
    assert list(order) == whole
    places = np.random.default_rng(0).integers(0, 2200, 50)
    assert order.at(places).tolist() == [whole[p] for p in places]
    assert mixed(1).tolist() == whole
    assert len({tuple(mixed(e, s).tolist()) for e in (0, 1) for s in (5, 6)}) == 4


def test_shares_hold_at_every_place() -> None:
    epochs = np.concatenate([mixed(e)[:] for e in range(3)])
    first = np.cumsum(epochs < 1200)
    expected = 0.7 * np.arange(1, len(epochs) + 1)
    assert np.abs(first - expected).max() <= 8 * 33  # no lane is further away than a block


def test_each_lane_reads_the_caches_lanes_epoch_after_epoch() -> None:
    epochs = [mixed(e)[:] for e in range(3)]
    for lane in range(8):
        walked = np.concatenate([order[lane::8] for order in epochs])
        for number, first in enumerate(FIRSTS[:-1]):
            own = walked[(walked >= first) & (walked < FIRSTS[number + 1])] - first
            there = np.concatenate([part(number, e)[lane::8] for e in range(4)])
            assert own.tolist() == there[: len(own)].tolist()


@given(weights=st.lists(st.floats(0.01, 10), min_size=1, max_size=5), count=st.integers(0, 10**12))
def test_shares_of_the_first_positions_add_up_and_never_fall(weights: list[float], count: int) -> None:
    now, later = shares_of_first(count, weights), shares_of_first(count + 1, weights)
    assert sum(now) == count
    assert all(0 <= a <= b for a, b in zip(now, later, strict=True))
    exact = count * np.array(weights) / sum(weights)
    assert np.abs(np.array(now) - exact).max() <= len(weights) + 1e-3  # and the rounding of 10^12 in float64
