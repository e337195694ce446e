"""Whole runs of a tiny student: what must come out equal, what must be refused, and what may not be loaded."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import Layout
from kd.common.errors import CacheDamageError, CacheMismatchError, DataError, TeacherError
from kd.common.extras import MissingPackageError
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.student_trainer.batches.batch_plan import plan_batches
from kd.student_trainer.batches.collate import Collator, loss_targets
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.run_folder import METRICS, read_run, read_steps, refuse_other_settings, write_run
from kd.student_trainer.training import train

TIMING = ("tokens_per_second", "wait_share")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def without_times(records) -> list[dict[str, object]]:
    return [{k: v for k, v in asdict(r).items() if k not in TIMING} for r in records]


def batch_of(cache: Path, objective: Objective) -> dict[str, torch.Tensor]:
    """The whole cache as one batch."""
    reader = CacheReader(cache)
    return Collator(objective)(reader.read(range(len(reader))))


def position_losses(model_dir: Path, batch: dict[str, torch.Tensor], objective: Objective) -> torch.Tensor:
    """KD at every position, by the plain forward pass."""
    model = load_model(ModelRequest(str(model_dir), device="cpu"))
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits.flatten(0, 1)
        return objective(logits[batch["positions"]][:, :400], loss_targets(batch))[1]


# The right numbers


# linear8's own KL is about 1e-5 nats a row; in float32 what is left is the rounding of two forward passes
@pytest.mark.parametrize(("cache_name", "tolerance"), [("kl_cache", 1e-4), ("exact_cache", 1e-6)])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_a_student_that_is_the_teacher_has_nothing_to_learn(
    run, model_dir, request, cache_name: str, tolerance: float, temperature: float
) -> None:
    cache = request.getfixturevalue(cache_name)
    finished = run(cache=str(cache), student=str(model_dir), temperature=temperature, max_steps=1)
    assert abs(finished.records[0].kd) < tolerance
    objective = Objective("kl", "ghost", temperature=temperature)
    assert position_losses(model_dir, batch_of(cache, objective), objective).abs().max() < tolerance


@pytest.mark.parametrize("shift", [-1, 1])
def test_one_position_off_the_teacher_is_far_from_its_own_targets(model_dir, pairs_cache, shift: int) -> None:
    """The canary is alive: misaligned rows do not look like the codec's error."""
    objective = Objective()
    batch = batch_of(pairs_cache, objective)
    aligned = position_losses(model_dir, batch, objective).mean()
    batch["positions"] = batch["positions"] + shift
    assert aligned < 1e-4
    assert position_losses(model_dir, batch, objective).mean() > 0.1


@pytest.mark.parametrize("cache_name", ["kl_cache", "pairs_cache"])
def test_the_first_loss_of_plain_fine_tuning_is_transformers_own(run, student_dir, request, cache_name: str) -> None:
    cache = request.getfixturevalue(cache_name)
    finished = run(cache=str(cache), loss="ce", batch_size=4, max_steps=1)
    reader = CacheReader(cache)
    tokens, _ = reader.lengths()
    examples = reader.read(plan_batches(reader, tokens, seed=0, batch_size=4, count=1)[0].examples)
    width = max(len(e.input_ids) for e in examples)
    ids = torch.zeros(4, width, dtype=torch.long)
    labels = torch.full((4, width), -100)
    for row, example in enumerate(examples):
        n, context = len(example.input_ids), len(example.context_ids)
        ids[row, :n] = torch.from_numpy(example.input_ids)
        labels[row, context:n] = ids[row, context:n]
    with torch.no_grad():
        expected = load_model(ModelRequest(str(student_dir), device="cpu"))(input_ids=ids, labels=labels).loss
    # a mean of about 6 nats over some hundred positions, summed in another order in float32
    assert finished.records[0].loss == pytest.approx(float(expected), rel=1e-6)
    assert finished.records[0].ce == finished.records[0].loss
    assert finished.records[0].kd is None


