"""Settings of a run: what a file and the command line may say, and what is refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest

from kd.common.errors import DataError
from kd.common.setting_fields import settings_of
from kd.common.settings import flat, make
from kd.common.strangers.yaml_file import read_settings
from kd.models.model_request import resolve_device
from kd.student_trainer.configuration import train_config as module
from kd.student_trainer.configuration.learning_settings import LossName, TailName
from kd.student_trainer.configuration.step_settings import OPTIMIZERS, SCHEDULES
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.losses.group_kernels import GroupKernel
from kd.student_trainer.losses.loss_registry import LOSSES, TAILS

NEEDED = {"cache": "c", "student": "s", "out": "o"}
GROUPS = [kind for kind in vars(module).values() if dataclasses.is_dataclass(kind)]


def config(**settings: Any) -> TrainConfig:
    return make(TrainConfig, NEEDED | settings)


def config_of(file: Path, **settings: Any) -> TrainConfig:
    return make(TrainConfig, read_settings(file) | settings, where=file)


def test_a_file_and_its_overrides_make_one_configuration(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("cache: c\nstudent: s\nlr: 0.25\nalpha: 0.5\n")
    assert config_of(file, out="o", max_steps=9) == config(max_steps=9, lr=0.25, alpha=0.5)


def test_a_json_file_does_as_well(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(NEEDED | {"lora": 4}))
    assert config_of(file) == config(lora=4)


@pytest.mark.parametrize("spelling", ["5e-4", "5.0e-4", "0.0005", "'5e-4'"])
def test_every_spelling_of_a_fraction_is_read(tmp_path: Path, spelling: str) -> None:
    file = tmp_path / "run.yaml"  # YAML 1.1 takes 5e-4 for text
    file.write_text(f"cache: c\nstudent: s\nout: o\nlr: {spelling}\nweight_decay: {spelling}\nalpha: {spelling}\n")
    assert config_of(file) == config(lr=5e-4, weight_decay=5e-4, alpha=5e-4)


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
    assert config(lr=1, epochs=2).batches.epochs == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, 0) for name, one in settings_of(TrainConfig).items() if one.minimum == 1),
        *((name, -1) for name, one in settings_of(TrainConfig).items() if one.minimum == 0),
        *((name, 0.0) for name, one in settings_of(TrainConfig).items() if one.above == 0),
        ("lr", float("nan")),
    ],
)
def test_numbers_out_of_bounds_are_refused_by_name(name: str, value: float) -> None:
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(DataError, match=option) as caught:
        config(**{name: value})
    assert caught.value.details["found"] == f"{option} {value:g}"


def test_counts_and_rates_have_bounds() -> None:
    """All whole numbers are bounded but the teacher's top-k, which the cache knows; so are rates and norms."""
    unbounded = {
        name
        for name, one in settings_of(TrainConfig).items()
        if set(one.kinds) & {int, float} and one.minimum is None and one.above is None
    }
    assert unbounded == {"top_k", "alpha", "ce_weight", "beta"}  # checked against the cache, or by the group itself


@pytest.mark.parametrize("beta", [0.0, 1.0, -1.0, float("nan")])
def test_beta_lies_between_zero_and_one(beta: float) -> None:
    with pytest.raises(DataError, match="beta is out of bounds"):
        config(beta=beta)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("loss", {*LOSSES}),
        ("tail", {"auto", *TAILS}),
        ("optimizer", {*OPTIMIZERS}),
        ("schedule", {*SCHEDULES}),
    ],
)
def test_fixed_choices_are_those_of_the_registry(name: str, known: set[str]) -> None:
    assert {*settings_of(TrainConfig)[name].choices} == known
    with pytest.raises(DataError, match=f"unknown {name} 'adamvv'") as caught:
        config(**{name: "adamvv"})
    assert caught.value.details["known"] == ", ".join(sorted(known))


def test_rankings_are_those_that_every_group_kernel_knows() -> None:
    choices = {*settings_of(TrainConfig)["ranking"].choices}
    kernels = [
        kernel for loss in LOSSES.values() for kernel in loss.kernels.values() if isinstance(kernel, GroupKernel)
    ]
    assert kernels
    assert all({*kernel.comparisons} == choices for kernel in kernels)


def test_every_kind_of_device_is_one_that_models_are_loaded_on() -> None:
    known = {"cpu", "cuda"}
    assert {*settings_of(TrainConfig)["device"].choices} == {"auto", *known}
    assert resolve_device("auto") in known


def test_two_batch_sizes_are_refused() -> None:
    with pytest.raises(DataError, match="two batch sizes"):
        config(tokens_per_batch=100, batch_size=4)


@pytest.mark.parametrize(("sizes", "budget"), [({}, 4096), ({"batch_size": 2}, None), ({"tokens_per_batch": 10}, 10)])
def test_the_token_budget_counts_unless_examples_do(sizes: dict[str, int], budget: int | None) -> None:
    assert config(**sizes).batches.token_budget == budget


def test_an_unknown_setting_is_refused_with_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("cache: c\nstudent: s\nout: o\nmax_step: 3\n")
    with pytest.raises(DataError, match="unknown setting 'max_step'") as caught:
        config_of(file)
    assert caught.value.details["where"] == file
    assert caught.value.details["did you mean"] == "max_steps"
    groups = {part for one in settings_of(TrainConfig).values() for part in one.path[:-1]}
    assert caught.value.details["known"] == ", ".join(sorted(groups | set(settings_of(TrainConfig))))


