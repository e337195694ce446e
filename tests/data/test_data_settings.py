"""Settings of a text: their command-line spellings, their values as text, and what is refused."""

from __future__ import annotations

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