@pytest.mark.parametrize(("loss", "tail"), [("kl", "ghost"), ("kl", "renorm"), ("kl", "sampled"), ("ce", "auto")])
def test_thirty_steps_lower_the_loss(run, cache, loss: str, tail: str) -> None:
    records = run(cache=str(cache), loss=loss, tail=tail, max_steps=30, lr=5e-3).records
    first, last = (sum(r.loss for r in part) / 5 for part in (records[:5], records[-5:]))
    assert last < 0.9 * first
    assert [r.step for r in records] == list(range(1, 31))


def test_a_line_s_loss_is_its_objective_of_its_parts(run) -> None:
    records = run(alpha=0.3, temperature=2.0, max_steps=7, log_every=3, batch_size=3).records
    assert [r.step for r in records] == [1, 3, 6, 7]  # the first, every third, and the last
    for record in records:
        # means over the same positions, summed in float32
        assert record.loss == pytest.approx(0.3 * 4.0 * record.kd + 0.7 * record.ce, rel=1e-5)


def test_lines_and_result_count_every_position_of_the_seed_s_own_order(run, kl_reader) -> None:
    finished = run(max_steps=5, log_every=4, seed=3)
    tokens, rows = kl_reader.lengths()
    plan = plan_batches(kl_reader, tokens, seed=3, batch_size=4, count=5)
    seen = [int(sum(rows[list(batch.examples)].sum() for batch in plan[:n])) for n in (1, 4, 5)]
    assert [r.tokens for r in finished.records] == seen
    assert [r.epoch for r in finished.records] == [n / rows.sum() for n in seen]
    assert finished.result.tokens == seen[-1]
    assert finished.result.steps == 5
    assert finished.result.kd == finished.records[-1].kd


def test_epochs_make_as_many_steps_as_the_plan_has_batches(run, kl_reader) -> None:
    tokens, _ = kl_reader.lengths()
    steps = len(plan_batches(kl_reader, tokens, seed=0, epochs=1.5, tokens_per_batch=150))
    finished = run(max_steps=None, epochs=1.5, batch_size=None, tokens_per_batch=150)
    assert finished.result.steps == steps == len(finished.records)
    assert finished.records[-1].epoch == pytest.approx(1.5, abs=0.1)  # half of the examples, not of the rows


