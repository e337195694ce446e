"""Checkpoints that are stored quantised: those that run on a CPU are quantised here; the others say what they lack."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from kd.common.errors import DataError, TeacherError
from kd.models.heads import split_head
from kd.models.identity import model_identity, parameters_digest
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.models.weights.quantised_checkpoints import PACKAGES, unpack

SHAPE = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
BLOCK = 32
FP8_MAX = 448.0
IDS = torch.arange(1, 9)[None]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS, pad_token_id=0)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def stored_as(plain: Path, folder: Path, settings: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def logits(folder: Path, **options: Any) -> torch.Tensor:
    """By the two parts of the model, which `split_head` has compared with its own."""
    head = split_head(load_model(ModelRequest(str(folder), device="cpu", **options)))
    return head.logits(head.hidden(IDS, None)[0])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU may compute in 8-bit floats: see test_on_gpu.py")
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_an_fp8_checkpoint_is_its_dequantised_weights_on_a_cpu(dtype: str, plain: Path, tmp_path: Path):
    weights = load_file(plain / "model.safetensors")
    stored, twin = dict(weights), dict(weights)
    for name in [n for n in weights if "proj" in n]:
        rows, columns = weights[name].shape
        blocks = weights[name].float().view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
        scale = blocks.abs().amax((1, 3)) / FP8_MAX
        quantised = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        stored[name] = quantised.view(rows, columns)
        stored[name.replace("weight", "weight_scale_inv")] = scale
        twin[name] = (quantised.float() * scale[:, None, :, None]).view(rows, columns)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}
    settings["modules_to_not_convert"] = ["lm_head"]
    folder = stored_as(plain, tmp_path / "fp8", settings, stored)
    (tmp_path / "twin").mkdir()
    save_file(twin, tmp_path / "twin" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "twin" / "config.json").write_text((plain / "config.json").read_text())
    assert torch.equal(logits(folder, dtype=dtype), logits(tmp_path / "twin", dtype=dtype))
    identity = model_identity(ModelRequest(str(folder), device="cpu", dtype=dtype))
    assert identity["quantization"] == "fp8-dequantized"
    assert identity["dtype"] == ("float32" if dtype == "auto" else dtype)


@pytest.mark.parametrize("bits", [4, 8])
def test_what_bitsandbytes_has_stored_is_what_it_makes_on_the_way(bits: int, plain: Path, tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    options: Any = {f"load_in_{bits}bit": True}
    load_model(ModelRequest(str(plain), device="cpu", **options)).save_pretrained(tmp_path / "stored")
    assert torch.equal(logits(tmp_path / "stored"), logits(plain, **options))
    made, stored = (
        model_identity(ModelRequest(str(f), device="cpu", **o))
        for f, o in ((plain, options), (tmp_path / "stored", {}))
    )
    assert made["quantization"] == ("bitsandbytes-nf4-double" if bits == 4 else "bitsandbytes-int8")
    assert stored["quantization"] == "bitsandbytes"
    with pytest.raises(DataError, match="quantised already"):
        load_model(ModelRequest(str(tmp_path / "stored"), device="cpu", load_in_4bit=True))


def compressed(plain: Path, folder: Path, arguments: dict[str, Any], form: str) -> Path:
    """The plain model with linear layers of 4 or 8 bits, scales by the largest weight."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        apply_quantization_config,
    )

    model = LlamaForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    scheme = QuantizationScheme(targets=["Linear"], **{k: QuantizationArgs(**v) for k, v in arguments.items()})
    config = QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"], format=form)
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            weights = module.quantization_scheme.weights
            most = FP8_MAX if weights.type == "float" else 2 ** (weights.num_bits - 1) - 1
            groups = module.weight.data.float().view(module.weight.shape[0], module.weight_scale.shape[-1], -1)
            module.weight_scale.data.copy_(groups.abs().amax(-1) / most)
            module.quantization_status = QuantizationStatus.FROZEN
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


ROWS = {"num_bits": 8, "strategy": "channel", "symmetric": True}
INPUTS = {"num_bits": 8, "strategy": "token", "symmetric": True, "dynamic": True}
SCHEMES: dict[str, Any] = {
    "W4A16": ({"weights": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True}}, "pack-quantized"),
    "W8A16": ({"weights": ROWS}, "pack-quantized"),
    "W8A8": ({"weights": ROWS, "input_activations": INPUTS}, "int-quantized"),
    "FP8": (
        {"weights": {**ROWS, "type": "float"}, "input_activations": {**INPUTS, "type": "float"}},
        "float-quantized",
    ),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors_give_the_model_s_own_logits(scheme: str, plain: Path, tmp_path: Path):
    pytest.importorskip("compressed_tensors")
    folder = compressed(plain, tmp_path / "stored", *SCHEMES[scheme])
    identity = model_identity(ModelRequest(str(folder), device="cpu"))
    assert identity["quantization"] == "compressed-tensors"
    ours = logits(folder).log_softmax(-1)
    own = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before = own.ct_decompress_hook
    assert before is not None
    unpack(own)
    first = parameters_digest(own)
    with torch.no_grad():
        theirs = own(IDS).logits[0].log_softmax(-1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # sums of one output layer in two orders
    assert parameters_digest(own) == first  # once unpacked, it stays as it is
    assert (
        1e-4 < float((ours - logits(plain).log_softmax(-1)).abs().max()) < 0.3
    )  # it is quantised, and not something else


@pytest.mark.parametrize("method", ["gptq", "awq", "hqq", "quanto", "eetq", "aqlm", "vptq"])
def test_a_method_whose_package_is_missing_says_which(method: str, plain: Path, tmp_path: Path):
    package = PACKAGES[method].split()[0]
    if importlib.util.find_spec(package.partition("-")[0]) is not None:
        pytest.skip(f"{package} is installed")
    settings = {"quant_method": method, "bits": 4, "group_size": 32, "zero_point": True}
    folder = stored_as(plain, tmp_path / method, settings, load_file(plain / "model.safetensors"))
    request = ModelRequest(str(folder), device="cpu")
    assert model_identity(request)["quantization"] == method
    with pytest.raises(TeacherError, match="quantised checkpoint cannot be loaded here") as caught:
        load_model(request)
    assert package in caught.value.details["try"]
