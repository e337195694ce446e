"""The plan of a run covers what it should in the reader's order."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import CacheMismatchError
from kd.student_trainer.batches import epoch_cut
from kd.student_trainer.batches.batch_plan import BatchPlan, PlannedBatches, plan_batches
from kd.student_trainer.batches.epoch_cut import MicroBatch
from kd.student_trainer.batches.read_ahead import CachedExamples


class Order:
    """As much of a reader as a plan needs: an order for each (seed, epoch)."""

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(self.examples)


@st.composite
def corpora(draw: st.DrawFn) -> np.ndarray:
    """Tokens of 1 to 30 examples."""
    return np.array(draw(st.lists(st.integers(2, 40), min_size=1, max_size=30)))


CUTS = st.one_of(
    st.fixed_dictionaries({"batch_size": st.integers(1, 12)}),
    st.fixed_dictionaries({"tokens_per_batch": st.integers(1, 200)}),
)


def flat(batches: Iterable[MicroBatch]) -> list[int]:
    return [example for batch in batches for example in batch.examples]


@given(lengths=corpora(), cut=CUTS, seed=st.integers(0, 9), epochs=st.integers(1, 3))
def test_an_epoch_holds_every_example_once_in_the_reader_s_order(lengths, cut, seed, epochs) -> None:
    order = Order(len(lengths))
    plan = plan_batches(order, lengths, seed=seed, epochs=epochs, **cut)
    for epoch in range(epochs):
        mine = flat(batch for batch in plan if batch.epoch == epoch)
        assert mine == order.epoch_order(seed, epoch).tolist()
    numbers = [batch.epoch for batch in plan]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(epochs))


@given(lengths=corpora(), first=CUTS, second=CUTS)
def test_neither_batch_size_nor_token_budget_changes_the_order(lengths, first, second) -> None:
    a, b = (plan_batches(Order(len(lengths)), lengths, seed=0, epochs=2, **cut) for cut in (first, second))
    assert flat(a) == flat(b)


@given(lengths=corpora(), budget=st.integers(1, 200))
def test_a_batch_with_its_padding_fits_the_token_budget_and_could_not_take_one_more(lengths, budget) -> None:
    plan = plan_batches(Order(len(lengths)), lengths, seed=0, tokens_per_batch=budget)

    def padded(batch: tuple[int, ...]) -> int:
        return len(batch) * int(lengths[list(batch)].max())

    for batch in plan:
        assert batch.padded == padded(batch.examples)
        assert batch.padded <= budget or len(batch.examples) == 1  # an example larger than the budget goes alone
    for batch, following in pairwise(plan):
        assert padded((*batch.examples, following.examples[0])) > budget


@given(lengths=corpora(), size=st.integers(1, 12))
def test_a_batch_holds_the_number_of_examples_asked_for_and_the_last_what_is_left(lengths, size) -> None:
    plan = plan_batches(Order(len(lengths)), lengths, seed=0, batch_size=size)
    whole, rest = divmod(len(lengths), size)
    assert [len(batch.examples) for batch in plan] == [size] * whole + ([rest] if rest else [])


@given(lengths=corpora(), cut=CUTS, multiple=st.integers(1, 8), epochs=st.floats(0.01, 3.0))
def test_every_step_is_whole(lengths, cut, multiple, epochs) -> None:
    free = plan_batches(Order(len(lengths)), lengths, seed=0, epochs=epochs, **cut)
    plan = plan_batches(Order(len(lengths)), lengths, seed=0, epochs=epochs, multiple_of=multiple, **cut)
    assert len(plan) % multiple == 0
    assert len(plan) == len(list(plan)) > 0
    shared = min(len(plan), len(free))
    assert plan[:shared] == free[:shared]
    if len(free) >= multiple:
        assert 0 <= len(free) - len(plan) < multiple  # rounded down
    else:
        assert list(plan) == [free[i % len(free)] for i in range(multiple)]  # repeated to fill one step


@given(lengths=corpora(), cut=CUTS, count=st.integers(1, 40))
def test_a_count_of_batches_is_met_exactly_and_continues_into_further_epochs(lengths, cut, count) -> None:
    plan = plan_batches(Order(len(lengths)), lengths, seed=3, count=count, **cut)
    assert len(plan) == count
    endless = plan_batches(Order(len(lengths)), lengths, seed=3, epochs=count, **cut)
    assert list(plan) == endless[:count]


@pytest.mark.parametrize(("epochs", "examples"), [(0.5, 5), (1.0, 10), (1.5, 15), (2.3, 23), (0.001, 1)])
def test_a_part_of_an_epoch_is_that_part_of_its_order(epochs: float, examples: int) -> None:
    order = Order(10)
    plan = plan_batches(order, np.full(10, 4), seed=0, epochs=epochs, batch_size=1)
    whole = [e for epoch in range(3) for e in order.epoch_order(0, epoch).tolist()]
    assert flat(plan) == whole[:examples]


def test_a_plan_of_a_cache_follows_the_cache_s_own_order(kl_reader: CacheReader) -> None:
    tokens, _ = kl_reader.lengths()
    plan = plan_batches(kl_reader, tokens, seed=7, epochs=2, tokens_per_batch=100)
    expected = [*kl_reader.epoch_order(7, 0).tolist(), *kl_reader.epoch_order(7, 1).tolist()]
    assert flat(plan) == expected
    assert expected[: len(tokens)] != expected[len(tokens) :]  # epochs differ
    assert sorted(expected[: len(tokens)]) == list(range(len(tokens)))


def test_a_data_loader_hands_out_the_plan_as_it_stands(kl_reader: CacheReader) -> None:
    tokens, _ = kl_reader.lengths()
    plan = plan_batches(kl_reader, tokens, seed=7, batch_size=3)
    loader = DataLoader(
        CachedExamples(kl_reader), batch_sampler=PlannedBatches(plan), collate_fn=lambda batch: [e.index for e in batch]
    )
    assert [tuple(indices) for indices in loader] == [batch.examples for batch in plan]
    assert len(loader) == len(plan)


@given(lengths=corpora(), budget=st.integers(1, 200), epochs=st.sampled_from([0.6, 1.0, 3.0]), data=st.data())
def test_a_plan_that_knows_where_it_is_goes_on_as_one_that_walks_there(lengths, budget, epochs, data) -> None:
    def fresh() -> BatchPlan:
        return plan_batches(Order(len(lengths)), lengths, seed=0, epochs=epochs, tokens_per_batch=budget)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch_cut, "MARK_EVERY", 2)
        plan = fresh()
        batches = list(plan)
        done = data.draw(st.integers(0, len(batches)))
        known = plan.known(done)
        if known is None:
            assert done == len(batches)
            return
        after = fresh()
        after.know(json.loads(json.dumps(known)))
        assert list(after.walk(done)) == batches[done:]
        assert (len(after), after.padding_share) == (len(plan), plan.padding_share)
        assert after.examples_before(done) == plan.examples_before(done)


def test_a_plan_that_knows_where_it_is_walks_no_more_than_from_the_last_mark() -> None:
    looked_up = 0

    class Counted(np.ndarray):
        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            nonlocal looked_up
            looked_up += np.size(key)
            return np.asarray(self)[key]

    lengths = np.random.default_rng(0).integers(1, 60, 40_000)
    plan = plan_batches(Order(len(lengths)), lengths, seed=0, tokens_per_batch=120)
    done = 3 * len(plan) // 4
    known, expected = plan.known(done), plan[done]
    after = plan_batches(Order(len(lengths)), lengths.view(Counted), seed=0, tokens_per_batch=120)
    assert known is not None
    after.know(known)
    assert next(after.walk(done)) == expected
    assert (len(after), looked_up <= 3 * epoch_cut.READ_AHEAD) == (len(plan), True)


def test_threads_that_ask_for_micro_batches_in_turn_get_their_own() -> None:
    class Slow(np.ndarray):
        def __getitem__(self, key):  # type: ignore[no-untyped-def]
            time.sleep(1e-4)
            return np.asarray(self)[key]

    lengths = np.random.default_rng(0).integers(1, 60, 200).view(Slow)
    plan = plan_batches(Order(len(lengths)), lengths, seed=0, tokens_per_batch=120)
    batches = list(plan)
    with ThreadPoolExecutor(4) as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch_cut, "READ_AHEAD", 5)
        assert list(pool.map(plan.__getitem__, range(len(plan)))) == batches


def test_what_another_plan_knows_is_refused() -> None:
    lengths = np.arange(1, 40)
    known = plan_batches(Order(39), lengths, seed=0, tokens_per_batch=50).known(2)
    assert known is not None
    with pytest.raises(CacheMismatchError, match="other batches"):
        plan_batches(Order(39), lengths, seed=1, tokens_per_batch=50).know(known)
    assert plan_batches(Order(39), lengths, seed=0, batch_size=4).known(2) is None
