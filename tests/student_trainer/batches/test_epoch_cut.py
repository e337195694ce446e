"""Micro-batches of shares: every example once, found from any number, and read by as few processes as the lanes allow."""

from __future__ import annotations

from itertools import pairwise
from math import gcd
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.cache_builder.store.readers.epoch_order import EpochOrder, epoch_order
from kd.models.batching.packing import pack_sequences
from kd.student_trainer.batches import epoch_cut
from kd.student_trainer.batches.batch_plan import BatchPlan, plan_batches
from kd.student_trainer.batches.epoch_cut import CutRule, EpochCut


class Cache:
    """As much of a reader as a plan needs, with shards of these numbers of examples."""

    def __init__(self, counts: np.ndarray, lanes: int = 16) -> None:
        self.counts, self.lanes = counts, lanes

    def epoch_order(self, seed: int, epoch: int) -> EpochOrder:
        return epoch_order(seed, epoch, np.cumsum(self.counts) - self.counts, self.counts, self.lanes)

    @property
    def shard_of(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.counts)), self.counts)


RULES = st.one_of(
    st.integers(1, 7).map(lambda n: CutRule(sequences=n)),
    st.integers(1, 90).map(lambda n: CutRule(tokens=n)),
    st.integers(1, 90).map(lambda n: CutRule(tokens=n, capacity=(20,))),
    st.integers(1, 3).map(lambda n: CutRule(sequences=n, capacity=(20,))),
)


def lengths_of(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 20, count)


def fits(lengths: list[int], rule: CutRule) -> bool:
    """Whether these examples may be one micro-batch."""
    sequences = pack_sequences([(n,) for n in lengths], rule.capacity)
    if rule.sequences is not None:
        return len(sequences) <= rule.sequences
    padded = len(sequences) * max(sum(lengths[i] for i in sequence) for sequence in sequences)
    return padded <= (rule.tokens or 0) or len(lengths) == 1


def first_batch(positions: list[int], lengths: list[int], rule: CutRule) -> int | None:
    """How many positions the first micro-batch takes; None where they do not fill it."""
    for n in range(1, len(positions) + 1):
        if rule.counted and n == rule.sequences:
            return n
        if not fits([lengths[p] for p in positions[:n]], rule):
            return n - 1
    return None


def slowly(lengths: list[int], rule: CutRule, shares: int) -> list[list[int]]:
    """The slow twin: positions of each micro-batch, by taking examples away from lists."""
    left, found = [list(range(s, len(lengths), shares)) for s in range(shares)], []
    while None not in (counts := [first_batch(positions, lengths, rule) for positions in left]):
        found += [positions[:n] for positions, n in zip(left, counts, strict=True)]
        left = [positions[n:] for positions, n in zip(left, counts, strict=True)]
    rest, last = [p for positions in left for p in positions], list[list[int]]()
    while rest:
        n = first_batch(rest, lengths, rule) or len(rest)
        last, rest = [*last, rest[:n]], rest[n:]
    long, more = divmod(len(last), shares)  # blocks of `long` micro-batches, the first `more` of them one longer
    starts = [block * long + min(block, more) for block in range(shares + 1)]
    blocks = [last[a:b] for a, b in pairwise(starts)]
    return found + [block[turn] for turn in range(long + 1) for block in blocks if turn < len(block)]


@settings(max_examples=60)
@given(rule=RULES, shares=st.sampled_from([1, 2, 4, 8]), shards=st.integers(9, 20), seed=st.integers(0, 99))
def test_shares_take_turns_and_what_is_left_is_dealt_out_in_blocks(rule, shares, shards, seed) -> None:
    cache = Cache(np.random.default_rng(seed).integers(1, 9, shards), lanes=8)
    order = cache.epoch_order(seed, 0)
    lengths = lengths_of(len(order), seed)
    cut = EpochCut(order, lengths, rule, epoch=3, shares=shares)
    expected = slowly(lengths[order[:]].tolist(), rule, shares)
    found = list(cut.batches())
    assert [list(batch.examples) for batch in found] == [order.at(np.array(batch)).tolist() for batch in expected]
    assert {batch.epoch for batch in found} == {3}
    assert len(cut) == len(found)


