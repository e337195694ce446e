"""The rows of a source as the encoder takes them: sorted, bounded, and refused where they cannot be what they are said to be.

Shapes: n rows of a sequence, K tokens that the longest of them lists, k tokens that the cache keeps, V ids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from kd.cache_builder.exchange.source_sequences import NO_ID, SourceSequence
from kd.cache_builder.served.logprob_rows import TokenLogprobs, WrongAnswer, refuse_no_distribution
from kd.common.errors import DataError

FAR_BELOW = -100.0
"""Nats below the first place of a row, in places that a row of the adaptive profile does not use: no threshold keeps them."""

ROUNDING = 0.25
"""Nats by which two statements of one log-probability may differ: the coarsest codecs round the least probable tokens so."""


@dataclass(frozen=True)
class SortedRows:
    """The rows of one sequence, the most probable token first."""

    token_ids: np.ndarray
    """[n, K] int64; `NO_ID` behind the last of a row"""
    logprobs: np.ndarray
    """[n, K] float64 nats, descending; -inf behind the last of a row"""
    kept: np.ndarray
    """[n] int64: tokens that each row lists"""
    gold_logprob: np.ndarray
    """[n] float64 nats; where the source does not say it, the most that it can be"""
    gold_rank: np.ndarray
    """[n] int64; K or more where the token is not among those of its row"""
    gold_known: bool
    """Whether the source says the log-probability of every token that is there"""
    ranks_known: bool
    """Whether it says how many tokens are more probable than each"""

    def first(self, k: int) -> TokenLogprobs:
        """The k most probable tokens of each row."""
        ids, values = self.token_ids[:, :k], self.logprobs[:, :k].copy()
        unused = ids == NO_ID
        values[unused] = np.broadcast_to(values[:, :1] + FAR_BELOW, values.shape)[unused]
        return TokenLogprobs(np.where(unused, 0, ids).astype(np.int32), values, self.gold_logprob, self.gold_rank)


def sorted_rows(sequence: SourceSequence, vocabulary_size: int, tail: Literal["rest", "unknown"]) -> SortedRows:
    """The rows of a sequence, checked. Raises DataError naming the sequence."""
    order = np.argsort(-sequence.logprobs, axis=1, kind="stable")  # equal ones stay as the source has them
    ids, values = (np.take_along_axis(array, order, axis=1) for array in (sequence.token_ids, sequence.logprobs))
    used = ids != NO_ID
    kept = used.sum(axis=1)
    _check_ids(sequence, ids, used, vocabulary_size)
    gold, ranks = sequence.gold_logprobs, sequence.gold_ranks
    if tail == "unknown":  # only differences between the values of a row are known
        top = values[:, :1]
        values = values - top - np.log(np.where(used, np.exp(values - top), 0.0).sum(axis=1, keepdims=True))
        gold = None
    hit = ids == sequence.gold_ids[:, None]
    inside = hit.any(axis=1)
    listed = np.where(hit, values, 0.0).sum(axis=1)
    least = values[np.arange(len(kept)), np.maximum(kept, 1) - 1]
    known = np.zeros(len(kept), dtype=bool) if gold is None else ~np.isnan(gold)
    gold_logprobs = np.zeros(len(kept)) if gold is None else np.where(known, gold, 0.0)
    _check_gold(sequence, known, gold_logprobs, np.where(inside, listed, least), inside)
    above = (values > listed[:, None]).sum(axis=1)
    beyond = kept if ranks is None else np.maximum(kept, ranks)
    inner = above if ranks is None else np.where(ranks < kept, ranks, above)
    rows = SortedRows(
        ids,
        values,
        kept,
        np.where(known, gold_logprobs, np.where(inside, listed, np.minimum(least, _log_rest(values)))),
        np.where(inside, inner, beyond),
        bool((known | inside).all()),
        bool(inside.all()) or ranks is not None,
    )
    _check_laws(sequence, rows, inside, vocabulary_size)
    return rows


def _log_rest(values: np.ndarray) -> np.ndarray:
    """`[n]` logarithm of what the probabilities of a row leave of 1."""
    with np.errstate(divide="ignore", over="ignore"):
        return np.asarray(np.maximum(np.log(np.maximum(1.0 - np.exp(values).sum(axis=1), 0.0)), -1e4))


def _check_ids(sequence: SourceSequence, ids: np.ndarray, used: np.ndarray, vocabulary_size: int) -> None:
    """Raise DataError for ids beyond the tokenizer's, and for rows that list nothing or no numbers."""
    advice = "the --tokenizer of the teacher that wrote this"
    for array, name in ((sequence.input_ids, "the text"), (ids[used], "a row")):
        if len(array) and not 0 <= array.min() <= array.max() < vocabulary_size:
            beyond = int(array.min() if array.min() < 0 else array.max())
            raise DataError(
                f"{name} has an id that the tokenizer does not have",
                where=f"sequence {sequence.name}",
                found=f"id {beyond}",
                expected=f"0..{vocabulary_size - 1}",
                try_=advice,
            )
    empty = np.flatnonzero(~used.any(axis=1))
    if len(empty):
        raise DataError("a row lists no token", where=f"sequence {sequence.name}, row {empty[0]}")


def _check_gold(
    sequence: SourceSequence, known: np.ndarray, gold_logprobs: np.ndarray, listed: np.ndarray, inside: np.ndarray
) -> None:
    """Raise DataError where the source says two things of one token: its rows then belong to other tokens.

    listed  what the row says of the token where it is `inside`; otherwise the least probable of the row, which is no less
    """
    apart = np.where(inside, np.abs(gold_logprobs - listed), gold_logprobs - listed)
    wrong = np.flatnonzero(known & ((apart > ROUNDING) | ~np.isfinite(gold_logprobs)))
    if len(wrong):
        row = int(wrong[0])
        raise DataError(
            "the log-probability of the token that is there contradicts its row",
            where=f"sequence {sequence.name}, row {row}",
            found=f"{gold_logprobs[row]:.4f}",
            expected=("" if inside[row] else "at most ") + f"{listed[row]:.4f} nats",
            try_="rows that predict the tokens they stand for",
        )


def _check_laws(sequence: SourceSequence, rows: SortedRows, inside: np.ndarray, vocabulary_size: int) -> None:
    """Raise DataError for what cannot be the largest log-probabilities of a distribution."""
    for length in np.unique(rows.kept).tolist():
        these = rows.kept == length
        ids, values = rows.token_ids[these, :length], rows.logprobs[these, :length]
        gold = np.minimum(rows.gold_logprob[these], np.where(inside[these], 0.0, values[:, -1]))  # checked before
        try:
            refuse_no_distribution(ids, values, gold, rows.gold_rank[these], vocabulary_size)
        except WrongAnswer as error:
            raise DataError(
                "rows are no log-probabilities",
                where=f"sequence {sequence.name}",
                found=error,
                expected="natural logarithms of probabilities at temperature 1, each row the largest of its distribution",
                try_="--tail unknown, for values without their normaliser: logits, or what a lossy layout has left",
            ) from error
