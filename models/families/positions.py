"""How many tokens a model can read at once, by the names that families give to that number."""

from __future__ import annotations

from typing import Any

RELATIVE_POSITIONS = ("t5", "mt5", "umt5", "longt5", "switch_transformers")
"""Model types with relative positions, which accept any length."""
AFTER_PADDING = (
    "roberta",
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
"""Model types whose first position is the one after the padding token's id: RoBERTa's 514 positions read 512 tokens."""
NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_encoder_position_embeddings")
"""Entries of configurations, the first that holds a number counts; `max_seq_len` is MPT's and `max_encoder_…` LED's."""


def max_positions(config: Any, *, decoder: bool = False) -> int | None:
    """Length in tokens of the longest sequence, or None for models without a limit.

    decoder   whether the decoder's side of an encoder-decoder is meant; LED's is shorter than its encoder's
    """
    config = config.get_text_config()
    if config.model_type in RELATIVE_POSITIONS:  # their n_positions is only the length they were trained on
        return None
    for name in ("max_decoder_position_embeddings", *NAMES) if decoder else NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int):
            if config.model_type in AFTER_PADDING:
                return value - int(config.pad_token_id) - 1
            return value if value > 0 else None  # XLNet says -1
    return None
