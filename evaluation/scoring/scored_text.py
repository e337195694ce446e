"""Run a model over examples and yield logits for the scored positions, a few hundred rows at a time.

The full logits `[B, T, V]` are never formed. At 4096 tokens and 50 257 ids they would take 0.8 GB in float32; a chunk of
256 rows takes 51 MB. Examples are batched by length, the longest first, so that a batch that is too large fails at once.
They are padded on the right, where a causal model never looks. An encoder gets a mask.

Shapes: N scored rows, V ids the tokenizer or the cache knows, C context tokens, n target tokens.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kd.common.errors import DataError
from kd.common.progress import Progress
from kd.models.batching.gaps import NO_GAPS, Gaps
from kd.models.batching.padded_batches import batches_by_length, head_rows
from kd.models.heads import LanguageModelHead, split_head
from kd.models.loading import Model
from kd.models.tokenizer import Tokenizer, refuse_unknown_ids, usable_ids

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class ScoredText:
    """One example: tokens that are seen, then tokens that are scored."""

    id: str
    context_ids: np.ndarray
    """[C] int32 ids that the model sees, C >= 1."""
    target_ids: np.ndarray
    """[n] int32 ids that are scored, n >= 1."""
    gaps: Gaps = NO_GAPS
    """Tokens between scored tokens, which the model sees too."""

    @property
    def tokens(self) -> int:
        """What the model reads."""
        return self.read_only + len(self.target_ids)

    @property
    def read_only(self) -> int:
        """Tokens that are seen and not scored."""
        return len(self.context_ids) + self.gaps.tokens


@dataclass(frozen=True)
class LogitChunk:
    """Logits of a few scored positions, on the model's device."""

    rows: np.ndarray
    """[m] int64 row numbers, counted over all examples in the order in which they were given."""
    logits: torch.Tensor
    """[m, V] float32"""
    gold_ids: torch.Tensor
    """[m] int64 ids of the tokens that stand in the text."""


def require_vocabulary(width: int, vocabulary_size: int) -> None:
    """Raise DataError when the output layer has fewer columns than the tokenizer has ids."""
    if width < vocabulary_size:
        raise DataError(
            "the model has fewer logits than the tokenizer has entries",
            found=f"{width} logits",
            expected=f"at least {vocabulary_size}",
            try_="--tokenizer PATH",
        )


def refuse_unknown_text(texts: Sequence[ScoredText], width: int) -> None:
    """Raise DataError naming the example that has an id beyond the model's `width` ids."""
    refuse_unknown_ids(((f"example {t.id}", ids) for t in texts for ids in (t.context_ids, t.target_ids)), width)


def model_ids(model: Model, tokenizer: Tokenizer) -> int:
    """Number of ids that the model and its tokenizer both have. Raises DataError as `usable_ids`."""
    return usable_ids(tokenizer, int(model.get_output_embeddings().weight.shape[0]), what="the model")


def out_of_memory(error: BaseException, tokens_per_batch: int) -> DataError:
    """The error to raise when a batch was too large for the device."""
    return DataError(
        "not enough memory on the device",
        found=str(error).splitlines()[0],
        try_=f"--tokens-per-batch below {tokens_per_batch}, or a smaller --seq-len",
    )


def logit_chunks(
    head: LanguageModelHead, texts: Sequence[ScoredText], *, vocabulary_size: int, tokens_per_batch: int | None = None
) -> Iterator[LogitChunk]:
    """Logits of every scored position of `texts`, each exactly once, in the order of the batches.

    Columns from `vocabulary_size` on (padding of the output layer: ids no tokenizer emits) are cut off.
    Raises DataError when the model has fewer columns, needs more memory than there is, or its logits are not finite.
    """
    import torch

    require_vocabulary(int(head.weight.shape[0]), vocabulary_size)
    refuse_unknown_text(texts, int(head.weight.shape[0]))
    tokens_per_batch = tokens_per_batch or head.forward_tokens()
    starts = np.cumsum([0, *(len(t.target_ids) for t in texts)])
    for batch in batches_by_length([head.size(t.read_only, len(t.target_ids)) for t in texts], tokens_per_batch):
        chosen = [texts[i] for i in batch]
        rows = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in batch])
        gold = torch.from_numpy(np.concatenate([t.target_ids for t in chosen]).astype(np.int64)).to(head.weight.device)
        try:
            with torch.inference_mode():
                gaps = [t.gaps for t in chosen] if any(len(t.gaps) for t in chosen) else None
                hidden = head.scored_hidden([t.context_ids for t in chosen], [t.target_ids for t in chosen], gaps)
            step = head_rows(vocabulary_size, head.weight.device.type)
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                with torch.inference_mode():
                    logits = head.logits(hidden[part])[:, :vocabulary_size]
                    finite = torch.isfinite(logits.sum(dim=1))  # NaN and infinity survive a sum: one pass, no mask
                if not bool(finite.all()):
                    raise not_finite(*_at_row(chosen, start + int((~finite).nonzero()[0])))
                yield LogitChunk(rows[part], logits, gold[part])
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, tokens_per_batch) from error


