"""Scoring a student while it learns: the training must not notice, and every line must be of the weights of its step."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from kd.common.errors import DataError
from kd.student_trainer.batches.batch_plan import BatchPlan, plan_batches
from kd.student_trainer.midway import Midway, evaluation_steps
from kd.student_trainer.run_folder import EVALUATIONS, keep_records, read_evaluations, read_steps

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def without_times(records) -> list[dict[str, object]]:
    return [{k: v for k, v in asdict(r).items() if k not in ("tokens_per_second", "wait_share")} for r in records]


def nosy(model, tokenizer) -> dict[str, object]:
    """All that an evaluation may do to a process and to a model, and more."""
    assert not model.training
    assert len(tokenizer) == 400
    with torch.inference_mode():
        logits = model(input_ids=IDS).logits  # the model's own forward, not the one that returns losses
        model.generate(input_ids=IDS, max_new_tokens=2, do_sample=True, pad_token_id=0)
    for seeded in (torch.manual_seed, random.seed, np.random.seed):
        seeded(1)
    torch.rand(3), random.random(), np.random.rand(3)  # noqa: NPY002
    model.train()
    model.config.use_cache = not model.config.use_cache
    return {"tasks": {}, "sum": float(logits.double().sum())}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"accumulate": 2, "batch_size": 2},
        {"precision": "bf16"},
        {"lora": 2},
        {"gradient_checkpointing": True},
        {"packing": True},
    ],
    ids=lambda settings: ",".join(settings) or "plain",
)
def test_a_run_that_is_scored_ends_with_the_bytes_of_one_that_is_not(run, make_student, settings) -> None:
    settings = {"student": str(make_student(dropout=0.1)), "max_steps": 5, **settings}  # dropout draws at every step
    plain = run("plain", **settings)
    scored = run("scored", midway=Midway(nosy, every=2), **settings)
    assert_equal(scored.weights, plain.weights)
    assert without_times(read_steps(scored.out)) == without_times(read_steps(plain.out))
    assert [r["step"] for r in read_evaluations(scored.out)] == [0, 2, 4, 5]
    assert not (plain.out / EVALUATIONS).exists()


@pytest.mark.parametrize("settings", [{}, {"lora": 2}], ids=["plain", "lora"])
def test_every_line_is_of_the_weights_of_its_step(run, make_student, settings) -> None:
    settings = {"student": str(make_student(dropout=0.1)), "max_steps": 4, **settings}
    scored = run("scored", midway=Midway(nosy, every=2), save_every=2, **settings)
    sums = {r["step"]: r["sum"] for r in read_evaluations(scored.out)}
    assert len(set(sums.values())) == 3

    def logits_of(folder: Path) -> float:
        with torch.no_grad():
            return float(AutoModelForCausalLM.from_pretrained(folder).eval()(input_ids=IDS).logits.double().sum())

    assert sums[0] == pytest.approx(logits_of(Path(settings["student"])), abs=1e-3)
    # another order of float32 sums: merged as the run's output is
    assert sums[4] == pytest.approx(logits_of(scored.out), abs=1e-3)
    if not settings.get("lora"):
        assert sums[2] == pytest.approx(logits_of(scored.out / "checkpoint-2"), abs=1e-3)


def test_time_spent_on_scores_is_in_no_speed(run) -> None:
    import time

    def slow(model, tokenizer) -> dict[str, object]:
        time.sleep(0.4)
        return {"tasks": {}}

    scored = run("scored", midway=Midway(slow, every=1), max_steps=3)
    assert [r["seconds"] >= 0.4 for r in read_evaluations(scored.out)] == [True] * 4
    positions = scored.result.tokens
    assert scored.result.tokens_per_second == pytest.approx(positions / scored.result.seconds)
    for record in scored.records[1:]:  # a step of this student takes milliseconds; with the sleep 0.4 s
        count = record.tokens - scored.records[record.step - 2].tokens
        assert record.tokens_per_second > count / 0.4


def test_a_resumed_run_has_the_lines_of_an_uninterrupted_one(run, make_student) -> None:
    settings = {"student": str(make_student(dropout=0.1)), "max_steps": 6}
    whole = run("whole", midway=Midway(nosy, every=2), **settings)
    with pytest.raises(KeyboardInterrupt):
        run("stopped", midway=Midway(nosy, every=2), save_every=3, stop_after=5, **settings)
    assert [r["step"] for r in read_evaluations(whole.out.parent / "stopped")] == [0, 2, 4]
    resumed = run("stopped", midway=Midway(nosy, every=2), save_every=3, resume=True, **settings)
    assert_equal(resumed.weights, whole.weights)
    lines = [[(r["step"], r["epoch"], r["sum"]) for r in read_evaluations(o)] for o in (resumed.out, whole.out)]
    assert lines[0] == lines[1]
    assert [step for step, _, _ in lines[0]] == [0, 2, 4, 6]


def test_a_run_that_starts_again_starts_its_lines_again(run) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("stopped", midway=Midway(nosy, every=1), stop_after=2)
    resumed = run("stopped", midway=Midway(nosy, every=1), resume=True)
    assert [r["step"] for r in read_evaluations(resumed.out)] == [0, 1, 2, 3]


def test_lines_cut_short_are_passed_over_and_later_ones_dropped(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step}) + "\n" for step in (0, 2, 4)]
    (tmp_path / EVALUATIONS).write_text("".join(lines) + '{"step": 6, "ta')
    assert [r["step"] for r in read_evaluations(tmp_path)] == [0, 2, 4]
    keep_records(tmp_path / EVALUATIONS, 3)
    assert (tmp_path / EVALUATIONS).read_text() == "".join(lines[:2])


class InOrder:
    """As much of a reader as a plan needs."""

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        return np.arange(self.examples)


def plan_of(epochs: int, batches: int) -> BatchPlan:
    """So many epochs of so many micro-batches."""
    return plan_batches(InOrder(batches), np.ones(batches, dtype=int), seed=0, epochs=epochs, batch_size=1)


def test_the_start_and_the_end_are_always_scored() -> None:
    assert evaluation_steps(plan_of(1, 5), 1, 2) == {0, 2, 4, 5}
    assert evaluation_steps(plan_of(1, 4), 1, 2) == {0, 2, 4}
    assert evaluation_steps(plan_of(1, 2), 1, 100) == {0, 2}


def test_an_epoch_ends_with_the_step_that_holds_its_last_batch() -> None:
    assert evaluation_steps(plan_of(3, 2), 1, None) == {0, 2, 4, 6}
    assert evaluation_steps(plan_of(2, 3), 2, None) == {0, 2, 3}  # step 2 holds batches 3 and 4
    assert evaluation_steps(plan_of(1, 2), 1, None) == {0, 2}


def test_epochs_of_a_run_are_scored_at_their_ends(run, kl_reader) -> None:
    scored = run("scored", midway=Midway(nosy), max_steps=None, epochs=2.0)
    records = read_evaluations(scored.out)
    assert [r["epoch"] for r in records] == [0, 1, 2]
    assert records[-1]["step"] == scored.result.steps


def test_a_distance_of_no_steps_is_refused() -> None:
    with pytest.raises(DataError, match="at least 1 step"):
        Midway(nosy, every=0)
