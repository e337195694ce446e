"""Random models of many families: two layers of width 32, no dropout, made by the classes of transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers

WITH_FINAL_BIAS = {
    "Bart": {},
    "BigBirdPegasus": {"attention_type": "original_full"},
    "Blenderbot": {},
    "BlenderbotSmall": {},
    "LED": {"attention_window": 8, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64},
    "Marian": {"decoder_start_token_id": 0, "pad_token_id": 0},
    "MBart": {"decoder_start_token_id": 3},
    "Mvp": {},
    "Pegasus": {},
    "PLBart": {"decoder_start_token_id": 3},
}
"""Families whose models add a `final_logits_bias`, and what their configurations need beside the shape."""
CLASSES = {
    "BlenderbotSmall": "BlenderbotSmallForConditionalGeneration",
    "Marian": "MarianMTModel",
    "MBart": "MBartForConditionalGeneration",
}


def encoder_decoder(family: str, vocabulary: int, **settings: Any) -> Any:
    """A random encoder-decoder of BART's kind, always the same, in float64 and evaluation mode."""
    shape = {
        "vocab_size": vocabulary,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 64,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "init_std": 0.3,
    }
    config = getattr(transformers, f"{family}Config")(**shape | WITH_FINAL_BIAS.get(family, {}) | settings)
    torch.manual_seed(0)
    return getattr(transformers, CLASSES.get(family, f"{family}ForConditionalGeneration"))(config).double().eval()


def with_bias(model: Any, nats: float = 1.0) -> Any:
    """The model with a `final_logits_bias` of normal noise."""
    noise = torch.Generator().manual_seed(1)
    model.final_logits_bias = torch.randn(model.final_logits_bias.shape, generator=noise).double() * nats
    return model
