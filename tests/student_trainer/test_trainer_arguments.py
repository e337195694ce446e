"""A model that is not shared as accelerate was asked to is an error, and nothing else is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kd.common.errors import DataError
from kd.student_trainer.trainer_arguments import ASKED, refuse_other_wrapping, require_tracker


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
