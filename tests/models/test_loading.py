"""Known shapes have the published sizes, random weights are seeded, the output layer comes apart exactly."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kd.common.errors import DataError, TeacherError
from kd.common.extras import MissingPackageError
from kd.models.families.positions import max_positions
from kd.models.heads import split_head
from kd.models.loading import load_model, parameter_count
from kd.models.model_config import decoder_start, load_config, load_request_tokenizer
from kd.models.model_request import ModelRequest, resolve_device
from kd.models.shapes import SHAPES

PARAMETERS = {  # as published; counted from the real configs
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt-neo-2.7B": 2_651_307_520,
    "pythia-410m": 405_334_016,
    "SmolLM-360M": 361_821_120,
    "flan-t5-small": 76_961_152,
    "flan-t5-base": 247_577_856,
    "flan-t5-large": 783_150_080,
    "flan-t5-xl": 2_849_757_184,
    "flan-t5-xxl": 11_135_332_352,
    # by hand: embeddings (2048 + 256) * 96; per layer 12 * 96^2 weights and 13 * 96 biases and norms; last norm 2 * 96
    "demo-student": (2048 + 256) * 96 + 3 * (12 * 96**2 + 13 * 96) + 2 * 96,
    "demo-student-s": (2048 + 256) * 48 + 2 * (12 * 48**2 + 13 * 48) + 2 * 48,
    "demo-student-l": (2048 + 256) * 192 + 4 * (12 * 192**2 + 13 * 192) + 2 * 192,
    # the same with 50257 + 1024 embeddings of width 128 and 4 layers
    "gpt2-mini": (50257 + 1024) * 128 + 4 * (12 * 128**2 + 13 * 128) + 2 * 128,
    # embedding and output layer 2 * 1216 * 128; attention 4 * 128^2 and gated feed-forward 3 * 128 * 256, with a norm each:
    # 2 layers of one attention, 2 of two; a last norm and 32 x 4 relative positions on either side
    "demo-t5-student": 2 * 1216 * 128 + 6 * (4 * 128**2 + 128) + 4 * (3 * 128 * 256 + 128) + 2 * (128 + 32 * 4),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_random_shapes_have_the_published_parameter_count(shape: str):
    assert parameter_count(ModelRequest(f"random:{shape}")) == PARAMETERS[shape]


def test_random_weights_are_a_function_of_the_seed():
    first, again, other = (load_model(ModelRequest("random:demo-student", seed=s, device="cpu")) for s in (1, 1, 2))
    a, b, c = (m.transformer.h[0].attn.c_attn.weight for m in (first, again, other))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert not first.training


def test_random_weights_leave_the_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    load_model(ModelRequest("random:demo-student", device="cpu"))
    assert torch.equal(torch.rand(1), expected)


def test_an_unknown_shape_and_an_unknown_dtype_suggest_the_nearest():
    with pytest.raises(DataError) as caught:
        ModelRequest("random:gpt-2")
    assert caught.value.details["did you mean"] == "gpt2"
    with pytest.raises(DataError) as caught:
        ModelRequest("random:gpt2", dtype="bfloat-16")
    assert caught.value.details["did you mean"] == "bfloat16"


def test_positions_are_read_from_every_family():
    assert {name: max_positions(build()) for name, build in SHAPES.items()} == {
        "demo-student": 256,
        "demo-student-s": 256,
        "demo-student-l": 256,
        "gpt2-mini": 1024,
        "gpt2": 1024,
        "gpt2-medium": 1024,
        "gpt-neo-2.7B": 2048,
        "pythia-410m": 2048,
        "SmolLM-360M": 2048,
        "flan-t5-small": None,
        "flan-t5-base": None,
        "flan-t5-large": None,
        "flan-t5-xl": None,
        "flan-t5-xxl": None,
        "demo-t5-student": None,
    }


def test_an_unreachable_model_says_what_could_have_been_given():
    with pytest.raises(TeacherError, match="cannot load the model") as caught:
        load_config(ModelRequest("nobody/nothing"))
    assert "random:NAME" in str(caught.value)


# loading


def test_a_saved_model_loads_in_the_dtype_asked_for(model_dir: Path):
    assert load_model(ModelRequest(str(model_dir), device="cpu")).dtype == torch.float32
    assert load_model(ModelRequest(str(model_dir), device="cpu", dtype="bfloat16")).dtype == torch.bfloat16


def test_the_tokenizer_is_that_beside_the_model_unless_another_is_named(model_dir: Path, tokenizer_dir: Path):
    assert len(load_request_tokenizer(ModelRequest(str(model_dir)))) == 400
    assert len(load_request_tokenizer(ModelRequest("random:gpt2", tokenizer=str(tokenizer_dir)))) == 400


def test_4_bit_loading_without_bitsandbytes_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingPackageError, match="needs bitsandbytes") as caught:
        load_model(ModelRequest("random:demo-student", device="cpu", load_in_4bit=True))
    assert "pip install 'kd-logit-cache[quantization]'" in str(caught.value)


def test_widths_that_4_bits_on_a_cpu_cannot_take_are_refused_before_the_first_pass(t5_dir: Path):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(TeacherError, match="on a CPU") as caught:
        load_model(ModelRequest(str(t5_dir), device="cpu", load_in_4bit=True))  # its layers are 32 wide
    assert "multiples of 64" in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_a_clear_error():
    with pytest.raises(DataError, match="no CUDA device"):
        resolve_device("cuda")


def test_an_encoder_decoder_loads_with_its_own_class_and_an_untied_head(t5_dir: Path):
    for request in (ModelRequest(str(t5_dir), device="cpu"), ModelRequest("random:flan-t5-small", device="cpu")):
        model = load_model(request)
        assert type(model).__name__ == "T5ForConditionalGeneration"
        assert model.lm_head.weight is not model.shared.weight
        assert not torch.equal(model.lm_head.weight, model.shared.weight)


def test_feed_forward_outputs_of_t5_stay_in_float32_where_float16_overflows():
    model = load_model(ModelRequest("random:flan-t5-small", device="cpu", dtype="float16"))
    layer = model.encoder.block[0].layer[1].DenseReluDense
    assert (layer.wo.weight.dtype, layer.wi_0.weight.dtype) == (torch.float32, torch.float16)


# the output layer apart


def tiny(family: str):
    """Random causal models of a few thousand parameters."""
    import transformers as t

    shape = {
        "vocab_size": 50,
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 32,
    }
    grouped = {**shape, "num_key_value_heads": 1, "head_dim": 8}
    configs = {
        "gpt2": lambda: t.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32),
        "gpt_neox": lambda: t.GPTNeoXConfig(**shape),
        "gpt_neo": lambda: t.GPTNeoConfig(
            vocab_size=50,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            window_size=4,
        ),
        "llama": lambda: t.LlamaConfig(**shape),
        "gemma2": lambda: t.Gemma2Config(**grouped, final_logit_softcapping=30.0),
        "granite": lambda: t.GraniteConfig(**shape, logits_scaling=8.0),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return t.AutoModelForCausalLM.from_config(configs[family]()).eval()


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_neo", "llama"])
def test_hidden_states_times_the_head_are_the_models_logits(family: str):
    model = tiny(family)
    head = split_head(model)
    ids = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = torch.nn.functional.linear(head.hidden(ids, None), head.weight, head.bias)
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)  # the same float32 product twice


@pytest.mark.parametrize(
    ("family", "tied"),
    [
        ("T5", False),
        ("T5", True),
        ("MT5", True),
        ("UMT5", False),
        ("UMT5", True),
        ("LongT5", True),
        ("SwitchTransformers", True),
        ("SwitchTransformers", False),
    ],
)
def test_a_decoder_s_hidden_states_times_the_head_are_the_model_s_logits(family: str, tied: bool):
    """T5 and its kin scale the decoder's output where the head is tied to the embedding."""
    import transformers as t

    config = getattr(t, f"{family}Config")(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    model = getattr(t, f"{family}ForConditionalGeneration")(config).eval()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(50, 16))
    head = split_head(model)
    rng = np.random.default_rng(0)
    contexts, targets = ([rng.integers(3, 50, n) for n in sizes] for sizes in ((7, 3, 1), (2, 5, 1)))
    with torch.no_grad():
        got = torch.nn.functional.linear(head.scored_hidden(contexts, targets), head.weight)
        alone = [
            model(input_ids=torch.from_numpy(c)[None], labels=torch.from_numpy(y)[None]).logits[0]
            for c, y in zip(contexts, targets, strict=True)
        ]
    torch.testing.assert_close(got, torch.cat(alone), rtol=1e-4, atol=1e-4)  # padded and alone: float32 sums reordered


