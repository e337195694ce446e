"""Random models of the layouts that can be packed: two layers of width 32, 64 positions, no dropout."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

LAYOUTS = ("gpt2", "gpt_neox", "llama", "mistral", "gpt_neo", "t5")


def with_kinds(layouts: tuple[str, ...]) -> list[tuple[str, str]]:
    """Each with every kind of attention that it has."""
    return [(name, kind) for name in layouts for kind in ("sdpa", "eager") if (name, kind) != ("gpt_neo", "sdpa")]


def tiny_model(layout: str, kind: str, vocabulary: int, *, window: int) -> Any:
    """Always the same, in float64; `window`: tokens that the local layers of mistral and gpt_neo see."""
    rope = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    }
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    models = {
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_positions=64,
                n_embd=32,
                n_layer=2,
                n_head=4,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **ends,
            )
        ),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**rope)),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**rope, num_key_value_heads=2)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**rope, num_key_value_heads=2, sliding_window=window)),
        "gpt_neo": lambda: GPTNeoForCausalLM(
            GPTNeoConfig(
                vocab_size=vocabulary,
                max_position_embeddings=64,
                hidden_size=32,
                num_layers=2,
                num_heads=4,
                window_size=window,
                attention_types=[[["global", "local"], 1]],
                resid_dropout=0.0,
                embed_dropout=0.0,
                attention_dropout=0.0,
                **ends,
            )
        ),
        "t5": lambda: T5ForConditionalGeneration(
            T5Config(
                vocab_size=vocabulary,
                d_model=32,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                decoder_start_token_id=0,
            )
        ),
    }
    torch.manual_seed(0)
    model = models[layout]().double()
    model.set_attn_implementation(kind)
    return model
