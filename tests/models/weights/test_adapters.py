"""Adapters that are merged: the numbers are those of the adapter on its base, and what cannot be merged is refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_settings import build_of, model_request, plan_of
from kd.cache_builder.store.records.manifest import load_manifest
from kd.common.errors import DataError, KdError, TeacherError
from kd.common.settings import changed, make
from kd.models.heads import split_head
from kd.models.identity import model_identity, pinned
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.models.pretrained import load_teacher
from kd.models.weights.adapters import Adapter

peft = pytest.importorskip("peft")

V = 64
IDS = torch.arange(1, 9)[None]
KINDS: dict[str, Any] = {
    "lora": {"r": 4, "lora_alpha": 16},
    "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True},
    "dora": {"r": 4, "use_dora": True},
    "bias": {"r": 4, "bias": "lora_only"},
    "saved": {"r": 4, "modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny_model("llama", "sdpa", V, window=8).float().save_pretrained(folder)
    return folder


def adapter_of(base: Path, folder: Path, *, targets: Any = ("q_proj", "down_proj"), **settings: Any) -> Any:
    """A peft model on the base whose adapter changes something, saved to the folder."""
    config = peft.LoraConfig(target_modules=list(targets), **settings)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name or ("bias" in name and settings.get("bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_gives_the_numbers_of_the_adapter_on_its_base(kind: str, base: Path, tmp_path: Path):
    own = adapter_of(base, tmp_path / "a", **KINDS[kind])
    model = load_model(ModelRequest(str(base), device="cpu", adapter=Adapter(str(tmp_path / "a"))))
    head = split_head(model)
    with torch.no_grad():
        ours, theirs = head.logits(head.hidden(IDS, None)[0]), own(IDS).logits[0]
        plain = load_model(ModelRequest(str(base), device="cpu"))(IDS).logits[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)  # W x + B A x against (W + B A) x in float32
    assert float((ours - plain).abs().max()) > 1e-2
    assert not hasattr(model, "peft_config")


def test_both_digests_are_in_the_identity_and_names_are_not(base: Path, tmp_path: Path):
    adapter_of(base, tmp_path / "a", r=4)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    settings = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    (tmp_path / "b" / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "elsewhere"}))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": 1}))
    shutil.copy(tmp_path / "a" / "adapter_model.safetensors", tmp_path / "c")

    def identity(name: str | None) -> dict[str, Any]:
        adapter = None if name is None else Adapter(str(tmp_path / name))
        return model_identity(pinned(ModelRequest(str(base), device="cpu", adapter=adapter)))

    one = identity("a")
    assert "adapter" not in identity(None)
    assert {k: v for k, v in one.items() if k != "adapter"} == identity(None)
    assert set(one["adapter"]["weights"]) == {"adapter_model.safetensors"}
    assert identity("b") == one
    assert identity("c")["adapter"]["weights"] == one["adapter"]["weights"]
    assert identity("c") != one


def test_an_adapter_of_another_model_is_said(base: Path, tmp_path: Path):
    """Of equal shapes: nothing else would tell. A copy of the weights, and the name of a copy, are the same model."""
    adapter_of(base, tmp_path / "a", r=4)
    assert Adapter(str(tmp_path / "a")).base() == str(base)
    shutil.copytree(base, tmp_path / "copy")
    shutil.copytree(base, tmp_path / "other" / base.name.upper())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the adapter")
        for model in (base, tmp_path / "copy", tmp_path / "other" / base.name.upper()):
            load_model(ModelRequest(str(model), device="cpu", adapter=Adapter(str(tmp_path / "a"))))
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(
        json.dumps(settings | {"base_model_name_or_path": "owner/else"})
    )
    with pytest.warns(UserWarning, match="trained on owner/else, and it was merged into"):
        load_model(ModelRequest(str(base), device="cpu", adapter=Adapter(str(tmp_path / "a"))))


def test_a_build_with_an_adapter_is_another_cache_and_says_so(model_dir: Path, text_file: Path, tmp_path: Path):
    adapter_of(model_dir, tmp_path / "a", targets=["c_attn"], r=2, fan_in_fan_out=True)
    values = {"teacher": str(model_dir), "device": "cpu", "spec": str(text_file), "seq_len": 32, "top_k": 8}
    plain = make(BuildSettings, {**values, "limit": 2, "out": tmp_path / "plain"})
    tuned = changed(plain, teacher_adapter=str(tmp_path / "a"), out=tmp_path / "tuned")
    assert plan_of(plain).manifest.fingerprint != plan_of(tuned).manifest.fingerprint
    build_of(tuned)
    manifest = load_manifest(tmp_path / "tuned")
    assert manifest.provenance["adapter"]["name"] == "a"
    assert manifest.identity["teacher"]["adapter"] == Adapter(str(tmp_path / "a")).identity()
    assert model_request(tuned).adapter == Adapter(str(tmp_path / "a"))
    merged, _ = load_teacher(str(model_dir), adapter=str(tmp_path / "a"))
    assert torch.equal(merged(IDS).logits, load_model(model_request(tuned))(IDS).logits)


def without(folder: Path, name: str) -> None:
    (folder / name).unlink()


def fewer_weights(folder: Path, name: str) -> None:
    tensors = load_file(folder / name)
    save_file({k: v for k, v in tensors.items() if "layers.1" not in k}, folder / name)


def more_weights(folder: Path, name: str) -> None:
    tensors = load_file(folder / name)
    save_file({**tensors, **{k.replace("layers.1", "layers.9"): v.clone() for k, v in tensors.items()}}, folder / name)


def wider_weights(folder: Path, name: str) -> None:
    save_file(
        {k: torch.cat([v, v], dim=1) if "lora_A" in k else v for k, v in load_file(folder / name).items()},
        folder / name,
    )


@pytest.mark.parametrize(
    ("damage", "file", "words"),
    [
        (without, "adapter_config.json", "not an adapter"),
        (without, "adapter_model.safetensors", "has no weights"),
        (fewer_weights, "adapter_model.safetensors", "lacks weights"),
        (more_weights, "adapter_model.safetensors", "no place for"),
        (wider_weights, "adapter_model.safetensors", "does not fit"),
    ],
)
def test_an_adapter_that_is_not_whole_or_of_another_model_is_refused(damage, file, words, base: Path, tmp_path: Path):
    adapter_of(base, tmp_path / "a", r=4)
    damage(tmp_path / "a", file)
    with pytest.raises(KdError, match=words):
        load_model(ModelRequest(str(base), device="cpu", adapter=Adapter(str(tmp_path / "a"))))


def test_an_adapter_of_modules_that_the_teacher_lacks_is_refused(base: Path, model_dir: Path, tmp_path: Path):
    adapter_of(base, tmp_path / "a", r=4)
    with pytest.raises(TeacherError, match="does not fit the model") as caught:
        load_model(ModelRequest(str(model_dir), device="cpu", adapter=Adapter(str(tmp_path / "a"))))
    assert caught.value.details["trained on"] == str(base)


def test_soft_prompts_are_refused(base: Path, tmp_path: Path):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "a")
    with pytest.raises(TeacherError, match="soft prompts"):
        load_model(ModelRequest(str(base), device="cpu", adapter=Adapter(str(tmp_path / "a"))))


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft says of such an adapter that it is unusual
def test_an_adapter_of_a_tied_output_layer_is_refused(model_dir: Path, tmp_path: Path):
    """Merged into the one weight it would change the embedding too: other numbers than the adapter's."""
    adapter_of(model_dir, tmp_path / "a", targets=["lm_head"], r=2)
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    save_file({k: v for k, v in stored.items() if "lora" in k}, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(TeacherError, match="tied"):
        load_model(ModelRequest(str(model_dir), device="cpu", adapter=Adapter(str(tmp_path / "a"))))


def test_nothing_is_merged_into_weights_that_are_quantised_or_on_the_disk(base: Path, tmp_path: Path):
    from kd.models.placement.device_maps import Placement

    adapter = Adapter(str(tmp_path / "a"))
    adapter_of(base, tmp_path / "a", r=4)
    with pytest.raises(DataError, match="plain weights"):
        ModelRequest(str(base), load_in_8bit=True, adapter=adapter)
    with pytest.raises(TeacherError, match="offloaded"):
        load_model(ModelRequest(str(base), placement=Placement.of({"": "disk"}), adapter=adapter))


def test_a_name_that_is_no_folder_and_an_unknown_revision_are_errors(base: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TeacherError, match="cannot be found"):
        load_model(ModelRequest(str(base), device="cpu", adapter=Adapter("nobody/nothing")))
    with pytest.raises(DataError, match="there is no adapter"):
        make(BuildSettings, {"teacher": "demo", "spec": "demo", "out": tmp_path / "c", "adapter_revision": "main"})
    with pytest.raises(DataError, match="4 bits or in 8"):
        ModelRequest("demo", load_in_4bit=True, load_in_8bit=True)
