"""A model's identity follows what changes its numbers, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from transformers import BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM

from kd.common.errors import DataError, TeacherError
from kd.models.identity import model_identity, parameters_digest, pinned, weight_digests
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest


def identity(folder: Path | str, **request) -> dict:
    return model_identity(ModelRequest(str(folder), device="cpu", **request))


def copy_of(model_dir: Path, tmp_path: Path) -> Path:
    shutil.copytree(model_dir, tmp_path / "copy")
    return tmp_path / "copy"


def test_identity_does_not_depend_on_the_folders_path(model_dir: Path, tmp_path: Path):
    assert identity(copy_of(model_dir, tmp_path)) == identity(model_dir)


def test_identity_changes_with_the_weights(model_dir: Path, tmp_path: Path, save_model):
    copy = copy_of(model_dir, tmp_path)
    save_model(copy, seed=1)
    assert identity(copy)["weights"] != identity(model_dir)["weights"]
    assert identity(copy)["config"] == identity(model_dir)["config"]


def test_identity_changes_with_one_setting_of_the_config(model_dir: Path, tmp_path: Path):
    copy = copy_of(model_dir, tmp_path)
    text = (copy / "config.json").read_text()
    assert '"layer_norm_epsilon": 1e-05' in text
    (copy / "config.json").write_text(text.replace('"layer_norm_epsilon": 1e-05', '"layer_norm_epsilon": 1e-06'))
    assert identity(copy)["config"] != identity(model_dir)["config"]


def test_identity_changes_with_dtype_quantisation_and_seed(model_dir: Path):
    assert identity(model_dir, dtype="bfloat16") != identity(model_dir)
    assert identity(model_dir, dtype="float32") == identity(model_dir)  # what auto means on a CPU
    assert identity(model_dir, load_in_4bit=True) != identity(model_dir)
    assert identity("random:gpt2", seed=1) != identity("random:gpt2", seed=2)
    assert identity("random:gpt2", seed=1) == identity("random:gpt2", seed=1)


def test_weight_digests_of_a_folder_are_its_files_sha256(model_dir: Path):
    digest = hashlib.sha256((model_dir / "model.safetensors").read_bytes()).hexdigest()
    assert weight_digests(ModelRequest(str(model_dir))) == {
        "revision": "local",
        "weights": {"model.safetensors": digest},
    }


class FakeHub:
    """The hub's answers for one repository; `files` maps names to SHA-256 (None: not in large-file storage)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[str, str | None]) -> None:
        self.files, self.folder, self.asked = files, folder, []
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", self.download)

    def model_info(self, name: str, *, revision: str | None, files_metadata: bool = False):
        self.asked.append((name, revision))
        siblings = [
            SimpleNamespace(rfilename=n, lfs=None if d is None else SimpleNamespace(sha256=d), blob_id=f"b{i}")
            for i, (n, d) in enumerate(self.files.items())
        ]
        return SimpleNamespace(sha="c0ffee", siblings=siblings)

    def download(self, name: str, file: str, *, revision: str) -> str:
        assert revision == "c0ffee"
        return str(self.folder / file)


INDEX = '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}'


def test_weight_digests_of_a_hub_id_come_from_its_file_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "model.safetensors.index.json").write_text(INDEX)
    hub = FakeHub(
        monkeypatch,
        tmp_path,
        {
            "README.md": None,
            "pytorch_model.bin": "ff",
            "model-00002-of-00002.safetensors": "bb",
            "model-00001-of-00002.safetensors": "aa",
            "model.safetensors.index.json": None,
            "model.fp16-00001-of-00001.safetensors": "ee",  # a variant, which nobody asked for
        },
    )
    request = ModelRequest("owner/name", "main")
    expected = {"model-00001-of-00002.safetensors": "aa", "model-00002-of-00002.safetensors": "bb"}
    assert weight_digests(request) == {"revision": "c0ffee", "weights": expected}
    hub.files = {"README.md": None, "pytorch_model.bin": "ff", "model.fp16.safetensors": "ee"}
    assert weight_digests(request)["weights"] == {"pytorch_model.bin": "ff"}
    hub.files = {"README.md": None, "model.safetensors": None}
    assert weight_digests(request)["weights"] == {"model.safetensors": "git:b1"}
    hub.files = {"README.md": None}
    with pytest.raises(DataError, match="no weight files"):
        weight_digests(request)