@dataclass(frozen=True)
class TokenScores:
    """What a model thought of every scored token, in the texts' order."""

    nll_N: np.ndarray
    """[N] float64 NLL in nats."""
    confidence_N: np.ndarray
    """[N] float64: probability of the token that the model found most probable."""
    right_N: np.ndarray
    """[N] float64: 1 where that token stands in the text, else 0."""


def token_scores(
    model: Model,
    texts: Sequence[ScoredText],
    *,
    vocabulary_size: int,
    tokens_per_batch: int | None = None,
    forced: Sequence[int] = (),
) -> Generator[Progress[Any], None, TokenScores]:
    """As `gold_nll`, and the most probable token of every position: yields progress, returns the scores.

    forced  as `split_head`
    """
    total, done = sum(len(t.target_ids) for t in texts), 0
    scores = np.empty((3, total), dtype=np.float64)
    yield Progress(0, total)
    head = split_head(model, forced)
    chunks = logit_chunks(head, texts, vocabulary_size=vocabulary_size, tokens_per_batch=tokens_per_batch)
    for chunk in chunks:
        scores[:, chunk.rows] = chunk_scores(chunk)
        done += len(chunk.rows)
        yield Progress(done, total)
    return TokenScores(*scores)


def chunk_scores(chunk: LogitChunk) -> np.ndarray:
    """`[3, m]` float64: NLL of the token that was there in nats, the largest probability, 1 where that is its token."""
    log_z = chunk.logits.logsumexp(dim=1)
    gold = chunk.logits.gather(1, chunk.gold_ids.unsqueeze(1)).squeeze(1)
    largest, token = chunk.logits.max(dim=1)
    parts = (log_z - gold, (largest - log_z).exp(), token == chunk.gold_ids)
    return np.stack([part.double().cpu().numpy() for part in parts])


def gold_nll(
    model: Model,
    texts: Sequence[ScoredText],
    *,
    vocabulary_size: int,
    tokens_per_batch: int | None = None,
    forced: Sequence[int] = (),
) -> Generator[Progress[Any], None, np.ndarray]:
    """Negative log-probability of every scored token: yields progress, returns `[N]` float64 nats in the texts' order.

    forced  as `split_head`

    Raises as `logit_chunks`, and TeacherError when the model's output layer cannot be taken apart.
    """
    total, done = sum(len(t.target_ids) for t in texts), 0
    nll_N = np.empty(total, dtype=np.float64)
    yield Progress(0, total)
    head = split_head(model, forced)
    chunks = logit_chunks(head, texts, vocabulary_size=vocabulary_size, tokens_per_batch=tokens_per_batch)
    for chunk in chunks:
        gold = chunk.logits.gather(1, chunk.gold_ids.unsqueeze(1)).squeeze(1)
        nll_N[chunk.rows] = (chunk.logits.logsumexp(dim=1) - gold).cpu().numpy()
        done += len(chunk.rows)
        yield Progress(done, total)
    return nll_N


def not_finite(example: str, token: int) -> DataError:
    """The error to raise when the model gave NaN or infinity at a target token of an example."""
    return DataError(
        "the model's logits are not finite",
        where=f"example {example}",
        found=f"NaN or infinity at target token {token}",
        try_="--dtype float32 or bfloat16, and check the weights",
    )


def _at_row(texts: Sequence[ScoredText], row: int) -> tuple[str, int]:
    """The example and the target token of a scored row."""
    for text in texts:
        if row < len(text.target_ids):
            return text.id, row
        row -= len(text.target_ids)
    raise AssertionError("row beyond the batch")
