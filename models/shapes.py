"""Random weights in the real shape of a known model: `random:NAME`.

The shapes come from the models' public configurations, except `gpt2-mini`, a GPT-2 of width 128 for short runs, and the
demo's students. A test checks the parameter counts on the meta device. To add a shape, add a line to `SHAPES`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def _gpt2(vocab: int = 50257, positions: int = 1024, **shape: Any) -> Callable[[], Any]:
    def build() -> Any:
        from transformers import GPT2Config

        end = 50256 if vocab > 50256 else 0
        return GPT2Config(
            vocab_size=vocab,
            n_positions=positions,
            bos_token_id=end,
            eos_token_id=end,
            architectures=["GPT2LMHeadModel"],
            **shape,
        )

    return build


def _gpt_neo_2_7b() -> Any:
    from transformers import GPTNeoConfig

    return GPTNeoConfig(
        vocab_size=50257,
        max_position_embeddings=2048,
        hidden_size=2560,
        num_layers=32,
        num_heads=20,
        attention_types=[[["global", "local"], 16]],
        window_size=256,
        resid_dropout=0.0,
        embed_dropout=0.0,
        attention_dropout=0.0,
        architectures=["GPTNeoForCausalLM"],
    )


def _pythia_410m() -> Any:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        architectures=["GPTNeoXForCausalLM"],
    )


def _smollm_360m() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152,
        hidden_size=960,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        intermediate_size=2560,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        architectures=["LlamaForCausalLM"],
    )


def _flan_t5(
    d_model: int, d_ff: int, layers: int, heads: int, *, vocab: int = 32128, d_kv: int = 64, dropout: float = 0.1
) -> Callable[[], Any]:
    def build() -> Any:
        from transformers import T5Config

        return T5Config(
            vocab_size=vocab,
            d_model=d_model,
            d_kv=d_kv,
            d_ff=d_ff,
            num_layers=layers,
            num_decoder_layers=layers,
            num_heads=heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=dropout,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=False,
            architectures=["T5ForConditionalGeneration"],
        )

    return build


SHAPES: dict[str, Callable[[], Any]] = {
    "demo-student": _gpt2(2048, 256, n_embd=96, n_layer=3, n_head=3, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "demo-student-s": _gpt2(2048, 256, n_embd=48, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "demo-student-l": _gpt2(
        2048, 256, n_embd=192, n_layer=4, n_head=6, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
    "gpt2-mini": _gpt2(n_embd=128, n_layer=4, n_head=4),
    "gpt2": _gpt2(),
    "gpt2-medium": _gpt2(n_embd=1024, n_layer=24, n_head=16),
    "gpt-neo-2.7B": _gpt_neo_2_7b,
    "pythia-410m": _pythia_410m,
    "SmolLM-360M": _smollm_360m,
    "demo-t5-student": _flan_t5(128, 256, 2, 4, vocab=1216, d_kv=32, dropout=0.0),
    "flan-t5-small": _flan_t5(512, 1024, 8, 6),
    "flan-t5-base": _flan_t5(768, 2048, 12, 12),
    "flan-t5-large": _flan_t5(1024, 2816, 24, 16),
    "flan-t5-xl": _flan_t5(2048, 5120, 24, 32),
    "flan-t5-xxl": _flan_t5(4096, 10240, 24, 64),
}
