"""Figures of single rows: how uncertain the teacher was, and which characters of the text each token ends.

The entropy of a row, in nats, is that of its kept tokens plus that of its tail, of which only the mass is stored. So two bounds
are given. With m the mass of the tail, p_k the least probable kept token and n the ids that are not kept:

    at least   Σ_kept -p ln p  -  m ln min(m, p_k)      no token of the tail is more probable than p_k, nor than the tail
    at most    Σ_kept -p ln p  -  m ln (m / n)          the tail is spread evenly

Both are the entropy itself where nothing is beyond the kept tokens. A row without a top-k (profile sampled) still tells the
probability of its most probable token, which is then the only kept one.
"""

from __future__ import annotations

import numpy as np

from kd.cache_builder.store.ragged import offsets_of
from kd.cache_builder.store.soft_targets import SoftTargets

LEVEL_EDGES = (0.1, 0.5, 1.0, 2.0, 3.0, 4.5)
"""Nats at which a token gets the next darker shade: the same in every text, so that two pages can be compared."""


def entropy_bounds(targets: SoftTargets, vocabulary_size: int) -> tuple[np.ndarray, np.ndarray]:
    """`(at least [N], at most [N])` float64: bounds of each row's entropy at temperature 1, in nats, see above.

    Raises CacheError where neither the kept tokens nor the normaliser were read.
    """
    head, least_kept, kept = _kept_part(targets)
    tail = np.where(kept < vocabulary_size, _tail_mass(targets), 0.0)
    some = tail > 0
    mass = np.where(some, tail, 1.0)
    least = head - tail * np.log(np.minimum(mass, np.exp(least_kept)))
    most = head - tail * np.log(mass / np.maximum(vocabulary_size - kept, 1))
    least = np.where(some, least, head)
    return least, np.where(some, np.maximum(most, least), head)  # rounding of p_k may put the one above the other


def most_entropy(logprobs: np.ndarray, vocabulary_size: int) -> np.ndarray:
    """`[N]` float64: the most that the entropy of rows can be, of which the K most probable tokens are known, `[N, K]` nats.

    As if nothing were known of the tail's ids: what the kept tokens leave of 1 is spread evenly over the vocabulary.
    """
    p = np.exp(logprobs.astype(np.float64))
    tail = np.maximum(1.0 - p.sum(axis=1), 0.0)
    head = -(p * logprobs).sum(axis=1)
    return np.asarray(head - tail * np.log(np.where(tail > 0, tail, 1.0) / vocabulary_size))


def _kept_part(targets: SoftTargets) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each row: the kept tokens' part of the entropy, the log-probability of the least probable of them, and their number."""
    if targets.logprobs is None:
        top = -targets.log_z[:, targets.grid_index(1.0)].astype(np.float64)
        return -np.exp(top) * top, top, np.ones(len(targets), dtype=np.int64)
    log_p = targets.logprobs_at(1.0)
    with np.errstate(invalid="ignore"):  # 0 times -inf
        terms = np.where(log_p > -np.inf, -np.exp(log_p) * log_p, 0.0)
    head = targets.row_sums(terms)
    if targets.kept is None:
        return head, log_p[:, -1], np.full(len(targets), log_p.shape[1])
    return head, log_p[offsets_of(targets.kept)[1:] - 1], targets.kept


def _tail_mass(targets: SoftTargets) -> np.ndarray:
    if targets.logprobs is None:
        return np.asarray(-np.expm1(-targets.log_z[:, targets.grid_index(1.0)].astype(np.float64)))
    return targets.tail_mass_at(1.0)


def beyond_kept(targets: SoftTargets) -> np.ndarray:
    """`[N]` bool: whether the token that is there is not among the kept ones, by its rank."""
    return np.asarray(targets.gold_rank >= _kept_part(targets)[2])


def shade_levels(nats: np.ndarray) -> np.ndarray:
    """`[N]` int: the shade of each token, from 0 (none) to `len(LEVEL_EDGES)`."""
    return np.searchsorted(np.asarray(LEVEL_EDGES), nats, side="right")


def character_ends(text: str, byte_end: np.ndarray) -> np.ndarray:
    """`[N]` for each end in the text's UTF-8 bytes, how many characters are whole up to there.

    A character that several tokens share belongs to the last of them.
    """
    data = np.frombuffer(text.encode("utf-8"), dtype=np.uint8)
    begins = (data & 0xC0) != 0x80
    whole = np.concatenate([np.cumsum(begins) - 1, [len(text)]])  # of the bytes before each one, and of all
    return np.asarray(whole[np.clip(byte_end, 0, len(data))])