@given(rule=RULES, shares=st.sampled_from([1, 2, 8]), seed=st.integers(0, 99), every=st.integers(1, 5))
def test_any_micro_batch_is_found_from_its_number(rule, shares, seed, every) -> None:
    cache = Cache(np.random.default_rng(seed).integers(1, 9, 12), lanes=8)
    order = cache.epoch_order(seed, 0)
    lengths = lengths_of(len(order), seed)
    whole = list(EpochCut(order, lengths, rule, epoch=0, shares=shares).batches())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch_cut, "MARK_EVERY", every)
        patch.setattr(epoch_cut, "READ_AHEAD", 5)
        assert len(EpochCut(order, lengths, rule, epoch=0, shares=shares)) == len(whole)
        cut = EpochCut(order, lengths, rule, epoch=0, shares=shares)
        for start in (len(whole) // 2, 0, len(whole) - 1, len(whole)):  # before and after marks were left
            assert list(cut.batches(start)) == whole[start:]
            assert cut.examples_before(start) == sum(len(batch.examples) for batch in whole[:start])
            assert cut.holds(start) == (start < len(whole))
        assert len(cut) == len(whole)


@given(size=st.integers(1, 6), multiple=st.sampled_from([1, 2, 3, 4, 8]), seed=st.integers(0, 9))
def test_a_step_of_counted_examples_is_the_same_piece_of_the_order_whoever_shares_it(size, multiple, seed) -> None:
    cache = Cache(np.random.default_rng(seed).integers(1, 9, 30))
    order = cache.epoch_order(seed, 0).tolist()
    plan = plan_batches(cache, np.ones(len(order), dtype=int), seed=seed, batch_size=size, multiple_of=multiple)
    for step in range(len(order) // (size * multiple)):
        examples = [e for batch in plan[step * multiple : (step + 1) * multiple] for e in batch.examples]
        assert sorted(examples) == sorted(order[step * size * multiple : (step + 1) * size * multiple])


def loads(plan: BatchPlan, cache: Cache, processes: int) -> list[int]:
    """Shards that each process reads in the plan's micro-batches."""
    shard_of = cache.shard_of
    read: list[set[int]] = [set() for _ in range(processes)]
    for number, batch in enumerate(plan):
        read[number % processes] |= set(shard_of[list(batch.examples)].tolist())
    return [len(shards) for shards in read]


@pytest.mark.parametrize("cut", [{"batch_size": 4}, {"tokens_per_batch": 1024}])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_eight_processes_read_little_more_than_one(cut: dict[str, Any], accumulate: int) -> None:
    rng = np.random.default_rng(0)
    cache = Cache(rng.integers(20, 60, 600))
    lengths = np.minimum(rng.lognormal(4.5, 0.7, cache.counts.sum()).astype(int) + 1, 512)
    multiple = 8 * accumulate
    assert gcd(cache.lanes, multiple) == 8
    plan = plan_batches(cache, lengths, seed=0, multiple_of=multiple, **cut)
    read = loads(plan, cache, 8)
    assert sum(read) <= 1.1 * 600
    assert max(read) <= 1.25 * 600 / 8  # and none of them reads much more than its share
    assert sum(loads(plan, cache, 1)) == 600


def test_the_first_batch_of_a_billion_examples_needs_no_list_of_them() -> None:
    import tracemalloc

    counts = np.full(300_000, 3400)
    cache, lengths = Cache(counts), np.broadcast_to(np.int64(256), int(counts.sum()))
    tracemalloc.start()
    by_tokens = plan_batches(cache, lengths, seed=0, tokens_per_batch=4096, multiple_of=8, count=8 * 1000)
    by_count = plan_batches(cache, lengths, seed=0, batch_size=16, multiple_of=8)
    first, middle = by_tokens[0], by_count[len(by_count) // 2]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(by_count) == len(lengths) // 16 // 8 * 8
    assert (len(first.examples), len(middle.examples)) == (16, 16)
    assert peak < 120e6
