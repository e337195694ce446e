"""An unknown name suggests the setting that is meant."""

from __future__ import annotations

import dataclasses

import pytest

from kd.cache_builder.build.build_settings import BuildSettings
from kd.commands.train import TrainCommand
from kd.common.errors import DataError
from kd.common.setting_fields import settings_of
from kd.common.settings import make
from kd.common.synonyms import SYNONYMS, nearest_name
from kd.evaluation.eval_settings import EvalSettings
from kd.student_trainer.classify.classify_settings import ClassifyConfig

OURS = {
    one.option.removeprefix("--").replace("-", "_")
    for cls in (BuildSettings, TrainCommand, EvalSettings, ClassifyConfig)
    for one in settings_of(cls).values()
}


def test_every_synonym_stands_for_a_setting_and_is_none_itself() -> None:
    for name, meant in SYNONYMS.items():
        assert set(meant.split()) <= OURS, name
        assert name not in meant.split()


def test_transformers_names_lead_to_ours() -> None:
    from transformers import TrainingArguments

    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    known = {one.option.removeprefix("--").replace("-", "_") for one in settings_of(TrainCommand).values()}
    expected = {
        "learning_rate": "lr",
        "per_device_train_batch_size": "batch_size",
        "num_train_epochs": "epochs",
        "warmup_steps": "warmup",
        "lr_scheduler_type": "schedule",
        "gradient_accumulation_steps": "accumulate",
        "optim": "optimizer",
        "bf16": "precision",
        "save_steps": "save_every",
        "logging_steps": "log_every",
        "output_dir": "out",
        "eval_steps": "eval_every",
    }
    assert expected.keys() <= theirs
    assert {name: nearest_name(name, known) for name in expected} == expected
    assert nearest_name("warmup_ratio", known) == "warmup"


@pytest.mark.parametrize(
    ("name", "choices", "meant"),
    [
        ("--learning-rate", ["--lr", "--ranking"], "--lr"),
        ("model_name_or_path", ["teacher", "data"], "teacher"),
        ("model_name_or_path", ["model", "data"], "model"),
        ("temprature", ["temperature", "top_k"], "temperature"),
        ("xyz", ["temperature", "top_k"], None),
        ("learning_rate", ["data"], None),
    ],
)
def test_the_meaning_comes_before_the_spelling(name: str, choices: list[str], meant: str | None) -> None:
    assert nearest_name(name, choices) == meant


def test_a_file_with_another_programs_name_is_told_ours() -> None:
    with pytest.raises(DataError, match="unknown setting 'learning_rate'") as caught:
        make(TrainCommand, {"learning_rate": 1e-3})
    assert caught.value.details["did you mean"] == "lr"
