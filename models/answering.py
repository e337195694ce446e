"""Answers of a model to a batch of prompts: padded prompts, one call of `generate`, ids up to the end-of-text token.

The cache builder (answers that become targets) and the evaluation (answers that are scored) both use it. How a token is
chosen is the caller's: greedy, drawn with torch's generator, or drawn with noise of its own.

Shapes: B prompts of a batch, C prompt tokens, n answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kd.models.loading import Model
from kd.models.model_config import decoder_start, is_encoder_decoder
from kd.models.placement.spread_models import input_device
from kd.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    import torch

EndIds = int | Sequence[int] | None
"""The tokens that end an answer: one, several, or none."""
ANSWER_CONTEXT = 8
"""Tokens of the prompt that are decoded with an answer."""


@dataclass(frozen=True)
class Answer:
    """What a model wrote after one prompt."""

    ids: np.ndarray
    """[n] int64, without the end-of-text token"""
    ended: bool
    """Whether the model ended the text itself. If not, it ran into the limit."""


def answer_batch(
    model: Model,
    prompts: Sequence[np.ndarray],
    *,
    eos_id: EndIds,
    pad_id: int,
    forced: Sequence[int] = (),
    **options: Any,
) -> list[Answer]:
    """One answer per prompt.

    prompts   each [C >= 1] token ids, special tokens included
    eos_id    token that ends an answer, or several of them; None = the limit alone does
    pad_id    token that fills short prompts up; the attention mask hides it
    forced    ids that a decoder begins every answer with, after its start token; they are no part of the answer
    options   passed on to transformers' `generate`: how tokens are chosen, and how many at most
    """
    import torch

    causal = not is_encoder_decoder(model.config)
    ids_BC, mask_BC = padded_prompts(prompts, pad_id, left=causal)
    device = input_device(model)
    if forced:
        opening = torch.tensor([[decoder_start(model.config), *forced]], device=device)
        options["decoder_input_ids"] = opening.expand(len(prompts), -1)
    with torch.inference_mode():
        output = model.generate(input_ids=ids_BC.to(device), attention_mask=mask_BC.to(device), **options)
    # a causal model repeats the prompt, a decoder its start token and what was forced
    written = output[:, ids_BC.shape[1] if causal else 1 + len(forced) :].cpu().numpy()
    return [until_eos(row, eos_id) for row in written]


def answer_text(
    tokenizer: Tokenizer, ids: np.ndarray, context: np.ndarray | None, lead: str = "", **options: Any
) -> str:
    """The text of an answer, as it goes on after its prompt. Special tokens are left out.

    context   ids that the answer stands after, because a decoder of sentencepiece takes the space from a text's beginning;
              None for an encoder-decoder, whose answer begins a text
    lead      white space of the prompt that the answer's first token holds; it is taken off
    options   passed on to the tokenizer's `decode`
    """
    alone = str(tokenizer.decode(ids.tolist(), skip_special_tokens=True, **options))
    if context is None:
        return alone
    tail = context[-ANSWER_CONTEXT:].tolist()
    before = str(tokenizer.decode(tail, skip_special_tokens=True, **options))
    whole = str(tokenizer.decode([*tail, *ids.tolist()], skip_special_tokens=True, **options))
    text = whole[len(before) :] if before and whole.startswith(before) else alone
    if lead and not text.startswith(lead) and text[:1].isspace():
        return text[1:]  # a tokenizer that writes one space for any white space
    return text.removeprefix(lead)


def padded_prompts(prompts: Sequence[np.ndarray], pad_id: int, *, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, `[B, C]` int64 tensors. A causal model continues at the right edge: its padding is left."""
    import torch

    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for b, prompt in enumerate(prompts):
        columns = slice(longest - len(prompt), longest) if left else slice(0, len(prompt))
        ids[b, columns] = torch.from_numpy(prompt.astype(np.int64))
        mask[b, columns] = 1
    return ids, mask


def until_eos(row: np.ndarray, eos_id: EndIds) -> Answer:
    """`[n]` generated ids, padded after the end -> the answer before the first token that ends one."""
    ends = np.flatnonzero(np.isin(row, end_ids(eos_id)))
    return Answer(row[: ends[0]], True) if len(ends) else Answer(row, False)


def end_ids(eos_id: EndIds) -> list[int]:
    """The tokens that end an answer, as a list."""
    if eos_id is None:
        return []
    return [eos_id] if isinstance(eos_id, int) else list(eos_id)


def unused_ids(model: Model, vocabulary_size: int) -> list[int] | None:
    """Columns of the output layer that no token of the tokenizer has (padding), for `suppress_tokens`; None for none."""
    return list(range(vocabulary_size, int(model.get_output_embeddings().weight.shape[0]))) or None