def test_a_hub_id_is_loaded_from_the_commit_that_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    hub = FakeHub(monkeypatch, tmp_path, {})
    assert pinned(ModelRequest("owner/name", "main")).revision == "c0ffee"
    assert hub.asked == [("owner/name", "main")]


def test_what_is_not_on_the_hub_has_no_commit(model_dir: Path):
    for name in ("demo", "random:gpt2", str(model_dir)):
        assert pinned(ModelRequest(name)) == ModelRequest(name)


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoHub:
        def model_info(self, name: str, **options):
            raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi", NoHub)


def test_offline_the_commit_and_the_digests_come_from_the_local_snapshot(
    no_hub, monkeypatch: pytest.MonkeyPatch, model_dir: Path, tmp_path: Path
):
    snapshot = tmp_path / "c0ffee"
    shutil.copytree(model_dir, snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **options: str(snapshot))
    request = ModelRequest("owner/name")
    weights = weight_digests(ModelRequest(str(model_dir)))["weights"]
    assert pinned(request).revision == "c0ffee"
    assert weight_digests(request) == {"revision": "c0ffee", "weights": weights}


def test_a_model_that_is_nowhere_is_a_clear_error(no_hub):
    for ask in (pinned, weight_digests):
        with pytest.raises(TeacherError, match="cannot load the model"):
            ask(ModelRequest("nobody/nothing"))


def test_an_adapter_beside_the_weights_is_refused(model_dir: Path, tmp_path: Path):
    copy = copy_of(model_dir, tmp_path)
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(DataError, match="adapter") as caught:
        identity(copy)
    assert "merge_and_unload" in str(caught.value)


def test_shards_that_no_index_names_are_not_the_models(model_dir: Path, tmp_path: Path):
    copy = copy_of(model_dir, tmp_path)
    (copy / "model-00001-of-00002.safetensors").write_bytes(b"left over")
    assert identity(copy) == identity(model_dir)


def test_an_index_chooses_the_shards_and_a_missing_one_is_named(tmp_path: Path):
    for name in (
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model-00003-of-00003.safetensors",
    ):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "model.safetensors.index.json").write_text(INDEX)
    found = weight_digests(ModelRequest(str(tmp_path)))["weights"]
    assert sorted(found) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(DataError, match="missing") as caught:
        weight_digests(ModelRequest(str(tmp_path)))
    assert "model-00002-of-00002" in str(caught.value)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(DataError, match="index"):
        weight_digests(ModelRequest(str(tmp_path)))


