"""Packed runs learn what unpacked ones do: the same losses and gradients, in less padding."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model, with_kinds
from transformers import BloomConfig, BloomForCausalLM

from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.readers.reading import CachedExample
from kd.cache_builder.store.targets import band_edges
from kd.common.errors import CacheMismatchError, DataError
from kd.models.batching.packing import Size, pack_sequences
from kd.models.tokenizer import load_tokenizer
from kd.student_trainer.batches.batch_plan import plan_batches
from kd.student_trainer.batches.collate import Collator
from kd.student_trainer.batches.student_text import StudentText
from kd.student_trainer.head import attach_loss
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.run_folder import read_steps

V = 400
LAYOUTS = ("gpt2", "gpt_neox", "llama", "gpt_neo", "t5")
EVERY = with_kinds(LAYOUTS)
OBJECTIVES = {
    "kl": Objective(),
    "ce": Objective("ce", "none", 0.0, 1.0),
    "uld": Objective("uld", "bands", 0.5, settings=GroupSettings(edges=tuple(band_edges(V, V, 1)))),
}


@pytest.fixture(scope="module")
def every_rank(tmp_path_factory: pytest.TempPathFactory, build_request, run_build, pairs_file: Path) -> CacheReader:
    """All probabilities of the tiny GPT-2 over pairs: served to every loss."""
    out = tmp_path_factory.mktemp("packed") / "pairs"
    run_build(
        build_request(
            out, text=pairs_file, seq_len=64, profile="full", top_k=V, tail_bands=1, samples=4, logprob_codec="float32"
        )
    )
    return CacheReader(out)


def model_of(name: str, kind: str, objective: Objective) -> Any:
    """A tiny model with the loss in its forward."""
    model = tiny_model(name, kind, V, window=8)
    attach_loss(model, objective, V, chunk=32)
    return model


def collator_of(reader: CacheReader, name: str, loss: str, tokenizer_dir: Path, capacity: Size | None) -> Collator:
    encoder = name == "t5"
    text = None
    if loss == "uld" or encoder:
        text = StudentText(reader, load_tokenizer(str(tokenizer_dir)), window=None, encoder=encoder)
    return Collator(OBJECTIVES[loss], text, start_ids=(0,) if encoder else (), capacity=capacity)


def gradients(model: Any, collator: Collator, examples: list[CachedExample]) -> dict[str, torch.Tensor]:
    """Of every parameter, and the loss itself."""
    model.zero_grad()
    batch = collator(examples)
    batch.pop("units", None)
    loss = model(**batch)["loss"]
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters()}


# The law


# T5 reads prompts with an encoder: this teacher's rows are not laid out as its own, and only losses over text serve it
@pytest.mark.parametrize(
    ("name", "kind", "loss"), [(*c, loss) for c in EVERY for loss in OBJECTIVES if (c[0], loss) != ("t5", "kl")]
)
def test_packed_losses_and_gradients_are_the_unpacked_ones(
    every_rank, tokenizer_dir, name: str, kind: str, loss: str
) -> None:
    examples = every_rank.read(range(len(every_rank)))
    model = model_of(name, kind, OBJECTIVES[loss])
    room = (64, 64) if name == "t5" else (64,)
    plain, packed = (collator_of(every_rank, name, loss, tokenizer_dir, c) for c in (None, room))
    expected, found = gradients(model, plain, examples), gradients(model, packed, examples)
    shapes = [c(examples)["input_ids"].shape for c in (plain, packed)]
    assert shapes[1][0] < shapes[0][0] / 2  # really packed
    assert shapes[1].numel() < shapes[0].numel()
    for parameter, value in expected.items():
        # float64, but norms, rotary positions, GPT-Neo's scores and the targets are float32 whatever the model's dtype;
        # a gradient that is zero (the bias of keys) is rounding on either side
        assert (found[parameter] - value).abs().max() <= 1e-5 * value.abs().max() + 1e-9, parameter


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_example_s_result_does_not_depend_on_its_neighbours(every_rank, tokenizer_dir, name: str) -> None:
    loss = "ce"
    model = model_of(name, "eager", OBJECTIVES[loss])
    collator = collator_of(every_rank, name, loss, tokenizer_dir, (64, 64) if name == "t5" else (64,))
    examples = every_rank.read([2, 4, 1])

    def of_the_second(batch: dict[str, torch.Tensor]) -> float:
        rows = slice(len(first), len(first) + len(second))
        kept = {"positions": batch["positions"][rows], "gold_ids": batch["gold_ids"][rows]}
        return float(model(**batch | kept)["loss"].detach())

    batch = collator(examples)
    first, second = (collator([e])["gold_ids"] for e in examples[:2])
    assert len(batch["input_ids"]) == 1
    other = dict(batch)
    for side in ("", "decoder_") if name == "t5" else ("",):
        ids, segments = batch[f"{side}input_ids"], batch[f"{side}segment_ids"]
        other[f"{side}input_ids"] = torch.where(segments == 2, ids, (ids + 17) % V)
        assert not torch.equal(other[f"{side}input_ids"], ids)
    assert of_the_second(other) == of_the_second(batch)
    everything = (float(model(**b)["loss"].detach()) for b in (batch, other))
    assert len(set(everything)) == 2  # the neighbours' own results do change


# Plans


class Order:
    """As much of a reader as a plan needs."""

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(self.examples)


SIZES = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 5)), min_size=1, max_size=40)
CUTS = st.one_of(
    st.fixed_dictionaries({"batch_size": st.integers(1, 5)}),
    st.fixed_dictionaries({"tokens_per_batch": st.integers(1, 120)}),
)


@given(sizes=SIZES, sides=st.integers(1, 2), cut=CUTS, seed=st.integers(0, 5))
def test_packing_changes_neither_the_order_nor_what_an_epoch_is(sizes, sides: int, cut, seed: int) -> None:
    lengths, order = np.array(sizes)[:, :sides], Order(len(sizes))
    plan = plan_batches(order, lengths, seed=seed, epochs=2, capacity=(12, 5)[:sides], **cut)
    expected = [e for epoch in range(2) for e in order.epoch_order(seed, epoch).tolist()]
    assert [e for batch in plan for e in batch.examples] == expected


@given(sizes=SIZES, sides=st.integers(1, 2), cut=CUTS)
def test_a_packed_batch_keeps_its_budget_and_could_not_take_one_more(sizes, sides: int, cut) -> None:
    lengths, capacity = np.array(sizes)[:, :sides], (12, 5)[:sides]
    plan = plan_batches(Order(len(sizes)), lengths, seed=0, capacity=capacity, **cut)

    def measured(batch: tuple[int, ...]) -> tuple[int, int]:
        """Sequences, and tokens with their padding, of what the collator will do with it."""
        taken = [tuple(lengths[i].tolist()) for i in batch]
        sequences = pack_sequences(taken, capacity)
        widths = [max(sum(taken[i][side] for i in s) for s in sequences) for side in range(sides)]
        return len(sequences), len(sequences) * sum(widths)

    def fits(batch: tuple[int, ...]) -> bool:
        count, padded = measured(batch)
        return count <= cut["batch_size"] if "batch_size" in cut else padded <= cut["tokens_per_batch"]

    for batch in plan:
        assert fits(batch.examples) or len(batch.examples) == 1  # an example larger than the budget goes alone
        assert (batch.padded, batch.tokens) == (measured(batch.examples)[1], lengths[list(batch.examples)].sum())
    for batch, following in pairwise(plan):
        assert not fits((*batch.examples, following.examples[0]))
    assert plan.padding_share == pytest.approx(1 - sum(b.tokens for b in plan) / sum(b.padded for b in plan))


def test_examples_of_one_length_leave_no_padding() -> None:
    plan = plan_batches(Order(32), np.full(32, 8), seed=0, batch_size=2, capacity=(32,))
    assert plan.padding_share == 0.0
    assert [len(b.examples) for b in plan] == [8] * 4


# Whole runs


@pytest.mark.parametrize("settings", [{"loss": "kl"}, {"loss": "ce"}], ids=lambda s: s["loss"])
def test_a_packed_step_over_the_whole_cache_is_the_unpacked_one(run, pairs_cache, settings) -> None:
    rows = {"cache": str(pairs_cache), "max_steps": 3, "batch_size": 11, **settings}
    plain, packed = run("plain", **rows), run("packed", packing=True, **rows)
    for a, b in zip(plain.records, packed.records, strict=True):
        assert (a.tokens, a.epoch) == (b.tokens, b.epoch)
        assert (a.loss, a.ce, a.grad_norm) == pytest.approx((b.loss, b.ce, b.grad_norm), rel=1e-4)
    # the same gradients, summed in another order, under Adam
    assert max(float((plain.weights[n] - packed.weights[n]).abs().max()) for n in plain.weights) < 2e-5
    assert packed.result.padding_share < plain.result.padding_share


def test_an_interrupted_packed_run_ends_with_the_bytes_of_an_uninterrupted_one(run, pairs_cache) -> None:
    settings = {"cache": str(pairs_cache), "max_steps": 9, "batch_size": 1, "packing": True, "seq_len": 48}
    whole = run("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", save_every=4, stop_after=6, **settings)
    resumed = run("stopped", save_every=4, resume=True, **settings)
    assert all(torch.equal(whole.weights[n], resumed.weights[n]) for n in whole.weights)
    assert [r.step for r in read_steps(resumed.out)] == list(range(1, 10))
    with pytest.raises(KeyboardInterrupt):
        run("other", stop_after=3, **settings)
    with pytest.raises(CacheMismatchError, match="other settings"):
        run("other", resume=True, **settings | {"packing": False, "seq_len": None})


@pytest.mark.parametrize(
    ("more", "rounding"),
    [({"lora": 2}, 1e-4), ({"gradient_checkpointing": True}, 1e-4), ({"precision": "bf16"}, 2e-2)],  # of 8 bits
    ids=str,
)
def test_packing_goes_with_the_other_settings(run, pairs_cache, more: dict[str, Any], rounding: float) -> None:
    rows = {"cache": str(pairs_cache), "max_steps": 4, "batch_size": 11, "lr": 1e-2, **more}
    plain, packed = run("plain", **rows).records, run("packed", packing=True, **rows).records
    assert [r.loss for r in packed] == pytest.approx([r.loss for r in plain], rel=rounding)
    assert packed[-1].loss < packed[0].loss


@pytest.mark.parametrize("loss", ["kl", "alm"])  # smooth: the gradient of a distance of zero is a sign of rounding
def test_an_encoder_decoder_packs_both_sides(run, t5_cache, t5_dir, loss: str) -> None:
    settings = {"cache": str(t5_cache), "student": str(t5_dir), "loss": loss, "alpha": 0.5, "max_steps": 1}
    plain = run("plain", batch_size=18, **settings)
    packed = run("packed", batch_size=18, packing=True, seq_len=64, **settings)
    assert packed.result.padding_share < plain.result.padding_share
    assert packed.records[0].loss == pytest.approx(plain.records[0].loss, rel=1e-5)
    assert packed.records[0].grad_norm == pytest.approx(plain.records[0].grad_norm, rel=1e-4)


# What is refused


def test_a_student_whose_positions_cannot_be_passed_is_refused_by_its_class(
    run, pairs_cache, tokenizer_dir, tmp_path: Path
) -> None:
    BloomForCausalLM(BloomConfig(vocab_size=V, hidden_size=32, n_layer=1, n_head=2)).save_pretrained(tmp_path / "b")
    shutil.copytree(tokenizer_dir, tmp_path / "b", dirs_exist_ok=True)
    run("plain", cache=str(pairs_cache), student=str(tmp_path / "b"), max_steps=1)
    with pytest.raises(DataError, match="need positions of their own") as caught:
        run("packed", cache=str(pairs_cache), student=str(tmp_path / "b"), packing=True)
    assert caught.value.details["where"] == "BloomForCausalLM"


def test_sequences_shorter_than_an_example_or_longer_than_the_student_are_refused(run, pairs_cache) -> None:
    longest = int(CacheReader(pairs_cache).lengths()[0].max())
    with pytest.raises(DataError, match="longer than a packed sequence") as caught:
        run("short", cache=str(pairs_cache), packing=True, seq_len=longest - 1)
    assert caught.value.details["try"] == f"--seq-len {longest}"
    with pytest.raises(DataError, match="longer than the student's positions"):
        run("long", cache=str(pairs_cache), packing=True, seq_len=65)
