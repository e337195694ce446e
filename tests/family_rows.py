"""A tiny random model of every row of docs/models.md: two layers of width 32, no dropout, made by the classes of transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tiny_families import WRAPPED, wrapped_model

from kd.models.loading import load_model
from kd.models.model_request import ModelRequest

VOCABULARY = 64
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "moe_num_experts": 4,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "shared_expert_intermediate_size": 16,
    "ffn_dim": 48,
    "d_ff": 48,
    "dff": 48,
    "word_embed_proj_dim": 32,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "attention_dropout": 0.0,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "hidden_dropout": 0.0,
}
"""Entries of configurations and their values; a configuration takes those that it knows."""
LATENT = "qk_rope_head_dim"
"""An entry of families with latent attention, whose `head_dim` means something else."""


@dataclass(frozen=True)
class Row:
    """One row of the table: how its model is made."""

    model_type: str
    settings: Mapping[str, Any]
    make: Callable[[str, Mapping[str, Any]], Any]

    def model(self) -> Any:
        """The model, always the same, in float32 and evaluation mode."""
        torch.manual_seed(0)
        return _loud(self.make(self.model_type, self.settings)).eval()


def _loud(model: Any) -> Any:
    """The model with logits of a few nats: what newly made weights give is hardly more than noise."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


def _taken(model_type: str, settings: Mapping[str, Any], shape: dict[str, Any]) -> dict[str, Any]:
    plain = transformers.AutoConfig.for_model(model_type)
    known = {*plain.to_dict(), *plain.attribute_map}
    latent = {"num_key_value_heads": 4} if LATENT in known else {}
    left_out = {"head_dim"} if latent else set()
    return {k: v for k, v in (shape | latent).items() if k in known and k not in left_out} | dict(settings)


def _causal(model_type: str, settings: Mapping[str, Any]) -> Any:
    config = transformers.AutoConfig.for_model(model_type, **_taken(model_type, settings, SHAPE))
    return transformers.AutoModelForCausalLM.from_config(config)


def _biased(model_type: str, settings: Mapping[str, Any]) -> Any:
    model = _causal(model_type, settings)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.randn(VOCABULARY))
    return model


TWO_SIDED: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "num_sparse_encoder_layers": 1,
    "num_sparse_decoder_layers": 1,
    "num_experts": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 64,
    "attention_window": 8,
    "dropout": 0.0,
    "dropout_rate": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "hidden_size": 32,
    "num_encoder_layers": 2,
    "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
}


def _two_sided(model_type: str, settings: Mapping[str, Any]) -> Any:
    taken = _taken(model_type, settings, TWO_SIDED) | {"decoder_start_token_id": 0}
    return transformers.AutoModelForSeq2SeqLM.from_config(transformers.AutoConfig.for_model(model_type, **taken))


def _pair(model_type: str, settings: Mapping[str, Any]) -> Any:
    """An encoder and a decoder, each with the shape of a causal model."""
    part = settings["part"]
    one = transformers.AutoConfig.for_model(part, **_taken(part, {}, SHAPE))
    plain = transformers.AutoConfig.for_model(model_type, encoder=one.to_dict(), decoder=one.to_dict())
    plain.decoder_start_token_id, plain.is_encoder_decoder = 1, True
    plain.decoder.is_decoder, plain.decoder.add_cross_attention = True, True
    return transformers.AutoModelForSeq2SeqLM.from_config(plain)


def _with_final_bias(model_type: str, settings: Mapping[str, Any]) -> Any:
    model = _two_sided(model_type, settings)
    model.final_logits_bias = torch.randn(1, VOCABULARY)
    return model


def _wrapped(model_type: str, settings: Mapping[str, Any]) -> Any:
    """The text model of a checkpoint of text and images, as it is loaded by name."""
    with tempfile.TemporaryDirectory() as folder:
        wrapped_model(model_type, VOCABULARY).float().save_pretrained(folder)
        return load_model(ModelRequest(folder, device="cpu", dtype="float32"))


def _rows(make: Callable[[str, Mapping[str, Any]], Any], rows: Mapping[str, Any]) -> dict[str, Row]:
    """Name -> settings, or (model type, settings) where the row has another name than its type."""
    pairs = {name: row if isinstance(row, tuple) else (name, row) for name, row in rows.items()}
    return {name: Row(model_type, settings, make) for name, (model_type, settings) in pairs.items()}