def test_a_setting_spelled_out_that_is_the_librarys_default_changes_nothing(model_dir: Path, tmp_path: Path):
    copy = copy_of(model_dir, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    assert "scale_attn_by_inverse_layer_idx" in config
    del config["scale_attn_by_inverse_layer_idx"]  # as an older library would have written it
    config["use_cache"] = False
    (copy / "config.json").write_text(json.dumps(config))
    assert identity(copy) == identity(model_dir)


def test_random_weights_quantised_by_loading_are_made_on_the_cpu_wherever_they_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("kd.models.identity.resolve_device", lambda device: "cuda")
    monkeypatch.setattr("kd.models.model_request.resolve_device", lambda device: "cuda")
    assert model_identity(ModelRequest("random:gpt2", dtype="bfloat16"))["device"] == "cuda"
    assert model_identity(ModelRequest("random:gpt2", dtype="bfloat16", load_in_4bit=True))["device"] == "cpu"


def test_a_folder_without_weights_is_refused(tmp_path: Path, model_dir: Path):
    (tmp_path / "config.json").write_bytes((model_dir / "config.json").read_bytes())
    with pytest.raises(DataError, match="no weight files"):
        weight_digests(ModelRequest(str(tmp_path)))
    with pytest.raises(TeacherError, match="cannot load the model"):
        load_model(ModelRequest(str(tmp_path), device="cpu"))


# a model in memory


class Tiny(torch.nn.Module):
    """Two layers, a buffer of each kind, and weights that are tied on request."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        if tied:
            self.last.weight = self.first.weight
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("inv_freq", torch.ones(2), persistent=False)


CHANGES: dict[str, Callable[[Tiny], object]] = {
    "a weight in place": lambda m: m.first.weight.data.add_(1e-6),
    "the last weight": lambda m: m.last.bias.data[2:].mul_(2),
    "a buffer": lambda m: m.scale.zero_(),
    "a buffer that is not saved": lambda m: m.inv_freq.zero_(),
    "the dtype": lambda m: m.to(torch.bfloat16),
    "the shape": lambda m: setattr(m, "scale", torch.ones(1, 2)),
    "a name": lambda m: m.add_module("other", m.__dict__["_modules"].pop("last")),
    "two weights that change places": lambda m: m._modules.update(first=m.last, last=m.first),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_a_parameter_or_buffer_changes_its_digest(change: str):
    model = Tiny()
    before = parameters_digest(model)
    assert parameters_digest(Tiny()) == before
    CHANGES[change](model)
    assert parameters_digest(model) != before


def test_tied_weights_count_once():
    tied, read = Tiny(tied=True), list[int]()

    def bytes_of(tensor: torch.Tensor) -> bytes:
        read.append(tensor.numel())
        return b""

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kd.models.identity._bytes_of", bytes_of)
        parameters_digest(tied)
    assert sum(read) == 9 + 3 + 3 + 2 + 2


def test_bfloat16_and_empty_tensors_have_bytes():
    model = torch.nn.Module()
    model.register_buffer("narrow", torch.tensor([1.0, -2.0], dtype=torch.bfloat16))
    model.register_buffer("empty", torch.zeros(0))
    model.register_buffer("single", torch.tensor(3.0))
    digest = parameters_digest(model)
    model.narrow[0] = 1.0078125  # the next number that bfloat16 knows
    assert parameters_digest(model) != digest


def test_a_weight_that_is_not_in_memory_is_refused():
    with torch.device("meta"), pytest.raises(DataError, match="not in memory"):
        parameters_digest(torch.nn.Linear(2, 2))


class Whole(torch.nn.Module):
    """A layer whose weight is a tensor made of two, as quantisation libraries make theirs: it has no memory of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(TwoTensor(torch.randn(2, 2), torch.randn(2, 2)))


def test_the_parts_of_a_composed_weight_count():
    model = torch.nn.ModuleList([Whole(), Whole()])
    before = parameters_digest(model)
    model[1].weight.data.b.add_(1)
    assert parameters_digest(model) != before


def test_numbers_and_scales_of_quantised_weights_count():
    bnb = pytest.importorskip("bitsandbytes")
    model = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    seen = [parameters_digest(model)]
    model.weight.quant_state.absmax.add_(1)
    seen.append(parameters_digest(model))
    model.weight.data[3] ^= 1
    seen.append(parameters_digest(model))
    assert len(set(seen)) == 3


def test_the_bias_of_the_final_logits_counts():
    shape = {
        f"{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("layers", "attention_heads", "ffn_dim")
    }
    model = BartForConditionalGeneration(BartConfig(vocab_size=50, d_model=16, **shape))
    before = parameters_digest(model)
    model.final_logits_bias.add_(1)
    assert parameters_digest(model) != before


def test_adapters_count_by_their_weights_their_scale_and_whether_they_are_on():
    peft = pytest.importorskip("peft")
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    bare = LlamaForCausalLM(config).eval()
    seen = [parameters_digest(bare)]
    model = peft.get_peft_model(bare, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    seen.append(parameters_digest(bare))
    with model.disable_adapter():
        seen.append(parameters_digest(bare))
    layer = bare.model.layers[0].self_attn.q_proj
    layer.lora_B["default"].weight.data += 1
    seen.append(parameters_digest(bare))
    layer.scaling["default"] *= 2
    seen.append(parameters_digest(bare))
    assert len(set(seen)) == 5


def test_rotary_frequencies_changed_in_place_change_the_digest():
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    before = parameters_digest(model)
    model.model.rotary_emb.inv_freq *= 0.5
    assert parameters_digest(model) != before


def test_rotary_frequencies_that_grow_with_the_text_do_not_change_the_digest():
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    config.max_position_embeddings = 8
    config.rope_parameters = {"rope_theta": 10_000.0, "rope_type": "dynamic", "factor": 2.0}
    model = LlamaForCausalLM(config).eval()
    before = parameters_digest(model)
    frequencies = model.model.rotary_emb.inv_freq.clone()
    model(torch.ones(1, 20, dtype=torch.long))
    assert not torch.equal(frequencies, model.model.rotary_emb.inv_freq), "or this test shows nothing"
    assert parameters_digest(model) == before
