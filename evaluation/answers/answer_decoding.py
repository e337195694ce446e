"""Prompts to token ids, and answers to them: greedy, or drawn at a temperature.

Decoding is transformers' own `generate` with the most probable token at every step and nothing else. Sampling, penalties
or forced tokens of the model's `generation_config` are set aside, because two models compare only under one rule. Ids that
the tokenizer cannot emit (padded columns of the output layer) are never chosen. With a temperature, a token is drawn from
the whole softmax, as the most probable token after noise:

    argmax_k (z_k / T + g_k)        g_k = -ln(-ln u_k), u_k uniform: a draw from softmax(z / T)         (Gumbel 1954)

The noise of a prompt depends on the seed and the prompt's tokens alone. So neither batches, limits nor the order of the
examples change an answer, and no generator of the process is touched.

    causal            [BOS] prompt separator, padded on the left      at most window - max_new_tokens context tokens
                      (without white space at its end that an answer's first token holds, as in training)
    chat              the conversation with the generation prompt     likewise; see `kd.evaluation.scoring.chat_asking`
    encoder-decoder   prompt EOS to the encoder, padded on the right  at most window context tokens
                      (or the prompt in the tokenizer's own template, see `kd.models.families.encoder_layout`)

Prompts that are longer lose their beginning and are counted. Batches hold prompts of similar length.

Shapes: B prompts of a batch, C context tokens, V columns of the output layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kd.common.errors import DataError
from kd.data.corpus import Corpus
from kd.data.instruction_tasks.draws import keyed
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.pair_rows import fit_pair, tokenize_prompt
from kd.data.tokenizing.text_tokens import TextTokens
from kd.data.tokenizing.token_rows import TokenRows
from kd.evaluation.answers.accepted import references
from kd.evaluation.scoring.chat_asking import ChatAsking, cut_prompt
from kd.evaluation.scoring.scored_text import out_of_memory
from kd.models.answering import Answer, EndIds, answer_batch, end_ids, unused_ids
from kd.models.batching.padded_batches import Size, batches_by_length
from kd.models.families.positions import max_positions
from kd.models.loading import Model
from kd.models.tokenizer import Tokenizer, encode_with_ends, refuse_unknown_ids, token_bytes

if TYPE_CHECKING:
    import torch

GENERATION_TOKENS = 4096
"""Default tokens of a batch, answers included. Every token that is written reads all weights once for the whole batch."""
SLACK = 8
"""Tokens beyond the longest reference: room for an answer in other words, and to see that it did not end."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    temperature: float = 0.0
    """Temperature of the softmax that tokens are drawn from; 0 takes the most probable token."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < 100:
            raise DataError(
                "the temperature of sampling is not usable",
                found=self.temperature,
                expected="0 (greedy) or more",
                try_="--sample-temperature 1",
            )


GREEDY = Sampling()


def answer_room(model: Model, tokenizer: Tokenizer, corpus: Corpus, blocks: BlockConfig, wanted: int | None) -> int:
    """Most tokens of an answer. Raises DataError when `wanted` are too many for the model's positions."""
    # a causal model's context has at least one token
    limit = max_positions(model.config, decoder=True) if blocks.encoder else blocks.seq_len - 1
    limit = limit if limit is None else limit - len(blocks.forced)
    if wanted is not None:
        if wanted < 1 or (limit is not None and wanted > limit):
            raise DataError(
                "the answers do not fit the model's positions",
                found=f"{wanted} new tokens",
                expected="at least 1" if limit is None else f"1..{limit}",
                try_="--max-new-tokens",
            )
        return wanted
    pieces = token_bytes(tokenizer)
    longest = max(len(encode_with_ends(tokenizer, pieces, text)[0]) for e in corpus.examples for text in references(e))
    needed = longest + 1 + SLACK
    if not blocks.encoder:
        limit = max(1, blocks.seq_len // 2)
    return needed if limit is None else min(needed, limit)


def prompt_ids(
    corpus: Corpus,
    tokenizer: Tokenizer,
    blocks: BlockConfig,
    room: int,
    counts: Counter[str],
    chat: ChatAsking | None = None,
) -> Iterator[tuple[np.ndarray, str]]:
    """`[C]` int32 of each example, with room for the answer, and the white space that the answer is to begin with.

    chat   how conversations are asked; None = the examples are prompts without a chat template

    `counts` receives how many prompts were `cut`.
    """
    if chat is not None:
        for example in corpus.examples:
            asked = chat.prompt(example)
            kept = cut_prompt(asked.ids, blocks.seq_len - room)
            counts["cut"] += len(kept) < len(asked.ids)
            yield kept, asked.lead
        return
    words = TextTokens(tokenizer, blocks.control_tokens)
    nothing = np.zeros(room, dtype=np.int32)
    for example in corpus.examples:
        context, lead = tokenize_prompt(example, words, blocks)
        fitted = fit_pair(TokenRows(example, context, nothing, nothing.astype(np.int64)), blocks)
        assert fitted is not None, "the room for an answer is within the window"
        counts["cut"] += len(fitted.context_ids) < len(context)
        yield fitted.context_ids, lead


def written_answers(
    model: Model,
    contexts: Sequence[np.ndarray],
    *,
    max_new_tokens: int,
    eos_id: EndIds,
    vocabulary_size: int,
    sampling: Sampling = GREEDY,
    tokens_per_batch: int | None = None,
    forced: Sequence[int] = (),
) -> Iterator[tuple[list[int], list[Answer]]]:
    """Numbers into `contexts` and the answers to them, batch by batch, each context exactly once.

    contexts[e]   [C >= 1] token ids, special tokens included
    eos_id        token that ends an answer, or several of them; None = the limit alone does
    forced        ids that a decoder begins every answer with, see `answer_batch`
    """
    import torch

    width = int(model.get_output_embeddings().weight.shape[0])
    refuse_unknown_ids(((f"prompt {number}", ids) for number, ids in enumerate(contexts)), width)
    pad_id = next(iter(end_ids(eos_id)), 0)
    tokens_per_batch = tokens_per_batch or GENERATION_TOKENS
    sizes: list[Size] = [(len(c), max_new_tokens) for c in contexts]
    with greedy_config(model, max_new_tokens, eos_id, pad_id, unused_ids(model, vocabulary_size)):
        for batch in batches_by_length(sizes, tokens_per_batch):
            prompts = [contexts[i] for i in batch]
            noise = [gumbel_noise(prompts, sampling)] if sampling.temperature else []
            try:
                answers = answer_batch(
                    model, prompts, eos_id=eos_id, pad_id=pad_id, forced=forced, logits_processor=noise
                )
            except torch.OutOfMemoryError as error:
                raise out_of_memory(error, tokens_per_batch) from error
            yield batch, answers


def gumbel_noise(contexts: Sequence[np.ndarray], sampling: Sampling) -> Callable[..., torch.Tensor]:
    """Turns `scores [B, V]` of the next token into scores whose largest is a draw from softmax(scores / temperature).

    Called once per step; each context has a generator of its own, seeded by its tokens.
    """
    import torch

    seeds = [keyed(sampling.seed, np.asarray(ids, dtype=np.int64).tobytes().hex()) for ids in contexts]
    generators = [np.random.Generator(np.random.Philox(seed % 2**128)) for seed in seeds]

    def add(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise_BV = np.stack([generator.gumbel(size=scores.shape[1]) for generator in generators])
        return scores.float() / sampling.temperature + torch.from_numpy(noise_BV.astype(np.float32)).to(scores.device)

    return add


@contextmanager
def greedy_config(
    model: Model, max_new_tokens: int, eos_id: EndIds, pad_id: int, suppressed: list[int] | None
) -> Iterator[None]:
    """Replace the model's own generation settings for a while: `generate` takes from them what a call leaves open."""
    from transformers import GenerationConfig

    before = model.generation_config
    start = getattr(model.config, "decoder_start_token_id", None)
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids(eos_id) or None,
        pad_token_id=pad_id,
        decoder_start_token_id=start,
        suppress_tokens=suppressed,
        use_cache=True,
    )
    try:
        yield
    finally:
        model.generation_config = before
