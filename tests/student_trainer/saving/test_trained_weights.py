"""What a run leaves: merged models, adapters, types of numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from kd.common.disk.digests import damage_of
from kd.common.errors import DataError
from kd.common.settings import make
from kd.models.loading import load_model
from kd.models.model_config import load_request_tokenizer
from kd.models.model_request import ModelRequest
from kd.models.weights.adapters import Adapter, merged
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.lora import with_adapters
from kd.student_trainer.prepare import student_request
from kd.student_trainer.saving.trained_weights import cast_weights, output_dtype, store_as
from kd.student_trainer.student_model import Student, save_student

pytest.importorskip("peft")
LORA = {"lora": 2, "lr": 2e-2}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def test_an_adapter_on_its_base_computes_what_the_merged_model_does(run, student_dir: Path) -> None:
    whole, both, alone = (run(kind, lora_save=kind, **LORA) for kind in ("merged", "both", "adapter"))
    expected = logits(AutoModelForCausalLM.from_pretrained(whole.out))
    base = ModelRequest(str(student_dir), device="cpu", dtype="float32")
    assert (logits(load_model(base)) - expected).abs().max() > 1e-3
    for folder in (both.out / "adapter", alone.out):
        joined = merged(load_model(base), Adapter(str(folder)))
        assert torch.equal(logits(joined), expected)
    assert torch.equal(both.weights["transformer.wte.weight"], whole.weights["transformer.wte.weight"])
    assert not (alone.out / "model.safetensors").exists()
    assert not (whole.out / "adapter").exists()


def test_the_files_of_the_adapter_are_in_the_digests(run) -> None:
    out = run(lora_save="both", **LORA).out
    assert damage_of(out) is None
    tensors = load_file(out / "adapter" / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name] + 1}, out / "adapter" / "adapter_model.safetensors")
    assert (damage_of(out) or "").startswith("adapter/adapter_model.safetensors has ")


def test_alpha_scales_the_adapters_and_dropout_changes_the_training(run) -> None:
    default, same, larger, dropped = (
        run(name, **LORA, **settings).weights
        for name, settings in (
            ("default", {}),
            ("same", {"lora_alpha": 4}),
            ("larger", {"lora_alpha": 16}),
            ("dropped", {"lora_dropout": 0.5}),
        )
    )
    name = next(name for name in default if name.endswith("c_attn.weight"))
    assert torch.equal(default[name], same[name])  # 2 R is the default
    assert not torch.equal(default[name], larger[name])
    assert not torch.equal(default[name], dropped[name])


@pytest.mark.parametrize("settings", [{"lora_alpha": 4}, {"lora_dropout": 0.1}, {"lora_save": "both"}])
def test_settings_of_adapters_without_adapters_are_refused(run, settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="there are none") as caught:
        run(**settings)
    assert f"--{next(iter(settings)).replace('_', '-')}" in str(caught.value)


@pytest.fixture(scope="module")
def half_student(tmp_path_factory: pytest.TempPathFactory, student_dir: Path) -> Path:
    """The student, stored in bfloat16."""
    import shutil

    folder = tmp_path_factory.mktemp("half") / "student"
    shutil.copytree(student_dir, folder)
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_a_student_is_written_in_its_own_type_and_trained_in_float32(run, half_student: Path) -> None:
    own = run("own", student=str(half_student))
    wide = run("wide", student=str(half_student), save_dtype="float32")
    assert {t.dtype for t in own.weights.values()} == {torch.bfloat16}
    assert {t.dtype for t in wide.weights.values()} == {torch.float32}
    for name, values in wide.weights.items():
        assert torch.equal(own.weights[name], values.to(torch.bfloat16))
    # what was learned is finer than bfloat16: the last bits are lost in writing alone
    assert any(not torch.equal(v.to(torch.bfloat16).float(), v) for v in wide.weights.values())
    assert AutoModelForCausalLM.from_pretrained(own.out).dtype == torch.bfloat16
    sizes = [(r.out / "model.safetensors").stat().st_size for r in (own, wide)]
    assert sizes[0] < 0.6 * sizes[1]


def test_weights_that_float16_cannot_hold_stay_as_they_are() -> None:
    model, said = torch.nn.Linear(2, 2), list[str]()
    with torch.no_grad():
        model.weight[0, 0] = 70000.0
    cast_weights(model, torch.float16, said.append)
    assert model.weight.dtype == torch.float32
    assert said == ["the student's weights do not fit into float16 and are written in float32"]
    model.weight.data.fill_(1.0)
    cast_weights(model, torch.float16, said.append)
    assert model.weight.dtype == torch.float16


def test_files_that_no_process_holds_whole_are_rewritten(student_dir: Path, tmp_path: Path) -> None:
    """As for a student in parts: its files are written in float32 first."""
    model = AutoModelForCausalLM.from_pretrained(student_dir, dtype=torch.float32)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    store_as(tmp_path, torch.bfloat16, pytest.fail)
    stored = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert stored.dtype == torch.bfloat16
    for name, parameter in model.named_parameters():
        assert torch.equal(stored.get_parameter(name), parameter.to(torch.bfloat16))


def test_adapters_of_a_student_in_parts_stay_as_the_trainer_has_written_them(student_dir: Path, tmp_path: Path) -> None:
    config = make(TrainConfig, {"cache": "c", "student": str(student_dir), "out": str(tmp_path), "lora": 2})
    model = load_model(student_request(config.model, 0))
    model.forward = model.forward  # in the place of the loss, which is taken off
    student = Student(model, with_adapters(model, config.adapters, task_type="CAUSAL_LM"), 0)

    class Sharded:
        is_fsdp_enabled, folder = True, tmp_path

        def save_model(self, folder: str) -> None:  # as transformers' Trainer saves a PeftModel
            student.trained.save_pretrained(folder)

        def is_world_process_zero(self) -> bool:
            return True

    request = student_request(replace(config.model, student=str(student_dir)), 0)
    prepared: Any = SimpleNamespace(config=config, tokenizer=load_request_tokenizer(request), request=request)
    done: list[Path] = []
    save_student(student, Sharded(), prepared, done.append, pytest.fail)
    assert done == [tmp_path]
    assert {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}


def test_the_type_of_random_weights_is_float32() -> None:
    assert output_dtype("auto", ModelRequest("random:demo-student")) == torch.float32
    assert output_dtype("bfloat16", ModelRequest("random:demo-student")) == torch.bfloat16


# Adapters on weights in 4 bits


@pytest.fixture(scope="module")
def wide_student(tmp_path_factory: pytest.TempPathFactory, save_student) -> Path:
    """A student whose layers are as wide as bitsandbytes' kernels for CPUs ask."""
    return save_student(tmp_path_factory.mktemp("wide"), seed=1, vocab_size=400, n_positions=64, n_embd=64, n_head=2)


def test_adapters_learn_on_weights_in_4_bits_and_are_merged_into_the_plain_ones(run, wide_student: Path) -> None:
    pytest.importorskip("bitsandbytes")
    settings = {"student": str(wide_student), "load_in_4bit": True, **LORA, "max_steps": 6}
    trained = run("both", lora_save="both", **settings)
    assert trained.records[-1].loss < trained.records[0].loss
    base = load_model(ModelRequest(str(wide_student), device="cpu", dtype="float32"))
    expected = logits(merged(base, Adapter(str(trained.out / "adapter"))))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(trained.out)), expected)
    # quantised weights are not what the adapters are added to: the base's other weights are unchanged
    plain = load_file(wide_student / "model.safetensors")
    assert torch.equal(trained.weights["transformer.h.0.mlp.c_fc.weight"], plain["transformer.h.0.mlp.c_fc.weight"])


def test_weights_in_4_bits_without_adapters_are_refused(run) -> None:
    with pytest.raises(DataError, match="cannot be trained themselves"):
        run(load_in_4bit=True)
