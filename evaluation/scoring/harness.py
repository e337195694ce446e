"""lm-evaluation-harness's way from strings to token ids, so that both score the same tokens after the same context.

    causal            the context alone and context + continuation are tokenised, with the special tokens that the
                      tokenizer adds by itself; the continuation is what the second has beyond the length of the first
    encoder-decoder   the context with its special tokens for the encoder, the continuation without any

White space at the end of a context moves to the continuation, where the tokenizer has learnt to see it. A text longer
than the window loses its beginning, every option by itself: options of one question may then follow contexts of
different lengths. Read from lm_eval 0.4.13 (`TemplateLM._encode_pair`, `HFLM._loglikelihood_tokens`) and compared with
its own runs, choice for choice, in tests/evaluation/test_harness.py. Gao et al., The Language Model Evaluation Harness.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kd.models.tokenizer import Tokenizer

UNLIMITED = 1000000000000000019884624838656
"""Value of a tokenizer's `model_max_length` that nobody has set."""
DEFAULT_WINDOW = 2048
"""Tokens of the window where neither model nor tokenizer has a limit."""


def harness_window(config: Any, tokenizer: Tokenizer) -> int:
    """Tokens that lm-eval feeds a model at once: the first of these that is set, T5's `n_positions` included."""
    config = getattr(config, "text_config", None) or config
    stated = (getattr(config, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
    for value in (*stated, getattr(tokenizer, "model_max_length", None)):
        if value is not None and value != UNLIMITED:
            return int(value)
    return DEFAULT_WINDOW


def encode_pair(
    tokenizer: Tokenizer, context: str, continuation: str, *, encoder: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ids of the context `[C]` and of the continuation `[n]`, int32, of whatever length; `context` is not empty."""
    kept = context.rstrip()
    if kept:
        context, continuation = kept, context[len(kept) :] + continuation
    first = _encode(tokenizer, context)
    if encoder:
        after = tokenizer.encode(continuation, add_special_tokens=False, verbose=False)
    else:
        after = _encode(tokenizer, context + continuation)[len(first) :]
    return np.array(first, dtype=np.int32), np.array(after, dtype=np.int32)


def cut_context(context_ids: np.ndarray, count: int, window: int, *, encoder: bool) -> np.ndarray:
    """The end of a context that the window holds before `count` tokens, of which a causal model is not fed the last."""
    return context_ids[-window:] if encoder else context_ids[-(window + 1 - count) :]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """With the tokenizer's own special tokens, unless the text already begins with the one that opens texts."""
    opening = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if opening is not None and text.startswith(tokenizer.decode([opening])):
        return list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    return list(tokenizer.encode(text, verbose=False))