def test_equal_settings_give_equal_weights_and_another_seed_does_not(run, make_student) -> None:
    student = str(make_student(dropout=0.1))
    a, b, c = (run(name, student=student, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert_equal(a.weights, b.weights)
    assert without_times(a.records) == without_times(b.records)
    assert largest_difference(a.weights, c.weights) > 1e-4


def test_accumulating_two_halves_gives_the_weights_of_the_whole_batch(run) -> None:
    whole = run("whole", batch_size=4, max_steps=4)
    halves = run("halves", batch_size=2, accumulate=2, max_steps=4)
    assert [r.tokens for r in whole.records] == [r.tokens for r in halves.records]
    # Adam divides by the gradient's own size: rounding of 1e-7 in a gradient moves a weight by lr * 1e-7 / |g|,
    # which stays far below one step (1e-3) unless a gradient is as small as its rounding
    assert largest_difference(whole.weights, halves.weights) < 2e-5
    for a, b in zip(whole.records, halves.records, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)


@pytest.mark.parametrize("lora", [None, 2])
def test_gradient_checkpointing_changes_time_and_not_weights(run, make_student, lora: int | None) -> None:
    settings = {"student": str(make_student(dropout=0.1)), "lora": lora, "lr": 2e-2}
    plain, checkpointed = run("a", **settings), run("b", gradient_checkpointing=True, **settings)
    assert_equal(plain.weights, checkpointed.weights)
    assert plain.records[-1].grad_norm > 0


def test_the_chunk_of_the_output_layer_changes_only_roundings(run) -> None:
    # as for accumulation: sums in another order
    assert largest_difference(run("a", head_chunk=7).weights, run("b", head_chunk=1000).weights) < 2e-5


# Interrupted runs


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 2, "batch_size": 2, "alpha": 0.5},
        {"precision": "bf16"},
        {"lora": 2},
        {"optimizer": "adafactor", "schedule": "cosine", "warmup": 0.2},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_an_interrupted_run_ends_with_the_bytes_of_an_uninterrupted_one(run, make_student, kl_reader, settings) -> None:
    assert len(kl_reader) > 4 * 4  # step 4 is in the middle of an epoch
    settings = {"student": str(make_student(dropout=0.1)), "max_steps": 9, **settings}
    whole = run("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", save_every=4, stop_after=6, **settings)
    assert [r.step for r in read_steps(whole.out.parent / "stopped")] == [1, 2, 3, 4, 5, 6]
    resumed = run("stopped", save_every=4, resume=True, **settings)
    assert [r.step for r in resumed.records] == [5, 6, 7, 8, 9]
    assert_equal(resumed.weights, whole.weights)
    assert without_times(read_steps(resumed.out)) == without_times(read_steps(whole.out))
    assert resumed.result.tokens == whole.result.tokens


@pytest.mark.parametrize(
    "settings",
    [{}, {"accumulate": 2, "batch_size": 2, "alpha": 0.5}, {"lora": 2}],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_a_run_that_was_asked_to_stop_writes_a_checkpoint_and_ends_with_the_same_bytes(run, make_student, settings):
    settings = {"student": str(make_student(dropout=0.1)), "max_steps": 9, **settings}
    whole = run("whole", **settings)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after step [56] of 9, with a checkpoint"):
        run("stopped", asked_at=5, **settings)
    resumed = run("stopped", resume=True, **settings)
    assert resumed.records[0].step in (6, 7)
    assert_equal(resumed.weights, whole.weights)
    assert without_times(read_steps(resumed.out)) == without_times(read_steps(whole.out))


def test_a_run_asked_to_stop_at_its_last_step_is_finished(run):
    assert run(asked_at=3, max_steps=3).result.steps == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": 2, "lora_targets": "nope"},
        *({"report_to": name} for name in ("nowhere", "mlflow", "comet_ml", "clearml")),
    ],
)
def test_a_run_that_came_to_nothing_leaves_no_folder(run, tmp_path: Path, settings):
    with pytest.raises((DataError, MissingPackageError)):
        run(**settings)
    assert not (tmp_path / "run").exists()
    run()


def test_a_cache_damaged_at_the_first_batch_leaves_no_folder(run, kl_cache: Path, tmp_path: Path):
    shutil.copytree(kl_cache, tmp_path / "cache")
    for path in (tmp_path / "cache" / "targets.zarr" / "logprobs").glob("c.*"):
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(CacheDamageError):
        run(cache=str(tmp_path / "cache"))
    assert not (tmp_path / "run").exists()


def test_a_run_stopped_before_its_first_checkpoint_starts_again(run) -> None:
    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop_after=2)
    resumed = run("stopped", resume=True)
    assert_equal(resumed.weights, whole.weights)
    assert without_times(read_steps(resumed.out)) == without_times(whole.records)


