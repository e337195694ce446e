"""`TokenLogprobs`: what an engine says of the tokens of one sequence, checked, and as the rows that a cache keeps.

An engine is asked for the k most probable tokens at every scored position, and for the token that is there. Nothing it says is
taken on trust: ids are compared with those that were sent, and log-probabilities obey laws that logits do not. The k largest
of V probabilities sum to 1 at most and to k/V at least. Logits of real models break one of the two within a few rows.

Shapes: n scored positions, k tokens kept, V ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.row_figures import most_entropy
from kd.cache_builder.store.targets import RawTargets, TargetConfig

SLACK = 1e-3
"""Most that a sum of probabilities may be beyond its bound. Engines compute them in float32 (1e-6), or round logits before."""


class WrongAnswer(Exception):
    """An engine answered something that cannot be: the message says what was found."""


@dataclass(frozen=True)
class TokenLogprobs:
    """The k most probable tokens at n positions of one sequence."""

    token_ids: np.ndarray
    """[n, k] int32, most probable first"""
    logprobs: np.ndarray
    """[n, k] float64 nats at temperature 1, descending"""
    gold_logprob: np.ndarray
    """[n] float64: of the token that is there"""
    gold_rank: np.ndarray
    """[n] int64: tokens more probable than it; k stands for k or more where the engine does not rank"""


@dataclass(frozen=True)
class RankedEntry:
    """One position as an engine answers it."""

    pairs: Sequence[tuple[int, float]]
    """Ids and log-probabilities: the top k in any order, and the token that is there where it is not among them."""
    gold_id: int
    gold_logprob: float
    rank: int | None = None
    """Tokens more probable than that one; None = the engine does not say."""


def token_logprobs(entries: Sequence[RankedEntry], k: int, vocabulary_size: int) -> TokenLogprobs:
    """The entries of one sequence as arrays. Raises WrongAnswer."""
    token_ids = np.empty((len(entries), k), dtype=np.int64)
    logprobs = np.empty((len(entries), k))
    gold, ranks = np.empty(len(entries)), np.empty(len(entries), dtype=np.int64)
    for row, entry in enumerate(entries):
        kept = _kept(entry, k)
        token_ids[row], logprobs[row] = zip(*kept, strict=True)
        gold[row] = entry.gold_logprob
        inside = entry.gold_id in token_ids[row]
        above = int((logprobs[row] > entry.gold_logprob).sum())
        ranks[row] = above if inside else max(k, k if entry.rank is None else entry.rank)
    refuse_no_distribution(token_ids, logprobs, gold, ranks, vocabulary_size)
    return TokenLogprobs(token_ids.astype(np.int32), logprobs, gold, ranks)


def _kept(entry: RankedEntry, k: int) -> list[tuple[int, float]]:
    """The k most probable tokens, the smaller id first where two are equal. Raises WrongAnswer."""
    pairs = list(entry.pairs)
    if len(pairs) == k + 1:  # the token that is there comes on top of the k
        pairs = [pair for pair in pairs if pair[0] != entry.gold_id]
    if len(pairs) != k:
        raise WrongAnswer(f"{len(entry.pairs)} tokens at a position, {k} asked for")
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))


def refuse_no_distribution(
    token_ids: np.ndarray, logprobs: np.ndarray, gold: np.ndarray, ranks: np.ndarray, vocabulary_size: int
) -> None:
    """Raise WrongAnswer for what cannot be the k largest log-probabilities over `vocabulary_size` ids."""
    if not len(token_ids):
        return
    k = token_ids.shape[1]
    if not (np.isfinite(logprobs).all() and np.isfinite(gold).all()):
        raise WrongAnswer("a log-probability that is not finite")
    if token_ids.min() < 0 or token_ids.max() >= vocabulary_size:
        beyond = int(token_ids.min() if token_ids.min() < 0 else token_ids.max())
        raise WrongAnswer(f"token id {beyond}, the tokenizer has {vocabulary_size}")
    ordered = np.sort(token_ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise WrongAnswer("a token that is listed twice")
    masses = np.exp(np.minimum(logprobs, 1.0)).sum(axis=1)
    if logprobs.max() > SLACK or masses.max() > 1 + SLACK:
        raise WrongAnswer(f"probabilities that sum to {masses.max():.4g}, as logits would")
    least = (1 - SLACK) * min(1.0, k / vocabulary_size)
    if masses.min() < least:
        raise WrongAnswer(
            f"the {k} largest probabilities sum to {masses.min():.3g}, less than {k} of {vocabulary_size} must"
        )
    outside = ranks >= k
    if (gold[outside] > logprobs[outside, -1] + SLACK).any():
        raise WrongAnswer("a token that is more probable than the k-th and is not among the k")
    if (ranks >= max(vocabulary_size, k + 1)).any():
        raise WrongAnswer("a rank beyond the vocabulary")


def raw_targets(
    rows: Sequence[TokenLogprobs],
    gold_ids: np.ndarray,
    byte_end: np.ndarray,
    config: TargetConfig,
    vocabulary_size: int,
) -> RawTargets:
    """The rows of several sequences, one after another, as the encoder takes them: temperature 1 alone.

    Of the entropy of a row only a bound is known: the most that it can be decides whether the row is certain.

    Relative to the most probable token, the log-normaliser at temperature 1 is minus that token's log-probability.
    """
    logprobs = np.concatenate([row.logprobs for row in rows])
    top = logprobs[:, :1]
    ids = np.concatenate([row.token_ids for row in rows]) if PROFILES[config.profile].ids else None
    return RawTargets(
        gold_ids=gold_ids,
        log_z=(-top).astype(np.float32),
        gold_logprob=np.concatenate([row.gold_logprob for row in rows]).astype(np.float32),
        gold_rank=np.concatenate([row.gold_rank for row in rows]),
        byte_end=byte_end,
        token_ids=ids,
        relative=(logprobs - top).astype(np.float32),
        entropy=most_entropy(logprobs, vocabulary_size) if config.certain_below else None,
    )
