"""LoRA's default layers exist in every family, learn, and are merged into what they computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import CAUSAL, causal_model, encoder_decoder, wrapped_model

from kd.student_trainer.configuration.model_settings import LORA_TARGETS, LoraSettings
from kd.student_trainer.lora import default_targets, with_adapters

pytest.importorskip("peft")
V = 60
SEQ2SEQ = ("Bart", "MBart", "M2M100", "Pegasus", "Marian")
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def adapted(model: Any, task_type: str) -> Any:
    """The model with adapters that change something from the start."""
    peft = with_adapters(model, LoraSettings(lora=4), task_type=task_type)
    torch.manual_seed(1)
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    return peft


def check(model: Any, task_type: str, inputs: dict[str, torch.Tensor]) -> list[str]:
    """Every adapter gets a gradient, and the merged model computes what the adapted one did; returns the adapted layers."""
    with torch.no_grad():
        before = model(**inputs).logits
    peft = adapted(model, task_type)
    peft.train(model.config.model_type == "rwkv")  # which rescales its weights in place for evaluation
    output = peft(**inputs).logits
    output.float().square().sum().backward()
    trained = {name: parameter for name, parameter in peft.named_parameters() if parameter.requires_grad}
    assert trained
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    with torch.no_grad():
        merged = peft.merge_and_unload()(**inputs).logits
    assert (output - before).abs().max() > 1e-4
    assert (merged - output).abs().max() <= 1e-4 * output.abs().max() + 1e-5  # float32 sums in another order
    return sorted({name.split(".lora_")[0].rpartition(".")[2] for name in trained})


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_family_is_adapted_by_default(name: str) -> None:
    layers = check(causal_model(name, V), "CAUSAL_LM", {"input_ids": IDS})
    assert "lm_head" not in layers
    if name in ("mamba", "mamba2", "falcon_mamba"):
        assert layers == ["in_proj"]  # kernels read the weights of the others themselves


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_an_encoder_decoder_is_adapted_by_default(family: str) -> None:
    check(encoder_decoder(family, V).float(), "SEQ_2_SEQ_LM", {"input_ids": IDS, "decoder_input_ids": IDS})


def test_families_keep_the_layers_they_had() -> None:
    assert default_targets(causal_model("gpt2", V)) == LORA_TARGETS["gpt2"]
    assert default_targets(causal_model("gemma3_text", V)) == ["q_proj", "v_proj"]  # peft's
    assert default_targets(causal_model("llama4_text", V)) == ["q_proj", "v_proj"]  # peft's, of the whole checkpoint


def test_beside_an_image_model_the_text_model_alone_is_adapted() -> None:
    targets = default_targets(wrapped_model("qwen3_vl", V))
    assert targets
    assert all(name.startswith("model.language_model.layers.") for name in targets)