def test_a_run_stopped_after_its_last_checkpoint_only_writes_its_output(run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("whole", max_steps=4)
    with monkeypatch.context() as patched:

        def killed(*rest: object, **more: object) -> None:
            raise KeyboardInterrupt

        patched.setattr("kd.student_trainer.student_model.detach_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            run("stopped", max_steps=4, save_every=2)
    resumed = run("stopped", max_steps=4, save_every=2, resume=True)
    assert resumed.records == []
    assert_equal(resumed.weights, whole.weights)
    assert (resumed.result.loss, resumed.result.tokens) == (whole.result.loss, whole.result.tokens)


def test_a_checkpoint_and_a_line_that_were_cut_short_are_passed_over(run) -> None:
    whole = run("whole", max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", max_steps=6, save_every=2, stop_after=5)
    stopped = whole.out.parent / "stopped"
    (stopped / "checkpoint-4" / "trainer_state.json").unlink()  # the Trainer writes it last
    with (stopped / METRICS).open("a") as file:
        file.write('{"step": 6, "steps_to')
    resumed = run("stopped", max_steps=6, save_every=2, resume=True)
    assert [r.step for r in resumed.records] == [3, 4, 5, 6]
    assert_equal(resumed.weights, whole.weights)
    assert [r.step for r in read_steps(stopped)] == [1, 2, 3, 4, 5, 6]


def test_checkpoints_do_not_change_the_run(run, make_student) -> None:
    student = str(make_student(dropout=0.1))
    for precision in ("fp32", "bf16"):
        plain, saved = (
            run(f"{precision}-{every}", student=student, precision=precision, save_every=every) for every in (0, 1)
        )
        assert_equal(plain.weights, saved.weights)


def test_a_finished_or_foreign_folder_is_left_alone(run, tmp_path: Path, tree) -> None:
    finished = run()
    before = tree(finished.out)
    with pytest.raises(DataError, match="holds a run already") as caught:
        run()
    assert caught.value.details["found"] == "a finished run"
    assert "--resume" not in str(caught.value.details["try"])
    with pytest.raises(DataError, match="is finished"):
        run(resume=True)
    assert tree(finished.out) == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("\\end{document}")
    with pytest.raises(DataError, match="not empty"):
        run("foreign")
    assert len(tree(tmp_path / "foreign")) == 1


def test_resuming_with_other_settings_is_refused_with_the_difference(run, exact_cache, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(stop_after=2)
    with pytest.raises(CacheMismatchError, match="other settings") as settings:
        run(resume=True, lr=7e-4, seed=3)
    assert settings.value.details["differs lr"] == "now 0.0007, before 0.001"
    assert settings.value.details["differs seed"] == "now 3, before 0"
    assert [k for k in settings.value.details if k.startswith("differs")] == ["differs lr", "differs seed"]
    with pytest.raises(CacheMismatchError) as other:
        run(resume=True, cache=str(exact_cache))
    assert [k for k in other.value.details if k.startswith("differs")] == ["differs cache"]
    document = read_run(tmp_path / "run")
    write_run(tmp_path / "run", document | {"identity": document["identity"] | {"world_size": 4}})
    with pytest.raises(CacheMismatchError) as processes:
        run(resume=True)
    assert processes.value.details["differs world_size"] == "now 1, before 4"
    write_run(tmp_path / "run", document)
    run(resume=True, log_every=2, save_every=1)  # how often to write is nobody's business


def test_resuming_with_other_shards_of_the_same_cache_is_refused(run, build_request, run_build, tmp_path: Path) -> None:
    """Epochs are shuffled shard by shard: with another shard table, step 3 has seen other examples."""
    caches = [tmp_path / "a", tmp_path / "b"]
    for cache, layout in zip(caches, (Layout(128, 32), Layout(64, 32)), strict=True):
        run_build(build_request(cache, layout=layout))
    assert len({CacheReader(c).manifest.fingerprint for c in caches}) == 1
    with pytest.raises(KeyboardInterrupt):
        run(cache=str(caches[0]), stop_after=2)
    with pytest.raises(CacheMismatchError) as caught:
        run(cache=str(caches[1]), resume=True)
    assert caught.value.details["differs cache_shard_rows"] == "now 64, before 128"


def test_a_weight_that_is_no_number_is_named_before_the_first_step(run, make_student, tmp_path: Path) -> None:
    student = make_student(seed=7)
    weights = load_file(student / "model.safetensors")
    weights["transformer.wpe.weight"][63, 3] = float("nan")  # of a position that no example reaches
    save_file(weights, student / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match="not all numbers") as caught:
        run(student=str(student))
    assert "1 of 2,048 values of transformer.wpe.weight" in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("beside_weights", [True, False])
def test_an_adapter_is_no_student(run, make_student, tmp_path: Path, beside_weights: bool) -> None:
    student = make_student(seed=8)
    (student / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')
    if not beside_weights:
        (student / "model.safetensors").unlink()
    with pytest.raises(DataError, match="an adapter, and not a model") as caught:
        run(student=str(student))
    assert "--student owner/base --lora 16" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_no_number_stops_the_run(run) -> None:
    with pytest.raises(DataError, match="training diverged") as caught:
        run(lr=1e30, max_grad_norm=0.0, max_steps=20)
    assert str(caught.value.details["where"]).startswith("step ")


def test_weights_that_are_no_numbers_get_into_no_checkpoint(run, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="training diverged"):
        run(lr=1e30, max_grad_norm=0.0, max_steps=20, save_every=1, log_every=20)
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        weights = AutoModelForCausalLM.from_pretrained(checkpoint).state_dict()
        assert all(bool(torch.isfinite(w).all()) for w in weights.values())


def test_a_line_of_the_log_ends_at_each_checkpoint(run) -> None:
    """So a resumed run logs the same lines as one that was not interrupted."""
    settings = {"max_steps": 9, "save_every": 4, "log_every": 3}
    whole = run("whole", **settings)
    assert [r.step for r in whole.records] == [1, 3, 4, 6, 8, 9]
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop_after=6, **settings)
    resumed = run("stopped", resume=True, **settings)
    assert without_times(read_steps(resumed.out)) == without_times(read_steps(whole.out))


# What comes out


def test_the_output_loads_as_any_model_and_gives_the_trained_logits(run, kl_reader) -> None:
    finished = run(save_every=3)
    ids = torch.from_numpy(kl_reader[0].input_ids).long().unsqueeze(0)
    loaded = AutoModelForCausalLM.from_pretrained(finished.out).eval()
    at_the_end = AutoModelForCausalLM.from_pretrained(finished.out / "checkpoint-3").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, at_the_end(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(finished.out)
    text = "The keeper counted the ships."
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert loaded.config.use_cache


def test_a_run_says_what_it_was_made_of(run, kl_reader, model_dir) -> None:
    finished = run(alpha=0.5)
    document = json.loads((finished.out / "run.json").read_text())
    assert document["complete"] is True
    assert document["cache_fingerprint"] == kl_reader.manifest.fingerprint == finished.result.cache_fingerprint
    assert document["teacher"] == kl_reader.manifest.provenance["teacher"]
    objective = document["settings"]["objective"]
    assert {k: objective[k] for k in ("loss", "tail", "alpha", "temperature")} == {
        "loss": "kl",
        "tail": "ghost",
        "alpha": 0.5,
        "temperature": 1.0,
    }
    assert document["result"]["steps"] == 3
    assert without_times(read_steps(finished.out)) == without_times(finished.records)


def test_lora_trains_adapters_and_merges_them_into_a_plain_model(run, student_dir, kl_reader) -> None:
    finished = run(lora=4, max_steps=10, lr=2e-2, batch_size=len(kl_reader))  # every step sees every row
    start = AutoModelForCausalLM.from_pretrained(student_dir).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(finished.out).state_dict()
    assert merged.keys() == start.keys()
    changed = {name for name in start if not torch.equal(start[name], merged[name])}
    adapted = ("attn.c_attn", "attn.c_proj", "mlp.c_proj")  # LORA_TARGETS of GPT-2
    assert changed == {f"transformer.h.{i}.{name}.weight" for i in range(2) for name in adapted}
    difference = merged["transformer.h.0.attn.c_attn.weight"] - start["transformer.h.0.attn.c_attn.weight"]
    assert torch.linalg.matrix_rank(difference, rtol=1e-3) <= 4
    assert finished.records[-1].loss < finished.records[0].loss


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but")  # peft puts it right for this one layer
def test_lora_on_the_output_layer_takes_part_in_the_loss(run, make_student, kl_reader) -> None:
    student = make_student(tied=False)
    finished = run(
        student=str(student), lora=4, lora_targets="lm_head", max_steps=10, lr=2e-2, batch_size=len(kl_reader)
    )
    start = AutoModelForCausalLM.from_pretrained(student).state_dict()
    merged = AutoModelForCausalLM.from_pretrained(finished.out).state_dict()
    assert {name for name in start if not torch.equal(start[name], merged[name])} == {"lm_head.weight"}
    assert torch.linalg.matrix_rank(merged["lm_head.weight"] - start["lm_head.weight"], rtol=1e-3) <= 4
    losses = [r.loss for r in finished.records]
    assert losses == sorted(losses, reverse=True)
    # the merged model scores what the last step left behind: lower than that step's own loss
    again = run("again", student=str(finished.out), max_steps=1, lr=1e-9, batch_size=len(kl_reader))
    assert again.records[0].loss < losses[-1]


def test_lora_on_a_tied_output_layer_is_refused(run, student_dir) -> None:
    with pytest.raises(DataError, match="cannot be merged where the embedding is the same tensor") as caught:
        run(lora=4, lora_targets="lm_head,c_attn")
    assert caught.value.details["found"] == "--lora-targets lm_head,c_attn"


def test_padded_logits_of_an_untied_head_are_never_touched(run, make_student) -> None:
    student = make_student(tied=False, vocab=416)
    finished = run(student=str(student), weight_decay=0.0, max_steps=5)
    before = AutoModelForCausalLM.from_pretrained(student).lm_head.weight
    after = AutoModelForCausalLM.from_pretrained(finished.out).lm_head.weight
    assert before.shape == (416, 32)
    assert torch.equal(after[400:], before[400:])
    assert (after[:400] != before[:400]).any(dim=1).all()  # every real token's row moved


def test_a_random_student_takes_the_tokenizer_it_is_given(run, tokenizer_dir) -> None:
    finished = run(student="random:demo-student", tokenizer=str(tokenizer_dir), max_steps=1)
    assert finished.result.parameters > 400_000
    assert AutoTokenizer.from_pretrained(finished.out).get_vocab()


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adafactor"},
        {"schedule": "constant", "warmup": 2.0},
        {"precision": "bf16"},
        {"max_grad_norm": 0.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_optimizers_schedules_and_precisions_train(run, settings) -> None:
    records = run(max_steps=12, lr=5e-3, **settings).records
    assert records[-1].loss < records[0].loss


def test_warmup_raises_and_the_schedule_lowers_the_learning_rate(run) -> None:
    rates = [r.lr for r in run(max_steps=8, warmup=0.25, lr=1e-3).records]
    assert rates == pytest.approx([0.0, 5e-4, 1e-3, *(1e-3 * n / 6 for n in (5, 4, 3, 2, 1))])


# What is refused before the first step


def test_a_student_that_does_not_fit_is_refused_and_leaves_no_folder(run, make_student, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="longer than the student's window"):
        run(student=str(make_student(positions=16)))
    with pytest.raises(CacheMismatchError, match="not the teacher's"):
        run(student="demo")
    with pytest.raises(DataError, match="does not hold that temperature"):
        run(temperature=3.0)
    if not torch.cuda.is_available():
        with pytest.raises(DataError, match="no CUDA device"):
            run(device="cuda")
    assert not (tmp_path / "run").exists()


# Several processes

MANY = """
import sys
import torch
from kd.common.settings import make
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.training import train

torch.set_num_threads(1)
cache, student, out, resume = sys.argv[1:5]


def stop(record):
    if record.step == 3 and resume == "stop":
        raise KeyboardInterrupt


values = {"cache": cache, "student": student, "out": out, "device": "cpu"}
steps = {"max_steps": 5, "batch_size": 2, "log_every": 1, "lr": 1e-3, "save_every": 2}
config = make(TrainConfig, values | steps)
try:
    train(config, resume=resume == "resume", on_step=stop)
finally:
    torch.distributed.destroy_process_group()
"""


def torchrun(tmp_path: Path, *arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "many.py"
    script.write_text(MANY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return subprocess.run([*command, str(script), *arguments], capture_output=True, text=True, timeout=300)


def test_two_processes_train_what_one_does_with_twice_the_accumulation(run, kl_cache, student_dir, tmp_path) -> None:
    out = tmp_path / "two"
    settings: dict[str, Any] = {
        "cache": str(kl_cache),
        "student": str(student_dir),
        "device": "cpu",
        "max_steps": 5,
        "log_every": 1,
    }
    run_ranks(lambda: train(**settings, out=str(out), batch_size=2, lr=1e-3))
    one = run("one", batch_size=2, accumulate=2, max_steps=5)
    two = AutoModelForCausalLM.from_pretrained(out).state_dict()
    both = [read_steps(folder) for folder in (out, one.out)]
    assert [r.step for r in both[0]] == [1, 2, 3, 4, 5]  # one process writes
    for a, b in zip(*both, strict=True):
        assert (a.tokens, a.epoch, a.lr) == (b.tokens, b.epoch, b.lr)
        assert (a.loss, a.kd, a.ce) == pytest.approx((b.loss, b.kd, b.ce), rel=1e-5)
    # as for accumulation: the same gradients, summed in another order
    assert largest_difference(two, AutoModelForCausalLM.from_pretrained(one.out).state_dict()) < 2e-5


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bytes(kl_cache, student_dir, tmp_path: Path) -> None:
    arguments = (str(kl_cache), str(student_dir))
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert torchrun(tmp_path, *arguments, str(whole), "whole").returncode == 0
    assert torchrun(tmp_path, *arguments, str(stopped), "stop").returncode != 0
    done = torchrun(tmp_path, *arguments, str(stopped), "resume")
    assert done.returncode == 0, done.stderr
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    refused = torchrun(tmp_path, *arguments, str(stopped), "whole")
    assert refused.returncode != 0
    assert "holds a run already" in refused.stderr


@pytest.mark.slow
def test_one_process_continues_a_run_of_two_over_many_shards(
    run, build_request, run_build, student_dir, tmp_path: Path
) -> None:
    """As many micro-batches make a step: it holds the same examples, whoever reads which lane."""
    cache = tmp_path / "cache"
    run_build(build_request(cache, layout=Layout(32, 32)))
    assert CacheReader(cache).epoch_order(0, 0).layout == "lanes"
    settings = {"cache": str(cache), "batch_size": 2, "max_steps": 5, "head_chunk": None}
    one = run("one", accumulate=2, **settings)
    assert torchrun(tmp_path, str(cache), str(student_dir), str(tmp_path / "two"), "stop").returncode != 0
    with pytest.raises(CacheMismatchError) as refusal:
        run("two", resume=True, **settings)
    assert refusal.value.details["try"] == "--accumulate 2: as many micro-batches to a step as before"
    resumed = run("two", accumulate=2, save_every=2, resume=True, **settings)
    assert [r.step for r in resumed.records] == [3, 4, 5]
    for mine, there in zip(resumed.records, one.records[2:], strict=True):
        assert (mine.tokens, mine.epoch, mine.lr) == (there.tokens, there.epoch, there.lr)
        assert (mine.loss, mine.kd, mine.ce) == pytest.approx((there.loss, there.kd, there.ce), rel=1e-5)


def test_a_run_that_read_large_caches_in_the_old_order_is_not_continued(tmp_path: Path) -> None:
    before = {"cache": "1234", "lr": 0.1, "accumulate": 1, "world_size": 1}
    with pytest.raises(CacheMismatchError, match="in another order") as refusal:
        refuse_other_settings(tmp_path, before, before | {"order": "lanes"})
    assert "another --out" in str(refusal.value)
    refuse_other_settings(tmp_path, before, dict(before))  # a cache of one window is read as before


def test_a_sequence_length_that_would_change_nothing_is_refused(run) -> None:
    with pytest.raises(DataError, match="reads the cached tokens as they are, whatever their length") as caught:
        run(seq_len=32)
    assert caught.value.details["found"] == "--seq-len 32"
