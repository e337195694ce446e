"""Students with an encoder: the same numbers as transformers' own forward, and whole runs of every loss."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluating import evaluated
from ranks import run_ranks
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForConditionalGeneration, T5Config

from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.readers.reading import CachedExample
from kd.cache_builder.store.targets import band_edges
from kd.common.errors import CacheMismatchError, DataError
from kd.common.progress import final
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.pair_rows import tokenize_pair
from kd.data.tokenizing.text_tokens import TextTokens
from kd.evaluation.measures.agreement import evaluate_agreement
from kd.models.loading import load_model, random_model
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import load_tokenizer
from kd.student_trainer.batches.collate import Collator
from kd.student_trainer.batches.pieces import shared_pieces
from kd.student_trainer.batches.student_text import StudentText
from kd.student_trainer.head import attach_loss
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.model_card import write_card
from kd.student_trainer.run_folder import read_steps
from kd.student_trainer.training import train

V = 180
"""Entries of the teacher's tokenizer."""


def t5(vocab: int) -> Any:
    config = T5Config(
        vocab_size=vocab,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    return random_model(config, torch.float32)


def tied_t5(vocab: int) -> Any:
    """The first T5's layout: the decoder's output is scaled before the output layer."""
    return random_model(
        T5Config(
            vocab_size=vocab,
            d_model=24,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=3,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        ),
        torch.float32,
    )


def bart(vocab: int) -> Any:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=vocab,
            d_model=24,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            decoder_start_token_id=0,
            forced_eos_token_id=None,
        )
    )


LAYOUTS: dict[str, Callable[[int], Any]] = {"t5": t5, "tied_t5": tied_t5, "bart": bart}


@pytest.fixture(scope="session")
def seq2seq_dir(tmp_path_factory: pytest.TempPathFactory, t5_dir: Path, tokenizer_dir: Path) -> Callable[..., Path]:
    """`seq2seq_dir(layout, own=…)`: a small random student; the teacher's tokenizer, or a byte-level one of its own."""
    made: dict[tuple[str, bool], Path] = {}

    def make(layout: str = "t5", *, own: bool = False) -> Path:
        if (layout, own) not in made:
            folder = tmp_path_factory.mktemp("seq2seq")
            with torch.random.fork_rng():
                torch.manual_seed(1)
                LAYOUTS[layout](400 if own else 320).save_pretrained(folder)
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copy((tokenizer_dir if own else t5_dir) / name, folder / name)
            made[layout, own] = folder
        return made[layout, own]

    return make


@pytest.fixture(scope="session")
def examples(t5_exact_cache: Path) -> list[CachedExample]:
    reader = CacheReader(t5_exact_cache)
    return reader.read(range(len(reader)))


def sums(model: Any, examples: list[CachedExample], collator: Collator) -> torch.Tensor:
    """`[3]` sums of loss, kd and ce, by the forward that training uses."""
    batch = collator(examples)
    batch.pop("units", None)
    outputs = model(**batch)
    return torch.stack([outputs["loss"], outputs["kd"], outputs["ce"]])


def attached(folder: Path, objective: Objective, *, wide: bool = True, vocabulary: int = V) -> Any:
    """A model with the loss in its forward; in float64 where sums in another order are compared."""
    model = load_model(ModelRequest(str(folder), device="cpu"))
    attach_loss(model.double() if wide else model, objective, vocabulary, chunk=16)
    return model


# The right numbers


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "jsd"])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(run, t5_exact_cache, t5_dir, loss: str) -> None:
    finished = run(cache=str(t5_exact_cache), student=str(t5_dir), loss=loss, max_steps=1)
    assert abs(finished.records[0].kd) < 1e-6  # rounding of two float32 forward passes
    assert finished.records[0].ce > 0.5