def test_missing_settings_are_named() -> None:
    with pytest.raises(DataError, match="settings are missing") as caught:
        make(TrainConfig, {"student": "s"})
    assert caught.value.details["expected"] == "--cache, --out"


def test_one_cache_and_a_mixture_are_typed_and_saved_as_they_were_spelled() -> None:
    assert [str(one) for one in config(cache="runs/a").data.cache] == ["runs/a"]
    for spelling in ("a=0.7,b=0.3", ["a=0.7", "b=0.3"]):
        mixed = config(cache=spelling)
        assert [(one.location, one.weight) for one in mixed.data.cache] == [("a", 0.7), ("b", 0.3)]
        assert mixed.saved()["cache"] == "a=0.7,b=0.3"
        assert make(TrainConfig, mixed.saved()) == mixed


def test_saved_settings_make_the_same_configuration() -> None:
    made = config(lr=1 / 3, separator="\n", lora=2, cache_bytes="20GB", seq_len=9)
    assert make(TrainConfig, json.loads(json.dumps(made.saved()))) == made
    assert made.saved().keys() == flat(made).keys()


ADAPTED: dict[str, Any] = {"lora": 2}
TOGETHER: dict[str, dict[str, Any]] = {
    "lora_alpha": ADAPTED,
    "lora_dropout": ADAPTED,
    "lora_targets": ADAPTED,
    "lora_save": ADAPTED,
    "load_in_4bit": ADAPTED,
    "hub_private": {"push_to_hub": "a/b"},
}
"""Settings that are refused alone -> what they go with."""


@pytest.mark.parametrize("name", module.FREE)
def test_where_and_how_often_to_write_is_no_part_of_a_run_s_identity(name: str) -> None:
    together = TOGETHER.get(name, {})
    other = {"device": "cpu", "cache": "other"}.get(name) or another(name)
    assert config(**together, **{name: other}).saved() != config(**together).saved()
    assert config(**together, **{name: other}).identity() == config(**together).identity()


def another(name: str) -> Any:
    """A value of the setting that is not its default."""
    one = settings_of(TrainConfig)[name]
    if one.choices:
        return next(choice for choice in one.choices if choice != one.default)
    if bool in one.kinds:
        return not one.default
    if str in one.kinds:
        return "other"
    if any(get_origin(kind) is Mapping for kind in one.kinds):
        return {"other": 1}
    return 0.25 if float in one.kinds else 7


@pytest.mark.parametrize("name", sorted(settings_of(TrainConfig).keys() - {*module.FREE}))
def test_every_other_setting_is_part_of_a_run_s_identity(name: str) -> None:
    together = TOGETHER.get(name, {})
    assert config(**together, **{name: another(name)}).identity() != config(**together).identity()


def test_a_run_of_the_first_release_has_the_identity_it_had() -> None:
    """Keys and values as `run.json` holds them since then: with others, no old run could be continued.

    Settings that came later are None by default, which counts as a key that is not there.
    """
    identity = json.loads(json.dumps(config(lr=1 / 3, alpha=0.1, separator=" ").identity()))
    first = {
        "accumulate": 1,
        "align_eos": True,
        "alignment": "bytes",
        "alpha": 0.1,
        "batch_size": None,
        "beta": 0.5,
        "ce_weight": None,
        "epochs": 1.0,
        "gradient_checkpointing": False,
        "head_chunk": None,
        "lora": None,
        "lora_targets": None,
        "loss": "kl",
        "lr": 1 / 3,
        "max_grad_norm": 1.0,
        "max_steps": None,
        "optimizer": "adamw",
        "packing": False,
        "precision": "fp32",
        "prompt_loss": False,
        "ranking": "fast",
        "revision": None,
        "schedule": "linear",
        "seed": 0,
        "separator": " ",
        "seq_len": None,
        "student": "s",
        "tail": "auto",
        "target_len": None,
        "temperature": 1.0,
        "tokenizer": None,
        "tokens_per_batch": None,
        "top_k": None,
        "warmup": 0.0,
        "weight_decay": 0.01,
    }
    assert {name: value for name, value in identity.items() if name in first or value is not None} == first


@pytest.mark.parametrize("group", GROUPS)
def test_every_setting_has_a_help_text(group: type) -> None:
    for name, one in settings_of(group).items():
        assert one.doc.endswith("."), f"{group.__name__}.{name}"


@pytest.mark.parametrize("names", [LossName, TailName])
def test_names_that_the_help_explains_are_in_it(names: Any) -> None:
    text = " ".join(one.doc for one in settings_of(TrainConfig).values())
    assert all(name in text for name in get_args(names))


def test_a_separator_is_read_with_escapes_where_it_is_typed_and_as_it_is_elsewhere(tmp_path: Path) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(NEEDED | {"separator": "\\n"}))
    assert config_of(file).text.separator == "\\n"
    assert config(separator="\\t").text.separator == "\\t"
    assert make(TrainConfig, NEEDED | {"separator": "\\n"}, typed=True).text.separator == "\n"
