"""An epoch is a permutation of which any part can be worked out; lanes read each shard once and share an epoch among processes."""

from __future__ import annotations

import pickle
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.cache_builder.store.readers import epoch_order as epoch_order_module
from kd.cache_builder.store.readers.epoch_order import EpochOrder, LaneOrder, ListedOrder, epoch_order

LANES = 16


def order_of(counts: np.ndarray, seed: int = 0, epoch: int = 0, lanes: int = LANES) -> EpochOrder:
    return epoch_order(seed, epoch, np.cumsum(counts) - counts, counts, lanes)


def sizes(shards: int, seed: int = 0) -> np.ndarray:
    """Examples of shards of a corpus whose documents differ in length."""
    return np.random.default_rng(seed).integers(8, 60, shards)


def shards_in(order: EpochOrder, counts: np.ndarray) -> np.ndarray:
    """The shard of each example of the epoch."""
    return np.searchsorted(np.cumsum(counts), order[:], side="right")


CORPORA = st.lists(st.integers(1, 9), min_size=1, max_size=40).map(np.array)


@given(counts=CORPORA, seed=st.integers(0, 3), epoch=st.integers(0, 3), lanes=st.integers(1, 9))
def test_every_example_comes_once_and_any_part_can_be_asked_for(counts, seed, epoch, lanes) -> None:
    order = order_of(counts, seed, epoch, lanes)
    whole = order.tolist()
    assert len(order) == len(whole)
    assert sorted(whole) == list(range(counts.sum()))
    assert list(order) == whole
    for part in (slice(3, 11), slice(2, None, 3), slice(0, 0), slice(None, None, -2)):
        assert order[part].tolist() == whole[part]
    places = np.random.default_rng(seed).integers(0, len(whole), 7)
    assert order.at(places).tolist() == [whole[p] for p in places] == [order[int(p)] for p in places]
    assert pickle.loads(pickle.dumps(order)).tolist() == whole