@pytest.mark.parametrize("shift", [-1, 1])
def test_one_row_off_the_teacher_is_far_from_its_own_targets(t5_dir, examples, shift: int) -> None:
    """The canary is alive: a decoder that starts one token early or late does not look like rounding."""
    model, collator = attached(t5_dir, Objective()), Collator(Objective(), start_ids=(0,))
    batch = collator(examples)
    wrong = batch | {"positions": (batch["positions"] + shift).clamp(0, batch["decoder_input_ids"].numel() - 1)}
    assert model(**batch)["kd"] / len(batch["gold_ids"]) < 1e-6
    assert model(**wrong)["kd"] / len(batch["gold_ids"]) > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_transformers_own_forward(seq2seq_dir, examples, layout: str) -> None:
    folder, objective = seq2seq_dir(layout), Objective("ce", "none", 0.0, 1.0)
    ours = attached(folder, objective, vocabulary=320)
    total = sums(ours, examples, Collator(objective, start_ids=(0,)))[0]
    total.backward()
    twin = load_model(ModelRequest(str(folder), device="cpu")).double()
    expected = torch.zeros((), dtype=torch.float64)
    for e in examples:
        labels = torch.from_numpy(e.targets.gold_ids.astype(np.int64))[None]
        prompt = torch.from_numpy(e.context_ids.astype(np.int64))[None]
        expected = expected + twin(input_ids=prompt, labels=labels).loss * labels.shape[1]
    expected.backward()
    # T5's norms compute in float32 whatever the model's dtype
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    for (name, mine), theirs in zip(ours.named_parameters(), twin.parameters(), strict=True):
        assert mine.grad is not None, name  # encoder and decoder: DDP waits for all of them
        assert (mine.grad - theirs.grad).abs().max() <= 1e-5 * theirs.grad.abs().max() + 1e-8, name


