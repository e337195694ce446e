"""4-bit loading says which weights it quantised, and is refused where those are less than half."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from kd.cache_builder.store.records.manifest import load_manifest
from kd.cli import cli
from kd.common.errors import TeacherError
from kd.models.heads import split_head
from kd.models.identity import model_identity
from kd.models.loading import load_model, quantised_share
from kd.models.model_request import ModelRequest
from kd.models.weights.quantised import planned_share, share_of

bitsandbytes = pytest.importorskip("bitsandbytes")

SHAPE = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, pad_token_id=0))


def mixtral() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**SHAPE, **HEADS, num_local_experts=4, num_experts_per_tok=2))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=400, n_positions=64, n_embd=64, n_layer=2, n_head=4))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_was_planned_is_what_is_in_4_bits(make, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    request = ModelRequest(str(tmp_path), device="cpu", load_in_4bit=True)
    planned = quantised_share(request)
    loaded = load_model(request)
    assert share_of(loaded, lambda _, module: isinstance(module, bitsandbytes.nn.Linear4bit)) == planned
    stored = sum(m.weight.numel() * 2 for m in loaded.modules() if isinstance(m, bitsandbytes.nn.Linear4bit))
    assert stored == planned.weights  # two weights to a byte
    assert planned.weights > 0.95 * planned.of
    assert planned.layers == (14 if make is llama else 8)


def test_8_bits_are_counted_in_the_same_way(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    request = ModelRequest(str(tmp_path), device="cpu", load_in_8bit=True)
    loaded = load_model(request)
    share = share_of(loaded, lambda _, module: isinstance(module, bitsandbytes.nn.Linear8bitLt))
    assert share == quantised_share(request)
    ids = torch.arange(1, 9)[None]
    head = split_head(loaded)
    with torch.no_grad():
        ours, plain = head.logits(head.hidden(ids, None)[0]).log_softmax(-1), model(ids).logits[0].log_softmax(-1)
    assert 0 < float((ours - plain).abs().max()) < 0.05  # 8 bits of weights and inputs, in two layers of width 64
    assert model_identity(request)["quantization"] == "bitsandbytes-int8"
    random = ModelRequest("random:demo-student", device="cpu", load_in_8bit=True)
    assert type(load_model(random).transformer.h[0].mlp.c_fc).__name__ == "Linear8bitLt"


def test_trained_weights_in_8_bits_round_by_the_tokens_beside_and_are_taken(shared: Path) -> None:
    loaded = load_model(ModelRequest(str(shared / "weights" / "stories260K"), device="cpu", load_in_8bit=True))
    split_head(loaded)
    loaded.is_loaded_in_8bit = False  # as plain weights, whose states do not round like that
    with pytest.raises(TeacherError, match="reads the tokens that it is to predict"):
        split_head(loaded)


def test_a_model_that_reads_ahead_is_refused_in_8_bits_too(tmp_path: Path) -> None:
    from family_rows import ROWS

    ROWS["bert_not_a_decoder"].model().save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="reads the tokens that it is to predict"):
        split_head(load_model(ModelRequest(str(tmp_path), device="cpu", load_in_8bit=True)))


def test_experts_that_stay_in_16_bits_are_named_and_refused(tmp_path: Path) -> None:
    model = mixtral()
    share = planned_share(model)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    assert share.weights + experts < share.of
    assert 2 * share.weights < share.of
    assert share.left[0] == f"model.layers.*.mlp.experts.gate_up_proj ({2 * 4 * 64 * 256:,} weights)"
    model.save_pretrained(tmp_path)
    for load in (quantised_share, load_model):
        with pytest.raises(TeacherError, match="most of this model in 16 bits") as caught:
            load(ModelRequest(str(tmp_path), device="cpu", load_in_4bit=True))
        assert "experts" in str(caught.value)


def test_the_build_its_manifest_and_info_say_what_was_quantised(
    tmp_path: Path, tokenizer_dir: Path, text_file: Path
) -> None:
    torch.manual_seed(0)
    llama().save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "model" / name).write_bytes((tokenizer_dir / name).read_bytes())
    options = ["--teacher", str(tmp_path / "model"), "--data", str(text_file), "--limit", "2", "--seq-len", "32"]
    options += ["--load-in-4bit", "--device", "cpu", "--top-k", "4", "--json", "--out", str(tmp_path / "cache")]
    outputs = [
        CliRunner().invoke(cli, ["cache", *command], catch_exceptions=False)
        for command in (["plan", *options], ["build", *options], ["info", "--json", str(tmp_path / "cache")])
    ]
    found = [json.loads(output.stdout)["quantised"] for output in outputs]
    found.append(load_manifest(tmp_path / "cache").provenance["quantised"])
    expected = quantised_share(ModelRequest(str(tmp_path / "model"), load_in_4bit=True)).record()
    assert found == [expected] * 4
    assert expected["layers"] == 14
