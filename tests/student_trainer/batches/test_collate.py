"""Collated positions point at the right tokens, and targets are those of the objective."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd.cache_builder.store.readers.reader import CacheReader
from kd.student_trainer.batches.collate import Collator, loss_targets
from kd.student_trainer.losses.loss_registry import Objective


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