@pytest.mark.parametrize("loss", ["kl", "ce", "uld", "hybrid", "alm"])
def test_a_batch_costs_what_its_examples_cost_one_by_one(seq2seq_dir, t5_exact_cache, examples, loss: str) -> None:
    objective = {"kl": Objective(), "ce": Objective("ce", "none", 0.0, 1.0)}.get(loss)
    text = pieces = None
    if objective is None:
        edges = tuple(band_edges(V, V, 1))  # every rank was kept
        objective = Objective(loss, "none" if loss == "alm" else "bands", 0.5, settings=GroupSettings(edges=edges))
        tokenizer = load_tokenizer(str(seq2seq_dir(own=True)))
        text = StudentText(CacheReader(t5_exact_cache), tokenizer, window=None, encoder=True)
        pieces = shared_pieces(CacheReader(t5_exact_cache), tokenizer) if loss == "hybrid" else None
    collator = Collator(objective, text, pieces=pieces, start_ids=(0,))
    model = attached(seq2seq_dir(own=text is not None), objective, vocabulary=V if text is None else 400)
    together = sums(model, examples, collator)
    alone = torch.stack([sums(model, [e], collator) for e in examples]).sum(dim=0)
    # norms compute in float32, and so do targets
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-6)
    assert together[0] > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_stands_in_the_padding_does_not_matter(seq2seq_dir, examples, layout: str) -> None:
    model, batch = attached(seq2seq_dir(layout), Objective()), Collator(Objective(), start_ids=(0,))(examples)
    expected = model(**batch)["loss"]
    rows = torch.zeros(batch["decoder_input_ids"].numel(), dtype=torch.bool)
    rows[batch["positions"]] = True
    rows = rows.view_as(batch["decoder_input_ids"])
    holes = ~rows & (rows.cumsum(dim=1) > 0)
    assert holes.any()
    assert (batch["attention_mask"] == 0).any()
    other = batch | {
        "input_ids": torch.where(batch["attention_mask"] > 0, batch["input_ids"], 7),
        "decoder_input_ids": torch.where(holes, 9, batch["decoder_input_ids"]),
    }
    assert float(model(**other)["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-12)


# The student's own tokens


def test_another_tokenizer_reads_what_an_encoder_teacher_of_that_tokenizer_would(t5_cache, tokenizer) -> None:
    reader = CacheReader(t5_cache)
    text = StudentText(reader, tokenizer, window=None, encoder=True)
    for cached in reader.read(range(len(reader))):
        expected = tokenize_pair(
            Example(cached.id, cached.target, cached.prompt), TextTokens(tokenizer), BlockConfig(encoder=True)
        )
        mine = text[cached.index]
        assert mine.context_ids.tolist() == expected.context_ids.tolist()
        assert mine.target_ids.tolist() == expected.target_ids.tolist()
        assert mine.context_ids[-1] == mine.target_ids[-1] == tokenizer.eos_token_id


def test_with_the_teacher_s_tokenizer_the_cached_tokens_are_read(t5_cache, t5_dir) -> None:
    reader = CacheReader(t5_cache)
    text = StudentText(reader, load_tokenizer(str(t5_dir)), window=None, encoder=True)
    for cached in reader.read(range(len(reader))):
        assert text[cached.index].context_ids.tolist() == cached.context_ids.tolist()
        assert text[cached.index].input_ids.tolist() == cached.input_ids.tolist()


def test_prompt_and_target_have_limits_of_their_own(t5_cache, tokenizer) -> None:
    reader = CacheReader(t5_cache)
    whole = StudentText(reader, tokenizer, window=None, encoder=True)
    cut = StudentText(reader, tokenizer, window=20, encoder=True, target_len=6)
    longer = 0
    for i in range(len(reader)):
        assert cut[i].context_ids.tolist() == whole[i].context_ids[-20:].tolist()
        shorter = whole[i].target_ids[: len(cut[i].target_ids)]
        assert cut[i].target_ids.tolist() == shorter.tolist()
        assert len(cut[i].target_ids) <= 6
        longer += len(whole[i].context_ids) > 20 or len(whole[i].target_ids) > 6
    assert cut.truncated == longer > 0


def test_a_target_cut_by_target_len_trains_a_causal_student_too(run, t5_cache) -> None:
    finished = run(cache=str(t5_cache), loss="uld", target_len=5, batch_size=18, max_steps=1)
    assert finished.result.truncated > 0
    assert 0 < finished.records[0].tokens <= 5 * 18


# Whole runs


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "jsd", "ce", "uld", "hybrid", "alm"])
def test_every_loss_trains_a_student_with_an_encoder(run, t5_cache, seq2seq_dir, loss: str) -> None:
    alpha = 1.0 if loss == "alm" else None  # a random teacher finds its text improbable: the two parts disagree
    finished = run(
        cache=str(t5_cache), student=str(seq2seq_dir()), loss=loss, alpha=alpha, max_steps=20, lr=1e-2, batch_size=18
    )
    assert finished.records[-1].loss < 0.9 * finished.records[0].loss
    assert finished.result.aligned_share == (1.0 if loss in ("uld", "hybrid", "alm") else None)


@pytest.mark.parametrize("loss", ["uld", "hybrid", "alm", "ce"])
def test_losses_over_text_train_one_with_another_tokenizer(run, t5_cache, seq2seq_dir, loss: str) -> None:
    finished = run(cache=str(t5_cache), student=str(seq2seq_dir(own=True)), loss=loss, max_steps=40, lr=1e-2)
    assert sum(r.loss for r in finished.records[-5:]) < 0.9 * sum(r.loss for r in finished.records[:5])
    assert (finished.result.aligned_share or 1.0) > 0.9


def test_a_bart_trains_within_its_positions(run, t5_cache, seq2seq_dir) -> None:
    student = str(seq2seq_dir("bart"))
    records = run("kl", cache=str(t5_cache), student=student, loss="kl", max_steps=20, lr=1e-2).records
    assert records[-1].loss < 0.9 * records[0].loss
    with pytest.raises(DataError, match="longer than the student's positions") as caught:
        run("long", cache=str(t5_cache), student=student, loss="uld", target_len=65)
    assert caught.value.details["found"] == "--target-len 65"


