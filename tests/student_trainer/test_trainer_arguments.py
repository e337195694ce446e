"""A model that is not shared as accelerate was asked to is an error, and nothing else is; one process counts the steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from accelerate import PartialState
from ranks import run_ranks

from kd.common.errors import DataError
from kd.student_trainer import trainer_arguments
from kd.student_trainer.batches.batch_plan import BatchPlan, plan_batches
from kd.student_trainer.trainer_arguments import ASKED, count_steps, refuse_other_wrapping, require_tracker


def trainer_of(world_size: int, **enabled: bool) -> SimpleNamespace:
    words = {"is_fsdp_enabled": False, "is_deepspeed_enabled": False} | enabled
    accelerator = SimpleNamespace(distributed_type=SimpleNamespace(value="MULTI_CPU"))
    return SimpleNamespace(args=SimpleNamespace(world_size=world_size), accelerator=accelerator, **words)


@pytest.mark.parametrize(("name", "variable", "enabled"), ASKED)
def test_what_was_asked_for_and_did_not_happen_is_refused(name, variable, enabled, monkeypatch) -> None:
    refuse_other_wrapping(trainer_of(2))  # nothing was asked for
    monkeypatch.setenv(variable, "true")
    refuse_other_wrapping(trainer_of(1))
    refuse_other_wrapping(trainer_of(2, **{enabled: True}))
    with pytest.raises(DataError, match=f"does not share the model as {name} would") as caught:
        refuse_other_wrapping(trainer_of(2))
    assert "MULTI_CPU: every process holds the whole model" in str(caught.value)


def test_a_tracker_that_is_misspelled_is_named_with_the_nearest() -> None:
    with pytest.raises(DataError, match="unknown tracker 'trakio'") as error:
        require_tracker("trakio")
    assert error.value.details["did you mean"] == "trackio"


def plan_over(lengths: Any) -> BatchPlan:
    """Two epochs by tokens over examples of these lengths."""

    class Order:
        def epoch_order(self, seed: int, epoch: int) -> np.ndarray:
            return np.random.default_rng([seed, epoch]).permutation(len(lengths))

    return plan_batches(Order(), lengths, seed=0, epochs=2, tokens_per_batch=90, multiple_of=2)


def test_the_main_process_counts_the_steps_for_all() -> None:
    class Unread:
        def __len__(self) -> int:
            return 500

        def __getitem__(self, examples: np.ndarray) -> np.ndarray:
            raise AssertionError("only one process looks at the lengths")

    lengths = np.random.default_rng(0).integers(1, 30, 500)
    expected = len(plan_over(lengths))

    def rank() -> None:
        plan = plan_over(lengths if PartialState(cpu=True).is_main_process else Unread())
        count_steps(plan, lambda sentence: None)
        assert len(plan) == expected

    run_ranks(rank)


def test_a_long_count_is_said_and_none_is_made_where_the_steps_are_given(monkeypatch) -> None:
    said: list[str] = []
    lengths = np.random.default_rng(0).integers(1, 30, 500)
    count_steps(plan_over(lengths), said.append)
    monkeypatch.setattr(trainer_arguments, "MANY_EXAMPLES", 999)
    plan = plan_over(lengths)
    for _ in range(2):  # the second time it is known
        count_steps(plan, said.append)
    assert said == ["counting the steps of 1,000 examples, some 0.15 s a million; --max-steps begins at once"]
    plan = plan_batches(plan._reader, lengths, seed=0, count=10, tokens_per_batch=90)
    assert plan.to_count == plan_batches(plan._reader, lengths, seed=0, batch_size=3).to_count == 0