@given(counts=CORPORA, lanes=st.integers(1, 9))
def test_lanes_are_walked_as_written(counts, lanes) -> None:
    """The slow twin: shuffled shards in a row, equal spans, each walked by a lane, lanes in turn."""
    if len(counts) <= lanes:
        return
    order = order_of(counts, lanes=lanes)
    assert isinstance(order, LaneOrder)
    row = [e for block in range(-(-len(counts) // 8)) for e in order._shuffled_block(block)[0].tolist()]
    spans = {}
    for lane in range(lanes):
        length, at = len(row) // lanes + (lane < len(row) % lanes), int(order._origins[lane])
        spans[lane] = [row[at + int(order._steps[lane]) * i] for i in range(length)]
    assert sorted(e for span in spans.values() for e in span) == sorted(row)
    assert order.tolist() == [spans[p % lanes][p // lanes] for p in range(len(row))]
    shards = np.searchsorted(np.cumsum(counts), row, side="right")
    assert (np.diff(shards) != 0).sum() == len(counts) - 1  # a shard lies in one piece in the row


@given(lanes=st.sampled_from([1, 4, 6, 16]), step=st.integers(1, 17), seed=st.integers(0, 99), data=st.data())
def test_a_long_stretch_is_what_its_positions_are(lanes, step, seed, data) -> None:
    order = order_of(sizes(60, seed), seed, lanes=lanes)
    start = data.draw(st.integers(0, len(order)))
    positions = range(start, data.draw(st.integers(start, len(order))), step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch_order_module, "LONG", data.draw(st.sampled_from([1, 5, 64])))
        assert order.stretch(positions).tolist() == order.at(np.array(positions, dtype=np.int64)).tolist()


def test_equal_random_numbers_leave_examples_in_their_order(monkeypatch) -> None:
    order = order_of(np.full(9, 4), lanes=1)
    assert isinstance(order, LaneOrder)

    class Dice:
        def __init__(self, *_: object) -> None: ...

        def random(self, count: int) -> np.ndarray:
            return np.tile([0.5, 0.25], count)[:count]

    monkeypatch.setattr(np.random, "Generator", Dice)
    examples, _ = order._shuffled_block(0)
    assert (examples.reshape(-1, 4) % 4).tolist() == [[1, 3, 0, 2]] * 8


def test_a_cache_of_one_window_keeps_the_order_of_the_first_release() -> None:
    """Checkpoints of such runs continue exactly."""
    counts, firsts = np.array([3, 2, 4]), [0, 3, 5]
    for seed, epoch in ((0, 0), (3, 2)):
        rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
        shards = rng.permutation(np.arange(3))
        before = rng.permutation(np.concatenate([np.arange(firsts[s], firsts[s] + counts[s]) for s in shards]))
        order = order_of(counts, seed, epoch)
        assert order.tolist() == before.tolist()
        assert (order.layout, order.lanes) == ("window", 1)
    assert order_of(np.array([3, 2, 4])).tolist() == [3, 1, 0, 4, 5, 6, 2, 7, 8]  # as its own code gave it


def test_seeds_and_epochs_have_orders_of_their_own_and_shards_too() -> None:
    counts = np.full(24, 10)
    orders = {(seed, epoch): tuple(order_of(counts, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(orders.values())) == 4
    order = order_of(counts)[:]
    within = {tuple(order[order // 10 == shard] % 10) for shard in range(24)}
    assert len(within) == 24


@pytest.mark.parametrize("shards", [17, 40, 300])
def test_one_process_reads_every_shard_once_and_holds_no_more_than_there_are_lanes(shards: int) -> None:
    counts = sizes(shards)
    memory: OrderedDict[int, None] = OrderedDict()
    loads = 0
    for shard in shards_in(order_of(counts), counts).tolist():
        loads += shard not in memory
        memory[shard] = None
        memory.move_to_end(shard)
        if len(memory) > LANES:
            memory.popitem(last=False)
    assert loads == shards


@pytest.mark.parametrize("processes", [2, 4, 8, 16])
@pytest.mark.parametrize("shards", [17, 300])
def test_processes_share_an_epoch_and_only_shards_where_their_spans_meet(shards: int, processes: int) -> None:
    counts = sizes(shards)
    of = shards_in(order_of(counts), counts)
    read = sum(len(np.unique(of[rank::processes])) for rank in range(processes))
    assert read <= shards + processes - 1
    if shards == 300:
        assert read <= 1.1 * shards


def test_a_billion_examples_cost_no_more_than_their_shards() -> None:
    import tracemalloc

    counts = np.full(300_000, 3400)
    firsts = np.cumsum(counts) - counts
    tracemalloc.start()
    order = epoch_order(0, 0, firsts, counts, LANES)
    found = order[10**9 - 64 : 10**9]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(order) == 1_020_000_000
    assert len(set(found.tolist())) == 64
    assert peak < 60e6  # a few arrays of 300,000 numbers, and blocks of 27,200 examples of each lane


def variance_beside_a_full_shuffle(order: np.ndarray, value: np.ndarray, batch: int) -> float:
    """Variance of the mean of `value` over batches, relative to batches of a full shuffle."""
    whole = len(order) // batch * batch
    means = value[order[:whole]].reshape(-1, batch).mean(axis=1)
    return float(means.var() / (value.var() / batch))


@pytest.mark.parametrize(("batch", "expected"), [(16, 1.0), (64, 4.0), (256, 16.0)])
def test_a_batch_mixes_as_a_sample_of_as_many_shards_as_there_are_lanes(batch: int, expected: float) -> None:
    """A value that all examples of a shard share is the worst there is: many examples then say no more than 16 do.

    Kish's design effect: 1 + (batch / lanes - 1) * correlation within a shard, here 1.
    """
    counts, shards = np.full(4000, 32), 4000
    value = np.repeat(np.random.default_rng(1).normal(size=shards), counts)
    found = variance_beside_a_full_shuffle(order_of(counts)[:], value, batch)
    # the variance of means that share shards with their neighbours: about 4000 * 32 / (16 * 32) = 250 independent ones
    assert found == pytest.approx(expected, rel=0.3)
    uncorrelated = np.random.default_rng(2).normal(size=len(value))
    assert variance_beside_a_full_shuffle(order_of(counts)[:], uncorrelated, batch) == pytest.approx(1.0, rel=0.2)


def test_a_listed_order_is_its_list() -> None:
    order = ListedOrder(np.array([2, 0, 1]))
    assert (order.tolist(), order[1], order[-1], len(order)) == ([2, 0, 1], 0, 1, 3)
    assert np.asarray(order, dtype=np.int32).dtype == np.int32
    with pytest.raises(IndexError):
        order[3]