def test_a_prompt_and_answer_cache_of_a_causal_teacher_serves_losses_over_text(run, pairs_cache, seq2seq_dir) -> None:
    student = str(seq2seq_dir(own=True))  # the causal teacher's tokenizer
    for loss in ("ce", "alm"):
        records = run(loss, cache=str(pairs_cache), student=student, loss=loss, max_steps=20, lr=1e-2).records
        assert records[-1].loss < 0.9 * records[0].loss


def test_a_token_budget_counts_both_sides_with_their_padding(run, t5_cache, seq2seq_dir) -> None:
    finished = run(
        cache=str(t5_cache),
        student=str(seq2seq_dir()),
        loss="kl",
        max_steps=None,
        batch_size=None,
        tokens_per_batch=120,
    )
    reader = CacheReader(t5_cache)
    tokens, rows = reader.lengths()
    expected = 0
    batch: list[tuple[int, int]] = []
    for i in reader.epoch_order(0, 0):
        size = (int(tokens[i] - rows[i]), int(rows[i]))
        wide = [*batch, size]
        if batch and len(wide) * (max(c for c, _ in wide) + max(n for _, n in wide)) > 120:
            expected, batch = expected + 1, []
        batch.append(size)
    assert finished.result.steps == expected + 1
    assert 0.0 < finished.result.padding_share < 1.0


def test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(run, t5_cache, seq2seq_dir) -> None:
    settings = {"cache": str(t5_cache), "student": str(seq2seq_dir()), "loss": "kl", "max_steps": 7}
    whole = run("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", save_every=3, stop_after=5, **settings)
    resumed = run("stopped", save_every=3, resume=True, **settings)
    assert all(torch.equal(whole.weights[n], resumed.weights[n]) for n in whole.weights)
    assert len(read_steps(resumed.out)) == 7


def test_two_processes_train_what_one_does_with_twice_the_accumulation(run, t5_cache, seq2seq_dir, tmp_path) -> None:
    student, out = str(seq2seq_dir()), tmp_path / "two"
    settings: dict[str, Any] = {
        "cache": str(t5_cache),
        "student": student,
        "max_steps": 3,
        "batch_size": 2,
        "lr": 1e-3,
        "device": "cpu",
    }
    run_ranks(lambda: train(**settings, out=str(out)))
    one = run("one", cache=str(t5_cache), student=student, batch_size=2, accumulate=2, max_steps=3, head_chunk=None)
    two = AutoModelForSeq2SeqLM.from_pretrained(out).state_dict()
    # the same gradients, summed in another order, under Adam
    for name, weight in AutoModelForSeq2SeqLM.from_pretrained(one.out).state_dict().items():
        assert (weight - two[name]).abs().max() < 2e-5, name


# What comes out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_loads_with_the_trained_logits_and_is_evaluated(
    run, t5_cache, seq2seq_dir, story_pairs, layout: str
) -> None:
    finished = run(cache=str(t5_cache), student=str(seq2seq_dir(layout)), loss="kl", max_steps=5, lr=1e-2, save_every=5)
    models = [AutoModelForSeq2SeqLM.from_pretrained(f).eval() for f in (finished.out, finished.out / "checkpoint-5")]
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        first, second = (m(input_ids=ids, decoder_input_ids=ids).logits for m in models)
    assert torch.equal(first, second)
    card = write_card(finished.out).read_text()
    assert "AutoModelForSeq2SeqLM" in card
    assert "text2text-generation" in card
    report = evaluated(
        str(finished.out),
        ["generation", "agreement"],
        data=str(story_pairs),
        cache=t5_cache,
        device="cpu",
        allow_contaminated=True,
    )
    assert report is not None
    assert 0.0 <= report.tasks["generation"]["exact_match"]["value"] <= 1.0
    # the last step's loss was measured before it, over one batch; the whole cache after it
    assert report.tasks["agreement"]["kl_kept"]["value"] < finished.records[0].kd


