"""Random models of many families: two layers of width 32, no dropout, made by the classes of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

WITH_FINAL_BIAS: dict[str, dict[str, Any]] = {
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
    shape: dict[str, Any] = {
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


def tiny_tokenizer(kind: str, folder: Path, **settings: Any) -> Path:
    """A folder with a tokenizer of letters: `Bart`, `Blenderbot`, `MBart`, `MBart50`, `Nllb` or `Pegasus`."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "an", "th"]
    first = ["<s>", "<pad>", "</s>", "<unk>"]
    scored: Any = [(piece, -float(i)) for i, piece in enumerate([*first, *letters])]
    if kind in ("Bart", "Blenderbot"):
        vocab: Any = {piece: i for i, piece in enumerate([*first, "Ġ", *letters[1:27], "Ġa", "an", "th", "<mask>"])}
        settings = {"merges": [("Ġ", "a"), ("a", "n"), ("t", "h")], **settings}
    elif kind == "Nllb":
        vocab = {piece: i for i, piece in enumerate([*first, *letters])}
        settings = {"merges": [("▁", "a"), ("a", "n"), ("t", "h")], **settings}
    elif kind == "Pegasus":
        vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *scored[4:]]
    else:
        vocab = scored
    getattr(transformers, f"{kind}Tokenizer")(vocab=vocab, **settings).save_pretrained(folder)
    return folder


FAMILIES: dict[str, tuple[str, str, dict[str, str]]] = {
    "bart": ("Bart", "Bart", {}),
    "led": ("LED", "Bart", {}),
    "mvp": ("Mvp", "Bart", {}),
    "blenderbot": ("Blenderbot", "Blenderbot", {}),
    "pegasus": ("Pegasus", "Pegasus", {}),
    "mbart": ("MBart", "MBart", {"source_lang": "fr_XX", "target_lang": "de_DE"}),
    "mbart50": ("MBart", "MBart50", {"source_lang": "fr_XX", "target_lang": "de_DE"}),
    "nllb": ("M2M100", "Nllb", {"source_lang": "fra_Latn", "target_lang": "deu_Latn"}),
}
"""Name -> classes of the model and of the tokenizer, and the languages."""


def family_folder(name: str, folder: Path) -> Path:
    """A random model of one of FAMILIES, with a final bias where it has one, and its tokenizer, saved in float32."""
    model_class, tokenizer_class, _ = FAMILIES[name]
    tiny_tokenizer(tokenizer_class, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    start = 0 if model_class in ("Pegasus", "Blenderbot") else 2
    model = encoder_decoder(model_class, len(tokenizer), **ends, decoder_start_token_id=start)
    model = with_bias(model) if hasattr(model, "final_logits_bias") else model
    model.float().save_pretrained(folder)
    return folder


SMALL: dict[str, Any] = {
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
}
"""Shape of a model: most families call its parts so."""

WRAPPED = ("gemma3", "qwen3_5", "qwen3_5_moe", "mistral3", "llama4", "llava", "idefics3", "paligemma", "qwen3_vl")
"""Model types whose checkpoints hold a text model and one for images."""


def wrapped_model(name: str, vocabulary: int) -> Any:
    """A random model of text and images, always the same, in evaluation mode; float64 but for mixtures of experts."""
    plain = transformers.AutoConfig.for_model(name)
    text = {
        "vocab_size": vocabulary,
        **SMALL,
        "model_type": plain.get_text_config().model_type,
    }
    linear: dict[str, Any] = {f"linear_{key}": 8 for key in ("key_head_dim", "value_head_dim")}
    qwen: dict[str, Any] = {"layer_types": ["linear_attention", "full_attention"], **linear}
    qwen |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
    experts = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16}
    text |= {
        "qwen3_5": qwen,
        "qwen3_5_moe": qwen | experts | {"num_experts_per_tok": 2, "shared_expert_intermediate_size": 16},
        "llama4": experts
        | {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "attention_chunk_size": 8, "no_rope_layers": [1, 0]}
        | {"layer_types": ["chunked_attention", "full_attention"]},
        "qwen3_vl": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}},
    }.get(name, {})
    images = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "depth": 2,
        "num_heads": 4,
        "out_hidden_size": 32,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
        "model_type": plain.vision_config.model_type,
    }
    torch.manual_seed(0)
    config = type(plain)(text_config=text, vision_config=images)
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model if name == "qwen3_5_moe" else model.double()


def state_space_model(name: str, vocabulary: int) -> Any:
    """A random `mamba`, `mamba2` or `falcon_mamba`, whose states stay in float32 whatever the dtype of its weights."""
    mamba2 = {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8}
    shape = {"vocab_size": vocabulary, "hidden_size": 32, "num_hidden_layers": 2, "residual_in_fp32": True}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.AutoConfig.for_model(name, **shape, **ends, **(mamba2 if name == "mamba2" else {}))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(0, 0.2)
    return model


CAUSAL = {
    "gpt2": {},
    "gptj": {"rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 48},
    "bloom": {},
    "falcon": {},
    "mpt": {},
    "phi3": {},
    "olmo2": {},
    "mixtral": {"num_local_experts": 4},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 48, "attention_chunk_size": 8},
    "gemma3_text": {},
    "rwkv": {},
    "jamba": {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64},
    "ctrl": {"dff": 48},
    "biogpt": {},
    "gpt_oss": {"num_local_experts": 4},
    "mamba": {"intermediate_size": 64},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 8, "chunk_size": 8},
    "falcon_mamba": {},
}
"""Model types of causal models, and what their configurations need beside the shape."""


def causal_model(name: str, vocabulary: int) -> Any:
    """A random model of one of CAUSAL, always the same, without dropout, in float32 and evaluation mode."""
    shape = {
        "vocab_size": vocabulary,
        **SMALL,
        "num_experts_per_tok": 2,
    }
    plain = transformers.AutoConfig.for_model(name)
    taken = {key: value for key, value in shape.items() if key in plain.to_dict() or key in plain.attribute_map}
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **taken | CAUSAL[name])
    return transformers.AutoModelForCausalLM.from_config(config).eval()