def test_splitting_leaves_the_model_as_it_was():
    model = tiny("gpt2").train()
    ids = torch.arange(5)[None]
    before = model.eval()(input_ids=ids).logits
    model.train()
    split_head(model)
    assert model.training
    assert torch.equal(model.eval()(input_ids=ids).logits, before)


def test_an_output_layer_that_is_not_linear_is_refused():
    model = tiny("gpt2")
    model.lm_head = torch.nn.Sequential(model.lm_head)
    with pytest.raises(TeacherError, match="not a plain linear layer"):
        split_head(model)


@pytest.mark.parametrize(
    "config", [SimpleNamespace(model_type="t5gemma"), SimpleNamespace(model_type="t5", decoder_start_token_id=None)]
)
def test_a_model_that_does_not_say_what_its_decoder_starts_from_is_refused(config: SimpleNamespace):
    with pytest.raises(TeacherError, match="no start token for its decoder") as caught:
        decoder_start(config)
    assert caught.value.details["where"] == config.model_type


def test_a_model_that_is_misspelled_is_named_with_the_nearest(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "student").symlink_to(model_dir)
    for name, meant in (("dmeo", "demo"), ("runs/studnet", "runs/student"), ("us/something-else", None)):
        with pytest.raises(TeacherError, match="cannot load") as error:
            load_config(ModelRequest(name))
        assert error.value.details.get("did you mean") == meant
