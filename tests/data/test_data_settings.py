"""Settings of a text: their command-line spellings, their values as text, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.common.setting_fields import settings_of
from kd.common.settings import MissingSettings, make
from kd.data.data_settings import DataSettings, InstructionConfig, RequiredDataSettings


def test_text_becomes_the_values_that_the_options_mean() -> None:
    texts = {"data": "flan:boolq", "columns": "prompt=question, target=answer", "limit": 5}
    tasks = {"template": "3", "task_root": "rows", "max_per_task": 7, "options": False, "labels": "flan"}
    settings = make(DataSettings, texts | tasks)
    assert (settings.spec, settings.limit) == ("flan:boolq", 5)
    assert settings.columns == {"prompt": "question", "target": "answer"}
    assert settings.instructions == InstructionConfig(3, False, "flan", Path("rows"), 7)


def test_limits_of_single_tasks_are_one_setting_for_every_door() -> None:
    typed = make(DataSettings, {"task_limits": "xsum=200, coqa=150"}, typed=True).instructions
    given = make(DataSettings, {"instructions": {"task_limits": {"xsum": 200, "coqa": 150}}}).instructions
    assert typed == given == InstructionConfig(task_limits={"xsum": 200, "coqa": 150})
    assert [replace(typed, max_per_task=500).limit_of(task) for task in ("xsum", "boolq")] == [200, 500]
    assert typed.limit_of("boolq") is None
    assert typed.provenance()["task_limits"] == "coqa 150, xsum 200"
    assert "task_limits" not in InstructionConfig().provenance()  # the digests of texts without it stay what they were


@pytest.mark.parametrize("text", ["xsum", "=200", "xsum=", "xsum=2.5", "xsum=-1", "xsum=1,xsum=2", ""])
def test_limits_that_name_no_task_or_number_are_errors(text: str) -> None:
    with pytest.raises(DataError, match="cannot read task_limits"):
        make(DataSettings, {"task_limits": text})


@pytest.mark.parametrize("limit", [0, -3, 2.5, "7", True])
def test_the_limit_of_a_task_is_a_number_from_one(limit: object) -> None:
    with pytest.raises(DataError, match="at least 1"):
        make(DataSettings, {"task_limits": {"xsum": limit}})


@pytest.mark.parametrize("text", ["question", "=question", "prompt="])
def test_columns_that_name_no_field_or_column_are_errors(text: str) -> None:
    with pytest.raises(DataError, match="cannot read columns"):
        make(DataSettings, {"columns": text})


def test_a_template_is_a_choice_or_a_number() -> None:
    assert make(DataSettings, {"template": "-1"}).instructions.template == -1
    with pytest.raises(DataError, match="unknown template"):
        make(DataSettings, {"template": "round_robin"})


@pytest.mark.parametrize("name", ["limit", "max_per_task", "mix_maximum", "mix_draws"])
def test_numbers_of_examples_are_at_least_one(name: str) -> None:
    with pytest.raises(DataError, match="must be at least 1"):
        make(DataSettings, {name: 0})


def test_a_text_is_required_where_the_class_says_so() -> None:
    with pytest.raises(MissingSettings) as caught:
        make(RequiredDataSettings, {"split": "dev"})
    assert caught.value.details["expected"] == "--data"
    assert make(RequiredDataSettings, {"spec": "demo"}).spec == "demo"
    assert list(settings_of(RequiredDataSettings)) == list(settings_of(DataSettings))
