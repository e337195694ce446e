"""Whole runs of the losses over aligned text: a teacher that is the student, and one that shares nothing with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.targets import band_edges
from kd.common.errors import CacheMismatchError, DataError
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import encode_with_ends, load_tokenizer, token_bytes
from kd.student_trainer.batches.batch_plan import plan_batches
from kd.student_trainer.batches.collate import Collator, loss_targets, teacher_groups
from kd.student_trainer.batches.collators import piece_paths
from kd.student_trainer.batches.pieces import shared_pieces
from kd.student_trainer.batches.student_text import StudentText
from kd.student_trainer.losses.by_group import uld
from kd.student_trainer.losses.loss_registry import LOSSES, Objective
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.losses.loss_targets import need
from kd.student_trainer.prepare import rank_edges

ALIGNED = ("uld", "hybrid", "alm")
EVERY_RANK = {"profile": "full", "top_k": 400, "tail_bands": 1, "samples": 4, "logprob_codec": "float32"}


@pytest.fixture(scope="session")
def own_caches(tmp_path_factory: pytest.TempPathFactory, build_request, run_build, pairs_file: Path) -> dict[str, Path]:
    """Every probability of the tiny GPT-2, over documents and over pairs; and 16 values and 16 bands."""
    folder = tmp_path_factory.mktemp("own")
    run_build(build_request(folder / "documents", **EVERY_RANK))
    run_build(build_request(folder / "pairs", text=pairs_file, seq_len=64, **EVERY_RANK))
    run_build(build_request(folder / "bands", **EVERY_RANK | {"top_k": 16, "tail_bands": 16}))
    return {path.name: path for path in folder.iterdir()}


def values_of_own_cache(
    cache: Path, model_dir: Path, loss: str, *, ranking: str = "exact", shift: int = 0
) -> torch.Tensor:
    """The loss of the teacher against its own cache, per group, by the plain forward pass."""
    reader, tokenizer = CacheReader(cache), load_tokenizer(str(model_dir))
    pieces = shared_pieces(reader, tokenizer)
    edges = tuple(band_edges(reader.config.top_k, 400, reader.config.tail_bands))
    objective = Objective(
        loss,
        "none" if loss == "alm" else "bands",
        1.0,
        settings=GroupSettings(edges=edges, ranking=ranking, overlap=pieces.overlap),
    )
    collator = Collator(
        objective, StudentText(reader, tokenizer, window=64), pieces=pieces if loss == "hybrid" else None
    )
    batch = collator(reader.read(range(len(reader))))
    aligned, total = batch["aligned_bytes"].tolist()
    assert aligned == total > 0
    assert len(batch["group_first"]) == len(batch["gold_ids"])  # token by token
    model = load_model(ModelRequest(str(model_dir), device="cpu"))
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
        kd = objective(logits[batch["positions"] + shift], loss_targets(batch))[1]
    return kd / batch["group_weight"]


# The right numbers


@pytest.mark.parametrize("cache_name", ["documents", "pairs"])
@pytest.mark.parametrize(
    ("loss", "ranking"), [("uld", "exact"), ("uld", "fast"), ("hybrid", "exact"), ("alm", "exact")]
)
def test_a_student_that_is_the_teacher_is_at_zero_in_every_group(
    own_caches, model_dir, loss: str, ranking: str, cache_name: str
) -> None:
    values = values_of_own_cache(own_caches[cache_name], model_dir, loss, ranking=ranking)
    # sums of 400 float32 probabilities of two forward passes; ALM's gold log-probabilities are float16 (relative 5e-4),
    # and enter by their square
    assert values.abs().max() < 1e-5


@pytest.mark.parametrize("loss", ALIGNED)
@pytest.mark.parametrize("shift", [-1, 1])
def test_one_position_off_the_teacher_is_far_from_its_own_cache(own_caches, model_dir, loss: str, shift: int) -> None:
    assert values_of_own_cache(own_caches["pairs"], model_dir, loss, shift=shift).mean() > 0.1


@pytest.mark.parametrize("ranking", ["exact", "fast"])
def test_bands_leave_the_teacher_near_its_own_cache(own_caches, model_dir, ranking: str) -> None:
    values = values_of_own_cache(own_caches["bands"], model_dir, "uld", ranking=ranking)
    # 0.0084: random weights' rows follow no power law, and nothing is left of the loss but what bands do not say
    assert values.mean() < 0.012


@pytest.mark.parametrize("loss", [*ALIGNED, "text-kl"])
def test_the_run_s_first_loss_is_zero_for_the_teacher_itself(run, own_caches, model_dir, loss: str) -> None:
    finished = run(cache=str(own_caches["documents"]), student=str(model_dir), loss=loss, alpha=1.0, max_steps=1)
    assert abs(finished.records[0].kd) < 1e-5
    assert finished.records[0].loss == pytest.approx(finished.records[0].kd, abs=1e-6)
    assert finished.result.aligned_share == 1.0


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_a_group_s_log_probabilities_are_sums_over_the_teacher_s_rows(
    own_caches, model_dir, temperature: float
) -> None:
    example = CacheReader(own_caches["pairs"])[5]
    context, ids = len(example.context_ids), torch.from_numpy(example.input_ids.astype(np.int64))
    with torch.no_grad():
        logits = load_model(ModelRequest(str(model_dir), device="cpu"))(ids[None]).logits[0, context - 1 : -1].double()
    there = {t: (logits / t).log_softmax(dim=1).gather(1, ids[context:, None]).squeeze(1) for t in (1.0, temperature)}
    ranges = np.array([[0, 3], [3, 4], [4, 6]])
    found = teacher_groups(example.targets, ranges, temperature, ("logprobs",))
    exact = teacher_groups(example.targets, ranges, temperature, ("logprobs",), merge="exact")
    for g, (first, stop) in enumerate(ranges.tolist()):
        # gold log-probabilities are float16: relative 5e-4 each
        further = float(there[temperature][first + 1 : stop].sum())
        assert found["log_scale"][g] == pytest.approx(further, rel=1e-3, abs=1e-12)
        assert found["chunk_logprob"][g] == pytest.approx(float(there[1.0][first:stop].sum()), rel=1e-3)
        row = (logits[first] / temperature).log_softmax(dim=0).sort(descending=True).values
        assert torch.allclose(torch.from_numpy(found["logprobs"][g]).double(), row, rtol=0, atol=1e-4)
        before = float(there[temperature][first : stop - 1].sum())
        assert exact["log_scale"][g] == pytest.approx(before, rel=1e-3, abs=1e-12)
        row = (logits[stop - 1] / temperature).log_softmax(dim=0).sort(descending=True).values
        assert torch.allclose(torch.from_numpy(exact["logprobs"][g]).double(), row, rtol=0, atol=1e-4)


def test_first_and_single_compare_the_groups_that_their_names_say(t5_cache) -> None:
    """Per group, `first` has the rows of `observed` without the factor, and `single` those of its groups of one token."""
    reader, tokenizer = CacheReader(t5_cache), load_tokenizer("demo")
    logits = torch.randn(4000, 2048, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, targets = {}, {}
    for merge in ("observed", "first", "single"):
        objective = Objective("uld", "bands", 1.0, settings=GroupSettings(edges=rank_edges(reader), merge=merge))
        batch = Collator(objective, StudentText(reader, tokenizer, window=64))(reader.read(range(len(reader))))
        groups = targets[merge] = need(loss_targets(batch).groups)
        values[merge] = uld(logits[: len(batch["gold_ids"])], groups, objective.settings)
    several = targets["observed"].stop - targets["observed"].first > 1
    one = ~several & (targets["observed"].log_scale == 0)
    assert 0 < one.sum() < len(one)
    assert torch.equal(values["first"][one], values["observed"][one])
    assert torch.equal(targets["first"].first, targets["observed"].first)
    assert (targets["first"].log_scale == 0).all()
    assert torch.allclose(values["single"], values["observed"][one])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_group_s_head_and_bands_are_of_one_temperature(t5_cache, temperature: float) -> None:
    targets = CacheReader(t5_cache)[7].targets
    rows = np.arange(len(targets))
    found = teacher_groups(targets, np.stack([rows, rows + 1], axis=1), temperature, ("logprobs", "bands"))
    mass = np.exp(found["logprobs"]).sum(axis=1) + np.exp(found["bands"]).sum(axis=1)
    # bands are float16 logarithms of size 1-8: up to 0.4 % of their mass
    assert np.allclose(mass, 1.0, rtol=0, atol=4e-3)


@pytest.mark.parametrize("cache_name", ["documents", "pairs"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_the_teacher_s_tokenizer_text_kl_is_kl(
    own_caches, model_dir, student_dir, temperature: float, cache_name: str
) -> None:
    reader, tokenizer = CacheReader(own_caches[cache_name]), load_tokenizer(str(model_dir))
    text = StudentText(reader, tokenizer, window=64)
    by_text = Collator(
        Objective("text-kl", "none", temperature=temperature),
        text,
        paths=piece_paths(reader, text, tokenizer, 400),
    )(reader.read(range(len(reader))))
    by_row = Collator(Objective("kl", temperature=temperature))(reader.read(range(len(reader))))
    assert torch.equal(by_text["gold_ids"], by_row["gold_ids"])
    logits = 3 * torch.randn(len(by_row["gold_ids"]), 400, generator=torch.Generator().manual_seed(0))
    values = [
        LOSSES[name].variants[tail](logits.double(), loss_targets(batch), temperature=temperature)
        for name, tail, batch in (("text-kl", "none", by_text), ("kl", "ghost", by_row))
    ]
    assert values[1].min() > 0.1
    # all 400 probabilities are kept, as float32
    assert torch.allclose(values[0], values[1], rtol=0, atol=1e-4)


# A teacher with nothing in common


@pytest.mark.parametrize("loss", [*ALIGNED, "text-kl"])
def test_thirty_steps_bring_a_student_nearer_to_a_teacher_with_another_tokenizer(run, t5_cache, loss: str) -> None:
    # all examples in every step, so that what falls is the loss and not the luck of a batch
    finished = run(cache=str(t5_cache), loss=loss, max_steps=30, lr=5e-3, batch_size=18, alpha=1.0)
    records = finished.records
    assert sum(r.kd for r in records[-5:]) < 0.8 * sum(r.kd for r in records[:5])
    assert finished.result.aligned_share == 1.0
    assert finished.result.truncated == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"alignment": "positional"},
        {"temperature": 2.0},
        {"align_eos": False},
        {"ranking": "exact"},
        {"loss": "hybrid", "beta": 0.3},
    ],
    ids=lambda s: ",".join(s),
)
def test_every_setting_changes_the_run(run, t5_cache, settings: dict[str, object]) -> None:
    plain = run("plain", cache=str(t5_cache), loss=settings.get("loss", "uld"), max_steps=1)
    other = run("other", **{"cache": str(t5_cache), "loss": "uld", "max_steps": 1} | settings)
    assert np.isfinite(other.records[0].kd)
    assert other.records[0].kd != plain.records[0].kd
    assert other.records[0].ce == pytest.approx(plain.records[0].ce, rel=1e-6)
    share = other.result.aligned_share
    assert share < 1.0 if settings.get("alignment") else share == 1.0


def test_a_line_s_loss_is_its_objective_of_its_parts(run, t5_cache) -> None:
    for record in run(cache=str(t5_cache), loss="uld", alpha=1.5, ce_weight=0.25, max_steps=3).records:
        # in float32; a mean over examples is brought to one over positions and back
        assert record.loss == pytest.approx(1.5 * record.kd + 0.25 * record.ce, rel=1e-5)


def test_kd_is_the_mean_over_examples_of_the_mean_over_groups(run, t5_cache, student_dir, tokenizer) -> None:
    reader = CacheReader(t5_cache)
    finished = run(cache=str(t5_cache), loss="alm", batch_size=5, max_steps=1)
    text = StudentText(reader, tokenizer, window=64)
    chosen = plan_batches(reader, text.lengths()[0], seed=0, batch_size=5, count=1)[0].examples
    objective = Objective("alm", "none", 1.0)
    model, means = load_model(ModelRequest(str(student_dir), device="cpu")), []
    for example in chosen:
        batch = Collator(objective, text)(reader.read([example]))
        with torch.no_grad():
            logits = model(batch["input_ids"]).logits.flatten(0, 1)[batch["positions"]]
            kd = objective(logits, loss_targets(batch))[1]
        means.append(float((kd / batch["group_weight"]).mean()))
    assert finished.records[0].kd == pytest.approx(sum(means) / 5, rel=1e-5)


@pytest.mark.parametrize("loss", ALIGNED)
def test_accumulating_two_halves_gives_the_weights_of_the_whole_batch(run, t5_cache, loss: str) -> None:
    """Examples are of 1 to 20 words: a mean of the halves' means would be another number."""
    settings = {"cache": str(t5_cache), "loss": loss, "max_steps": 4, "ranking": "exact"}
    whole = run("whole", batch_size=4, **settings)
    halves = run("halves", batch_size=2, accumulate=2, **settings)
    assert [r.tokens for r in whole.records] == [r.tokens for r in halves.records]
    for a, b in zip(whole.records, halves.records, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.kd == pytest.approx(b.kd, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
    # Adam divides by the gradient's own size (see test_train.py); one step is 1e-3
    difference = max(float((whole.weights[n] - halves.weights[n]).abs().max()) for n in whole.weights)
    assert difference < 5e-5


@pytest.mark.parametrize("chunk", [1, 7])
def test_the_chunk_of_the_output_layer_changes_only_roundings(run, t5_cache, chunk: int) -> None:
    a, b = (run(str(c), cache=str(t5_cache), loss="hybrid", head_chunk=c) for c in (chunk, 1000))
    assert max(float((a.weights[n] - b.weights[n]).abs().max()) for n in a.weights) < 5e-5


@pytest.mark.parametrize("loss", ["uld", "hybrid"])
def test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(run, t5_cache, make_student, loss: str) -> None:
    settings = {"cache": str(t5_cache), "student": str(make_student(dropout=0.1)), "loss": loss, "max_steps": 7}
    whole = run("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", save_every=3, stop_after=5, **settings)
    resumed = run("stopped", save_every=3, resume=True, **settings)
    assert [r.step for r in resumed.records] == [4, 5, 6, 7]
    assert all(torch.equal(resumed.weights[n], whole.weights[n]) for n in whole.weights)
    assert resumed.result.tokens == whole.result.tokens


# The student's own tokens


def test_plain_fine_tuning_on_an_encoder_decoder_s_cache_reads_the_student_s_own_tokens(
    run, t5_cache, student_dir, tokenizer
) -> None:
    finished = run(cache=str(t5_cache), loss="ce", batch_size=18, max_steps=1)
    pieces, total, rows = token_bytes(tokenizer), 0.0, 0
    model = load_model(ModelRequest(str(student_dir), device="cpu"))
    reader = CacheReader(t5_cache)
    for example in reader.read(range(len(reader))):
        prompt = encode_with_ends(tokenizer, pieces, example.prompt + "\n")[0]
        target = encode_with_ends(tokenizer, pieces, example.target)[0]
        ids = torch.tensor([[tokenizer.bos_token_id, *prompt, *target, tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[0, : 1 + len(prompt)] = -100
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * (len(target) + 1)
        rows += len(target) + 1
    assert finished.records[0].tokens == rows
    # a mean of about 6 nats over some hundred positions, summed in another order in float32
    assert finished.records[0].ce == pytest.approx(total / rows, rel=1e-5)
    assert finished.result.aligned_share is None


@pytest.mark.parametrize("loss", ["ce", "uld"])
def test_prompt_loss_counts_the_prompt_s_tokens_in_the_cross_entropy_alone(run, t5_cache, tokenizer, loss: str) -> None:
    answer = run("answer", cache=str(t5_cache), loss=loss, batch_size=18, max_steps=1).records[0]
    everything = run(
        "everything", cache=str(t5_cache), loss=loss, batch_size=18, max_steps=1, prompt_loss=True
    ).records[0]
    tokens, rows = StudentText(CacheReader(t5_cache), tokenizer, window=64).lengths()
    assert answer.tokens == rows.sum()
    assert everything.tokens == (tokens - 1).sum()  # nothing predicts BOS
    assert everything.ce != answer.ce
    if loss == "uld":
        assert everything.kd == pytest.approx(answer.kd, rel=1e-5)


@pytest.mark.parametrize("loss", ["kl", "reverse-kl", "jsd"])
def test_a_loss_by_row_refuses_an_encoder_s_cache_and_says_which_losses_take_it(run, t5_cache, loss: str) -> None:
    with pytest.raises(CacheMismatchError, match="compares row by row") as caught:
        run(cache=str(t5_cache), loss=loss)
    for other in ("text-kl", "alm", "ce"):
        assert other in str(caught.value.details["try"])


@pytest.mark.parametrize("settings", [{"prompt_loss": True}, {"separator": " "}], ids=lambda s: next(iter(s)))
def test_a_loss_by_row_refuses_what_would_change_the_rows(run, settings: dict[str, object]) -> None:
    with pytest.raises(DataError, match="reads the cached tokens as they are"):
        run(loss="kl", **settings)


def test_text_kl_is_aligned_by_bytes(run, t5_cache) -> None:
    with pytest.raises(DataError, match="aligned by bytes"):
        run(cache=str(t5_cache), loss="text-kl", alignment="positional")


def test_examples_beyond_the_window_are_cut_and_counted(run, t5_cache) -> None:
    finished = run(cache=str(t5_cache), loss="uld", seq_len=24, batch_size=18, max_steps=2)
    assert finished.result.truncated > 0
    assert 0.0 < finished.result.aligned_share < 1.0
    assert np.isfinite(finished.records[-1].loss)


@pytest.mark.parametrize("loss", ["reverse-kl", "jsd"])
def test_divergences_by_row_train_and_know_the_teacher(run, cache, model_dir, loss: str) -> None:
    own = run("own", cache=str(cache), student=str(model_dir), loss=loss, max_steps=1)
    # float16 log-probabilities: relative 5e-4 of logits of size 10, and a divergence goes with the square
    assert abs(own.records[0].kd) < 1e-4
    records = run("student", cache=str(cache), loss=loss, max_steps=30, lr=5e-3).records
    assert sum(r.loss for r in records[-5:]) < 0.9 * sum(r.loss for r in records[:5])


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.5, float("nan")])
def test_a_mixture_of_one_side_alone_is_refused(run, cache, beta: float) -> None:
    with pytest.raises(DataError, match="beta"):
        run(cache=str(cache), loss="jsd", beta=beta)