MAMBA2 = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8}
ROWS: dict[str, Row] = {
    **_rows(
        _causal,
        {
            "afmoe": {},
            "apertus": {},
            "arcee": {},
            "aria_text": {},
            "bamba": {},
            "beam": {},
            "bert_decoder": ("bert", {"is_decoder": True}),
            "bert_not_a_decoder": ("bert", {}),
            "megatron-bert_decoder": ("megatron-bert", {"is_decoder": True}),
            "roformer_decoder": ("roformer", {"is_decoder": True}),
            "big_bird_decoder": ("big_bird", {"is_decoder": True, "attention_type": "original_full"}),
            "camembert_decoder": ("camembert", {"is_decoder": True}),
            "data2vec-text_decoder": ("data2vec-text", {"is_decoder": True}),
            "electra_decoder": ("electra", {"is_decoder": True, "embedding_size": 16}),
            "ernie_decoder": ("ernie", {"is_decoder": True}),
            "rembert_decoder": (
                "rembert",
                {"is_decoder": True, "input_embedding_size": 16, "output_embedding_size": 24},
            ),
            "roberta-prelayernorm_decoder": ("roberta-prelayernorm", {"is_decoder": True}),
            "roc_bert_decoder": ("roc_bert", {"is_decoder": True}),
            "xlm-roberta_decoder": ("xlm-roberta", {"is_decoder": True}),
            "xlm-roberta-xl_decoder": ("xlm-roberta-xl", {"is_decoder": True}),
            "xmod_decoder": (
                "xmod",
                {"is_decoder": True, "languages": ["en_XX"], "default_language": "en_XX"},
            ),
            "bert-generation_decoder": ("bert-generation", {"is_decoder": True}),
            "biogpt": {},
            "bitnet": {},
            "bloom": {},
            "codegen": {"rotary_dim": 4},
            "cohere": {},
            "cohere2": {},
            "cohere2_moe": {},
            "cpmant": {},
            "ctrl": {},
            "cwm": {},
            "dbrx": {
                "n_heads": 4,
                "d_model": 32,
                "n_layers": 2,
                "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
                "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
            },
            "deepseek_v2": {},
            "deepseek_v3": {},
            "diffllama": {},
            "doge": {},
            "dots1": {},
            "ernie4_5": {},
            "ernie4_5_moe": {},
            "exaone4": {},
            "exaone_moe": {},
            "falcon": {},
            "falcon_alibi": ("falcon", {"alibi": True}),
            "falcon_h1": {"mamba_d_ssm": 64},
            "falcon_h1_mult": ("falcon_h1", {"mamba_d_ssm": 64, "lm_head_multiplier": 0.3}),
            "falcon_mamba": {},
            "flex_olmo": {},
            "gemma": {},
            "gemma2": {},
            "gemma2_nocap": ("gemma2", {"final_logit_softcapping": None}),
            "gemma3_text": {},
            "gemma3n_text": {
                "num_kv_shared_layers": 0,
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 8,
                "activation_sparsity_pattern": [0.5, 0.0],
                "laurel_rank": 8,
                "intermediate_size": [48, 48],
            },
            "gemma4_text": {
                "vocab_size_per_layer_input": VOCABULARY,
                "hidden_size_per_layer_input": 8,
                "global_head_dim": 8,
            },
            "gemma4_text_cap30": (
                "gemma4_text",
                {
                    "vocab_size_per_layer_input": VOCABULARY,
                    "hidden_size_per_layer_input": 8,
                    "global_head_dim": 8,
                    "final_logit_softcapping": 30.0,
                },
            ),
            "glm": {},
            "glm4": {},
            "glm4_moe": {},
            "glm4_moe_lite": {},
            "gpt2": {},
            "gpt_bigcode": {},
            "gpt_neo": {
                "attention_types": [[["global", "local"], 1]],
                "num_layers": 2,
                "window_size": 8,
                "embed_dropout": 0.0,
            },
            "gpt_neox": {},
            "gpt_neox_japanese": {},
            "gpt_oss": {},
            "gptj": {"rotary_dim": 4},
            "granite": {"logits_scaling": 8.0},
            "granite_scaling1": ("granite", {}),
            "granite_swa": {"logits_scaling": 8.0},
            "granitemoe": {"logits_scaling": 6.0},
            "granitemoe_swa": {"logits_scaling": 6.0},
            "granitemoehybrid": {
                "logits_scaling": 6.0,
                "layer_types": ["mamba", "attention"],
                "shared_intermediate_size": 16,
            },
            "granitemoeshared": {"logits_scaling": 6.0, "shared_intermediate_size": 16},
            "helium": {},
            "hunyuan_v1_dense": {},
            "hunyuan_v1_moe": {},
            "hyperclovax": {"logits_scaling": 0.5},
            "inkling_text": {"unpadded_vocab_size": 60},
            "inkling2_text": {"unpadded_vocab_size": 60},
            "jais2": {},
            "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
            "jetmoe": {},
            "lfm2": {"layer_types": ["conv", "full_attention"]},
            "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
            "llama": {},
            "llama4_text": {"intermediate_size_mlp": 48, "attention_chunk_size": 8},
            "mamba": {},
            "mamba2": MAMBA2,
            "minicpm3": {},
            "minimax": {},
            "minimax_m2": {},
            "ministral": {},
            "ministral3": {},
            "mistral": {},
            "mixtral": {},
            "modernbert-decoder": {},
            "mpt": {},
            "mpt_logit_scale": ("mpt", {"logit_scale": 0.5}),
            "nanochat": {},
            "nemotron": {},
            "nemotron_h": {},
            "olmo": {},
            "olmo2": {},
            "olmo3": {},
            "olmoe": {},
            "openai-gpt": {},
            "opt": {},
            "opt_proj": ("opt", {"word_embed_proj_dim": 16}),
            "persimmon": {},
            "phi": {},
            "phi3": {},
            "phimoe": {},
            "qwen2": {},
            "qwen2_moe": {},
            "qwen3": {},
            "qwen3_5_moe_text": {"layer_types": ["linear_attention", "full_attention"]},
            "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"]},
            "qwen3_moe": {},
            "qwen3_next": {"layer_types": ["linear_attention", "full_attention"]},
            "recurrent_gemma": {},
            "roberta_decoder": ("roberta", {"is_decoder": True}),
            "rwkv": {},
            "seed_oss": {},
            "smollm3": {},
            "stablelm": {},
            "starcoder2": {},
            "vaultgemma": {},
            "xglm": {},
            "xlnet": {"d_head": 8},
            "xlstm": {},
            "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2},
            "zamba2": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
        },
    ),
    **_rows(_biased, {"llama_tied_bias": ("llama", {"tie_word_embeddings": True})}),
    **_rows(
        _two_sided,
        {
            "bart_neutral": ("bart", {}),
            "bigbird_pegasus": {"attention_type": "original_full"},
            "fsmt": {"langs": ["en", "de"], "src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY},
            "longt5": {},
            "longt5_tglobal": ("longt5", {"encoder_attention_type": "transient-global"}),
            "m2m_100": {},
            "mt5": {},
            "mt5_untied": ("mt5", {"tie_word_embeddings": False}),
            "nllb-moe": {},
            "pegasus_x": {},
            "prophetnet": {},
            "switch_smallcap": ("switch_transformers", {"expert_capacity": 4}),
            "switch_transformers": {},
            "t5": {},
            "t5_untied": ("t5", {"tie_word_embeddings": False}),
            "t5_v1.1": ("t5", {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}),
            "umt5": {},
            "umt5_tied": ("umt5", {"tie_word_embeddings": True}),
            "umt5_untied": ("umt5", {"tie_word_embeddings": False}),
        },
    ),
    **_rows(
        _pair,
        {"encoder-decoder (bert2bert)": ("encoder-decoder", {"part": "bert"}), "t5gemma": {"part": "t5_gemma_module"}},
    ),
    **_rows(
        _with_final_bias,
        {
            "bart": {},
            "blenderbot": {},
            "blenderbot-small": {},
            "led": {},
            "marian": {},
            "mbart": {},
            "mvp": {},
            "pegasus": {},
            "plbart": {},
        },
    ),
    **_rows(_wrapped, {f"{name} (text and images)": (name, {}) for name in WRAPPED}),
}