def test_agreement_of_the_teacher_with_its_own_cache_is_zero_and_needs_the_same_layout(
    t5_exact_cache, t5_dir, student_dir
) -> None:
    reader = CacheReader(t5_exact_cache)
    own = final(evaluate_agreement(load_model(ModelRequest(str(t5_dir), device="cpu")), reader))
    assert abs(own.kl.value) < 1e-6
    with pytest.raises(CacheMismatchError, match="with an encoder"):
        final(evaluate_agreement(load_model(ModelRequest(str(student_dir), device="cpu")), reader))


def test_lora_adapts_t5_s_queries_and_values_and_merges_them(run, t5_cache, seq2seq_dir) -> None:
    student = seq2seq_dir()
    finished = run(cache=str(t5_cache), student=str(student), loss="kl", lora=4, max_steps=10, lr=2e-2)
    start, merged = (AutoModelForSeq2SeqLM.from_pretrained(f).state_dict() for f in (student, finished.out))
    changed = {name for name in start if not torch.equal(start[name], merged[name])}
    assert merged.keys() == start.keys()
    assert changed == {n for n in start if n.rpartition("Attention.")[2] in ("q.weight", "v.weight")}
    assert len(changed) == 2 * (2 + 2)  # two layers of the encoder, two attentions in one of the decoder
    assert finished.records[-1].loss < finished.records[0].loss


def test_gradient_checkpointing_changes_time_and_not_weights(run, t5_cache, seq2seq_dir) -> None:
    settings = {"cache": str(t5_cache), "student": str(seq2seq_dir()), "loss": "kl"}
    plain, checkpointed = run("a", **settings), run("b", gradient_checkpointing=True, **settings)
    # every layer adds to the gradients of the encoder's output and of the relative positions, in another order here
    assert max(float((plain.weights[n] - checkpointed.weights[n]).abs().max()) for n in plain.weights) < 2e-5


def test_a_run_says_that_its_student_has_an_encoder(run, t5_cache, seq2seq_dir, student_dir) -> None:
    for name, student in (("two", seq2seq_dir()), ("one", student_dir)):
        finished = run(name, cache=str(t5_cache), student=str(student), loss="uld", max_steps=1)
        assert json.loads((finished.out / "run.json").read_text())["encoder_decoder"] is (name == "two")


# What is refused


@pytest.mark.parametrize("loss", ["kl", "ce", "uld"])
def test_a_cache_without_prompts_is_refused(run, kl_cache, cache, seq2seq_dir, loss: str) -> None:
    with pytest.raises(DataError, match="needs prompts for its encoder") as caught:
        run(cache=str(cache), student=str(seq2seq_dir(own=True)), loss=loss)
    assert caught.value.details["found"] == "a cache of documents"


@pytest.mark.parametrize("setting", [{"prompt_loss": True}, {"separator": " "}], ids=lambda s: next(iter(s)))
@pytest.mark.parametrize("loss", ["ce", "uld"])
def test_what_an_encoder_has_no_use_for_is_refused(run, t5_cache, seq2seq_dir, loss: str, setting) -> None:
    with pytest.raises(DataError, match="an encoder reads the prompt by itself") as caught:
        run(cache=str(t5_cache), student=str(seq2seq_dir()), loss=loss, **setting)
    assert caught.value.details["found"] == "--" + next(iter(setting)).replace("_", "-")


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "jsd"])
def test_a_loss_by_row_refuses_a_causal_teacher_s_rows(run, pairs_cache, seq2seq_dir, loss: str) -> None:
    with pytest.raises(CacheMismatchError, match="without an encoder"):
        run(cache=str(pairs_cache), student=str(seq2seq_dir(own=True)), loss=loss)


def test_a_loss_by_row_refuses_another_tokenizer_and_a_limit_on_the_target(run, t5_cache, seq2seq_dir) -> None:
    with pytest.raises(CacheMismatchError, match="not the teacher's"):
        run(cache=str(t5_cache), student=str(seq2seq_dir(own=True)), loss="kl")
    with pytest.raises(DataError, match="reads the cached tokens as they are") as caught:
        run(cache=str(t5_cache), student=str(seq2seq_dir()), loss="kl", target_len=5)
    assert caught.value.details["found"] == "--target-len"
