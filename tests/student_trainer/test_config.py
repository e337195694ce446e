"""Settings of a run: what a file and the command line may say, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.student_trainer.config import OPTIMIZERS, PRECISIONS, SCHEDULES, TrainConfig, config_from

NEEDED = {"cache": "c", "student": "s", "out": "o"}


def config(**settings) -> TrainConfig:
    return TrainConfig(**NEEDED | settings)


def test_a_file_and_its_overrides_make_one_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("cache: c\nstudent: s\nmax-steps: 7\nlr: 0.25\nalpha: 0.5\n")
    made = config_from({"out": "o", "max_steps": 9, "lr": None}, file)
    assert made == config(max_steps=9, lr=0.25, alpha=0.5)


def test_a_json_file_does_as_well(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(NEEDED | {"lora": 4}))
    assert config_from({}, file) == config(lora=4)


@pytest.mark.parametrize("spelling", ["5e-4", "5.0e-4", "0.0005", "'5e-4'"])
def test_every_spelling_of_a_fraction_is_read(tmp_path: Path, spelling: str) -> None:
    file = tmp_path / "run.yaml"  # YAML 1.1 takes 5e-4 for text
    file.write_text(f"cache: c\nstudent: s\nout: o\nlr: {spelling}\nweight_decay: {spelling}\nalpha: {spelling}\n")
    assert config_from({}, file) == config(lr=5e-4, weight_decay=5e-4, alpha=5e-4)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("lr", "fast", "float"),
        ("max_steps", 1.5, "int or none"),
        ("accumulate", True, "int"),
        ("gradient_checkpointing", "yes", "bool"),
        ("student", 7, "str"),
        ("alpha", [0.5], "float or none"),
        ("seed", None, "int"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(name: str, value: object, expected: str) -> None:
    with pytest.raises(DataError, match="wrong type") as caught:
        config(**{name: value})
    assert caught.value.details == {"found": f"{name} {value!r}", "expected": expected}


def test_a_whole_number_will_do_for_a_fraction() -> None:
    assert config(lr=1, epochs=2).epochs == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens_per_batch", 0),
        ("batch_size", 0),
        ("accumulate", 0),
        ("max_steps", 0),
        ("lora", 0),
        ("log_every", 0),
        ("head_chunk", 0),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("epochs", 0.0),
        ("temperature", 0.0),
        ("weight_decay", -0.1),
        ("max_grad_norm", -1.0),
        ("warmup", -1.0),
        ("save_every", -1),
        ("seed", -1),
    ],
)
def test_numbers_out_of_bounds_are_refused(name: str, value: float) -> None:
    with pytest.raises(DataError, match=name.replace("_", "[ _]")) as caught:
        config(**{name: value})
    assert str(caught.value.details["found"]) == str(value)


@pytest.mark.parametrize(
    ("name", "known"), [("optimizer", OPTIMIZERS), ("schedule", SCHEDULES), ("precision", PRECISIONS)]
)
def test_an_unknown_choice_lists_the_known_ones(name: str, known) -> None:
    for choice in known:
        config(**{name: choice})
    with pytest.raises(DataError, match=f"unknown {name}") as caught:
        config(**{name: "adamvv"})
    assert caught.value.details["known"] == ", ".join(sorted(known))


def test_two_batch_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="two batch sizes"):
        config(tokens_per_batch=100, batch_size=4)


def test_an_unknown_setting_is_refused_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("cache: c\nlearning_rate: 1\nmax_step: 3\n")
    with pytest.raises(DataError, match="unknown setting"):
        config_from({}, file)
    with pytest.raises(DataError) as caught:
        config_from(NEEDED | {"max_step": 3})
    assert caught.value.details["did you mean"] == "max_steps"
    assert caught.value.details["known"] == ", ".join(sorted(f.name for f in fields(TrainConfig)))


def test_missing_settings_are_named() -> None:
    with pytest.raises(DataError, match="settings are missing") as caught:
        config_from({"student": "s", "out": None})
    assert caught.value.details["expected"] == "--cache, --out"


@pytest.mark.parametrize("text", ["- a list", "just words", "a: [1", ""])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(DataError, match="configuration file") as caught:
        config_from(NEEDED, file)
    assert caught.value.details["where"] == file


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read the configuration file"):
        config_from(NEEDED, tmp_path / "absent.yaml")


@pytest.mark.parametrize("name", ["out", "cache", "cache_bytes", "save_every", "log_every", "report_to", "device"])
def test_where_and_how_often_to_write_is_no_part_of_a_run_s_identity(name: str) -> None:
    other = {"save_every": 3, "log_every": 3, "cache_bytes": 9}.get(name, "cpu")
    assert config(**{name: other}).identity() == config().identity()


def test_everything_else_is_part_of_a_run_s_identity() -> None:
    changed = {
        "student": "t",
        "loss": "ce",
        "tail": "renorm",
        "alpha": 0.5,
        "temperature": 2.0,
        "top_k": 3,
        "epochs": 2.0,
        "max_steps": 5,
        "tokens_per_batch": 99,
        "batch_size": 2,
        "accumulate": 2,
        "lr": 1.0,
        "weight_decay": 0.5,
        "max_grad_norm": 2.0,
        "optimizer": "adafactor",
        "schedule": "cosine",
        "warmup": 0.1,
        "precision": "bf16",
        "lora": 2,
        "gradient_checkpointing": True,
        "seed": 1,
        "revision": "main",
        "tokenizer": "t",
        "head_chunk": 7,
        "ce_weight": 0.2,
        "beta": 0.1,
        "alignment": "positional",
        "align_eos": False,
        "ranking": "exact",
        "prompt_loss": True,
        "separator": " ",
        "seq_len": 9,
        "lora_targets": "c_attn",
        "target_len": 3,
        "packing": True,
    }
    free = {"out", "cache", "cache_bytes", "save_every", "log_every", "report_to", "device"}
    assert {f.name for f in fields(TrainConfig)} == changed.keys() | free  # a new setting must be put on one side
    for name, value in changed.items():
        assert config(**{name: value}).identity() != config().identity(), name


def test_an_identity_survives_json() -> None:
    identity = config(lr=1 / 3, alpha=0.1).identity()
    assert json.loads(json.dumps(identity)) == identity
