"""The plan of a run covers what it should in the reader's order; collated positions point at the right tokens."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from kd.cache_builder import store
from kd.cache_builder.reader import CacheReader
from kd.data.errors import CacheDamageError
from kd.student_trainer.losses import Objective
from kd.student_trainer.stream import (
    PREFETCHED_BATCHES,
    CachedExamples,
    Collator,
    PlannedBatches,
    Prefetcher,
    loss_targets,
    plan_batches,
    touch_shards,
)


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


def flat(batches) -> list[int]:
    return [example for batch in batches for example in batch]


# Plans


@given(lengths=corpora(), cut=CUTS, seed=st.integers(0, 9), epochs=st.integers(1, 3))
def test_an_epoch_holds_every_example_once_in_the_reader_s_order(lengths, cut, seed, epochs) -> None:
    order = Order(len(lengths))
    plan = plan_batches(order, lengths, seed=seed, epochs=epochs, **cut)
    for epoch in range(epochs):
        mine = flat(batch for batch, e in zip(plan.batches, plan.epochs, strict=True) if e == epoch)
        assert mine == order.epoch_order(seed, epoch).tolist()
    assert list(plan.epochs) == sorted(plan.epochs)
    assert set(plan.epochs) == set(range(epochs))


@given(lengths=corpora(), first=CUTS, second=CUTS)
def test_neither_batch_size_nor_token_budget_changes_the_order(lengths, first, second) -> None:
    a, b = (plan_batches(Order(len(lengths)), lengths, seed=0, epochs=2, **cut) for cut in (first, second))
    assert flat(a.batches) == flat(b.batches)


@given(lengths=corpora(), budget=st.integers(1, 200))
def test_a_batch_with_its_padding_fits_the_token_budget_and_could_not_take_one_more(lengths, budget) -> None:
    plan = plan_batches(Order(len(lengths)), lengths, seed=0, tokens_per_batch=budget)

    def padded(batch: tuple[int, ...]) -> int:
        return len(batch) * int(lengths[list(batch)].max())

    for batch in plan.batches:
        assert padded(batch) <= budget or len(batch) == 1  # an example larger than the budget goes alone
    for batch, following in zip(plan.batches, plan.batches[1:], strict=False):
        assert padded((*batch, following[0])) > budget


@given(lengths=corpora(), size=st.integers(1, 12))
def test_a_batch_holds_the_number_of_examples_asked_for_and_the_last_what_is_left(lengths, size) -> None:
    plan = plan_batches(Order(len(lengths)), lengths, seed=0, batch_size=size)
    whole, rest = divmod(len(lengths), size)
    assert [len(batch) for batch in plan.batches] == [size] * whole + ([rest] if rest else [])


@given(lengths=corpora(), cut=CUTS, multiple=st.integers(1, 8), epochs=st.floats(0.01, 3.0))
def test_every_step_is_whole(lengths, cut, multiple, epochs) -> None:
    free = plan_batches(Order(len(lengths)), lengths, seed=0, epochs=epochs, **cut)
    plan = plan_batches(Order(len(lengths)), lengths, seed=0, epochs=epochs, multiple_of=multiple, **cut)
    assert len(plan) % multiple == 0
    assert len(plan) == len(plan.epochs) > 0
    shared = min(len(plan), len(free))
    assert plan.batches[:shared] == free.batches[:shared]
    if len(free) >= multiple:
        assert 0 <= len(free) - len(plan) < multiple  # rounded down
    else:
        assert plan.batches == tuple(free.batches[i % len(free)] for i in range(multiple))  # repeated to fill one step


@given(lengths=corpora(), cut=CUTS, count=st.integers(1, 40))
def test_a_count_of_batches_is_met_exactly_and_continues_into_further_epochs(lengths, cut, count) -> None:
    plan = plan_batches(Order(len(lengths)), lengths, seed=3, count=count, **cut)
    assert len(plan) == count
    endless = plan_batches(Order(len(lengths)), lengths, seed=3, epochs=count, **cut)
    assert plan.batches == endless.batches[:count]
    assert plan.epochs == endless.epochs[:count]


@pytest.mark.parametrize(("epochs", "examples"), [(0.5, 5), (1.0, 10), (1.5, 15), (2.3, 23), (0.001, 1)])
def test_a_part_of_an_epoch_is_that_part_of_its_order(epochs: float, examples: int) -> None:
    order = Order(10)
    plan = plan_batches(order, np.full(10, 4), seed=0, epochs=epochs, batch_size=1)
    whole = [e for epoch in range(3) for e in order.epoch_order(0, epoch).tolist()]
    assert flat(plan.batches) == whole[:examples]


def test_a_plan_of_a_cache_follows_the_cache_s_own_order(kl_reader: CacheReader) -> None:
    tokens, _ = kl_reader.lengths()
    plan = plan_batches(kl_reader, tokens, seed=7, epochs=2, tokens_per_batch=100)
    expected = [*kl_reader.epoch_order(7, 0).tolist(), *kl_reader.epoch_order(7, 1).tolist()]
    assert flat(plan.batches) == expected
    assert expected[: len(tokens)] != expected[len(tokens) :]  # epochs differ
    assert sorted(expected[: len(tokens)]) == list(range(len(tokens)))


def test_a_data_loader_hands_out_the_plan_as_it_stands(kl_reader: CacheReader) -> None:
    tokens, _ = kl_reader.lengths()
    plan = plan_batches(kl_reader, tokens, seed=7, batch_size=3)
    loader = DataLoader(
        CachedExamples(kl_reader), batch_sampler=PlannedBatches(plan), collate_fn=lambda batch: [e.index for e in batch]
    )
    assert [tuple(indices) for indices in loader] == list(plan.batches)
    assert len(loader) == len(plan)


# Collated batches


def everything(reader: CacheReader, objective: Objective) -> tuple[list, dict[str, torch.Tensor]]:
    examples = reader.read(range(len(reader)))
    return examples, Collator(objective)(examples)


def test_the_token_after_each_position_is_the_gold_token(pairs_reader: CacheReader) -> None:
    examples, batch = everything(pairs_reader, Objective())
    assert len({len(e.input_ids) for e in examples}) > 3  # there is padding to go wrong
    assert len({len(e.context_ids) for e in examples}) > 3  # and prompts to skip
    following = batch["input_ids"].flatten()[batch["positions"] + 1]
    assert torch.equal(following, batch["gold_ids"])
    assert len(batch["gold_ids"]) == pairs_reader.manifest.rows


def test_positions_see_only_their_own_example_s_tokens(pairs_reader: CacheReader) -> None:
    examples, batch = everything(pairs_reader, Objective())
    rows, columns = np.divmod(batch["positions"].numpy(), batch["input_ids"].shape[1])
    start = 0
    for number, example in enumerate(examples):
        own = slice(start, start + len(example.targets))
        assert (rows[own] == number).all()
        first = len(example.context_ids) - 1
        assert columns[own].tolist() == list(range(first, first + len(example.targets)))
        start = own.stop
    assert start == len(rows)


def test_padding_follows_the_tokens_and_is_masked(pairs_reader: CacheReader) -> None:
    examples, batch = everything(pairs_reader, Objective())
    for row, mask, example in zip(batch["input_ids"], batch["attention_mask"], examples, strict=True):
        n = len(example.input_ids)
        assert row[:n].tolist() == example.input_ids.tolist()
        assert mask.tolist() == [1] * n + [0] * (len(row) - n)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("tail", ["ghost", "renorm"])
def test_head_and_tail_are_those_of_the_objective_s_temperature(kl_reader, tail: str, temperature: float) -> None:
    examples, batch = everything(kl_reader, Objective("kl", tail, temperature=temperature))
    expected = np.concatenate([e.targets.logprobs_at(temperature) for e in examples])
    assert np.allclose(batch["logprobs"].numpy(), expected, rtol=1e-6, atol=0)  # stored as float32
    assert torch.equal(batch["token_ids"], torch.from_numpy(np.concatenate([e.targets.token_ids for e in examples])))
    whole = batch["logprobs"].double().exp().sum(dim=1) + batch["tail_mass"].double()
    # eight probabilities and a tail, each rounded to float32's 6e-8
    assert (whole - 1).abs().max() < 1e-6
    assert batch["tail_mass"].min() >= 0


@pytest.mark.parametrize("kind", ["ghost", "renorm", "sampled"])
def test_rows_decoded_together_are_those_of_the_examples_one_by_one(cache, kind: str) -> None:
    reader = CacheReader(cache)
    order = [3, 0, len(reader) - 1]
    together, joined = (
        Collator(Objective("kl", kind))(examples) for examples in (reader.read(order), [reader[i] for i in order])
    )
    assert together.keys() == joined.keys()
    for name, value in together.items():
        assert torch.equal(value, joined[name]), name


def test_a_batch_holds_what_its_objective_needs_and_nothing_else(cache) -> None:
    always = {"input_ids", "attention_mask", "positions", "gold_ids"}
    head, draws = {"token_ids", "logprobs", "tail_mass"}, {"sample_ids", "sample_counts"}
    reader = CacheReader(cache)
    for objective, extra in (
        (Objective("ce", "none", 0.0), set()),
        (Objective("kl", "ghost"), head),
        (Objective("kl", "renorm"), head),
        (Objective("kl", "sampled"), draws),
    ):
        batch = Collator(objective)(reader.read([0, 1]))
        assert set(batch) == always | extra
        assert {len(batch[name]) for name in extra | {"gold_ids", "positions"}} == {len(batch["gold_ids"])}
        targets = loss_targets(batch)
        assert (targets.logprobs is not None) == (extra == head)
        assert (targets.sample_ids is not None) == (extra == draws)


def test_a_smaller_k_moves_the_rest_of_the_head_into_the_tail(kl_cache) -> None:
    whole, small = (everything(CacheReader(kl_cache, top_k=k), Objective())[1] for k in (None, 3))
    assert torch.equal(small["token_ids"], whole["token_ids"][:, :3])
    assert torch.equal(small["logprobs"], whole["logprobs"][:, :3])
    moved = whole["tail_mass"].double() + whole["logprobs"][:, 3:].double().exp().sum(dim=1)
    assert torch.allclose(small["tail_mass"].double(), moved, rtol=0, atol=1e-6)  # float32's 6e-8, a few times


# Reading ahead


def test_touched_shards_are_in_memory_when_they_are_read(kl_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, loads = CacheReader(kl_cache), list[int]()
    read_shard: Callable = store.read_shard

    def counted(root, manifest, index, names=None):
        loads.append(index)
        return read_shard(root, manifest, index, names)

    monkeypatch.setattr(store, "read_shard", counted)
    order = reader.epoch_order(0, 0)
    for thread in touch_shards(reader, order.tolist()):
        thread.join()
    assert sorted(loads) == list(range(len(reader.manifest.shards)))  # fewer than a window holds
    reader.read(order.tolist())
    assert len(loads) == len(reader.manifest.shards)


def test_a_shard_that_cannot_be_touched_is_told_when_it_is_read(
    kl_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = CacheReader(kl_cache)

    def damaged(*_: object, **__: object) -> None:
        raise CacheDamageError("a file of the cache was changed")

    monkeypatch.setattr(store, "read_shard", damaged)
    for thread in touch_shards(reader, range(len(reader))):
        thread.join()
    with pytest.raises(CacheDamageError):
        reader.read([0])


def test_a_prefetcher_yields_the_source_s_items_in_order() -> None:
    prefetcher = Prefetcher(iter(range(50)))
    assert list(prefetcher) == list(range(50))
    with pytest.raises(StopIteration):  # asked again, the same answer
        next(prefetcher)


def test_a_prefetcher_reads_ahead_but_not_without_bound() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for i in range(1000):
            taken.append(i)
            yield i

    prefetcher = Prefetcher(source())
    deadline = time.monotonic() + 5
    while len(taken) < PREFETCHED_BATCHES + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(taken) == PREFETCHED_BATCHES + 1  # a full queue, and one in hand
    prefetcher.close()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_of_the_source_surfaces_after_the_items_before_it(kind: type[BaseException]) -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise kind("the disk is gone")

    prefetcher = Prefetcher(source())
    assert [next(prefetcher), next(prefetcher)] == [1, 2]
    for _ in range(2):
        with pytest.raises(kind, match="the disk is gone"):
            next(prefetcher)


def test_closing_a_prefetcher_stops_its_thread_while_items_are_left() -> None:
    prefetcher = Prefetcher(iter(range(10**9)))
    next(prefetcher)
    prefetcher.close()
    assert not [t for t in threading.enumerate() if t is prefetcher._thread]


def test_time_spent_waiting_for_the_source_is_counted() -> None:
    def slow() -> Iterator[int]:
        time.sleep(0.1)
        yield 1

    prefetcher = Prefetcher(slow())
    next(prefetcher)
    assert 0.05 < prefetcher.waited < 5.0  # 0.1 s, on a machine that may be busy
