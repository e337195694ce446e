"""Limits of positions by the names that families give them; None where there is no limit."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_families import encoder_decoder

from kd.models.families.positions import AFTER_PADDING, max_positions

ENCODERS = ("ibert", "longformer", "mpnet")
"""Model types that have no causal model: they classify."""
LANGUAGE = {"xmod": {"languages": ["en_XX"], "default_language": "en_XX"}}


@pytest.mark.parametrize(
    ("name", "settings", "limit", "written"),
    [
        ("gpt2", {"n_positions": 64}, 64, 64),
        ("llama", {"max_position_embeddings": 64}, 64, 64),
        ("mpt", {"max_seq_len": 64}, 64, 64),
        ("dbrx", {"max_seq_len": 64}, 64, 64),
        ("openai-gpt", {"n_positions": 64}, 64, 64),
        ("led", {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 32}, 64, 32),
        ("bart", {"max_position_embeddings": 64}, 64, 64),
        ("pegasus_x", {"max_position_embeddings": 64}, 64, 64),
        ("gemma3", {"text_config": {"max_position_embeddings": 64}}, 64, 64),
        ("xlnet", {}, None, None),
        ("bloom", {}, None, None),
        ("mamba", {}, None, None),
        ("t5", {"n_positions": 64}, None, None),
        ("umt5", {}, None, None),
        ("roberta", {"max_position_embeddings": 66, "pad_token_id": 1}, 64, 64),
    ],
)
def test_the_limit_of_each_side(name: str, settings: dict, limit: int | None, written: int | None) -> None:
    config = transformers.AutoConfig.for_model(name, **settings)
    assert max_positions(config) == limit
    assert max_positions(config, decoder=True) == written


@pytest.mark.parametrize("side", ["input_ids", "decoder_input_ids"])
def test_led_reads_as_many_tokens_as_its_limits_say_and_no_more(side: str) -> None:
    model = encoder_decoder("LED", 60, max_decoder_position_embeddings=16)
    limit = max_positions(model.config, decoder=side == "decoder_input_ids")
    assert limit is not None
    inputs = {"input_ids": torch.ones(1, 8, dtype=torch.long), "decoder_input_ids": torch.ones(1, 2, dtype=torch.long)}
    with torch.no_grad():
        model(**inputs | {side: torch.ones(1, limit, dtype=torch.long)})
        with pytest.raises(IndexError):
            model(**inputs | {side: torch.ones(1, limit + 8, dtype=torch.long)})


def test_mpt_reads_no_more_than_its_limit() -> None:
    shape = {"d_model": 32, "n_heads": 4, "n_layers": 1, "vocab_size": 60, "max_seq_len": 16}
    config = transformers.AutoConfig.for_model("mpt", **shape)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model(torch.ones(1, 16, dtype=torch.long))
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            model(torch.ones(1, 17, dtype=torch.long))


@pytest.mark.parametrize("name", [name for name in AFTER_PADDING if name not in ENCODERS])
def test_models_that_count_from_the_padding_token_read_as_many_tokens_as_their_limit(name: str) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.AutoConfig.for_model(
        name,
        vocab_size=60,
        max_position_embeddings=18,
        pad_token_id=3,
        is_decoder=True,
        **shape,
        **LANGUAGE.get(name, {}),
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    limit = max_positions(config)
    assert limit == 14
    with torch.no_grad():
        model(torch.ones(1, limit, dtype=torch.long))
        with pytest.raises((RuntimeError, IndexError)):
            model(torch.ones(1, limit + 1, dtype=torch.long))
