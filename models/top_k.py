"""The k largest of each row of logits: what a teacher pass keeps, and what ULD compares one by one.

On a CPU by numpy and a threshold; elsewhere by `torch.topk`. Of equal logits the one with the lowest id comes first.
"""

from __future__ import annotations

import numpy as np
import torch

BLOCK_COLUMNS = 64
"""Most columns per block of the vocabulary; fewer where k is large, so that there are 8 k blocks, see `top_k_by_threshold`."""
SPARE = 8
"""Logits beyond the k-th that are put in order with it, see `top_k_at_once`."""
WORD = 8
"""Booleans that are looked at at once."""


def top_k_by_topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids `[n, k]` of the largest of `logits [n, V]`, descending, the lowest id first where logits are equal.

    `torch.topk` leaves the order of equal logits open: rows where one of the first k + 1 equals the next are sorted.
    """
    values, ids = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1).nonzero().squeeze(1)
    values, ids = values[:, :k], ids[:, :k]
    if len(tied):
        ordered = logits[tied].sort(dim=1, descending=True, stable=True)
        values[tied], ids[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    return values, ids


def top_k_at_once(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same where nothing may wait for the device, and `tied [n]`: where `SPARE` logits more all equal the k-th.

    Two float32 logits of 100,000 rows or so are equal at the k-th place in one or two; then which are kept is `torch.topk`'s
    choice, and looking for the lowest ids takes as long as topk itself for every row. So a few more are taken, and
    those are put in order; rows where even they do not reach beyond the equal ones are told, to be looked at again.
    """
    values, ids = logits.topk(min(k + SPARE, logits.shape[1]), dim=1)
    tied = values[:, k - 1] == values[:, -1]
    if values.shape[1] == logits.shape[1]:  # there are no others
        tied = torch.zeros_like(tied)
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order)[:, :k], tied


def top_k_by_threshold(
    logits: torch.Tensor, k: int, marks: np.ndarray | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on a CPU, twice as fast: `logits [n, V]` float32 with contiguous rows -> values, ids `[n, k]`.

    The columns are dealt out to B blocks, column v to block v mod B. The k largest of the B block maxima are k logits of
    the row, so that the k-th of them is at most the row's k-th largest logit; what reaches it (about k * (1 + k / 2B)
    columns) holds the top-k and everything equal to the last of them, and is sorted. Block maxima are one elementwise maximum
    after another over neighbouring columns; blocks of neighbouring columns were slower than `topk` itself.
    `marks`: memory to work in, see `marks_for`.
    """
    n, size = logits.shape
    columns = min(BLOCK_COLUMNS, size // (8 * k))
    if columns < 4 or not n:
        return top_k_by_topk(logits, k)
    rows, blocks = logits.numpy(), size // columns
    maxima = rows[:, : blocks * columns].reshape(n, columns, blocks).max(axis=1)
    maxima.partition(blocks - k, axis=1)
    row, ids = _reaching(rows, maxima[:, blocks - k, None], marks_for(n, size) if marks is None else marks[:n])
    counts = np.bincount(row, minlength=n)
    slot = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    # rows with NaN may fill fewer than k slots: the sparsifier refuses them when it sees their normalisers
    values = np.full((n, max(k, int(counts.max()))), -np.inf, dtype=np.float32)
    places = np.zeros(values.shape, dtype=np.int64)
    values[row, slot], places[row, slot] = rows[row, ids], ids
    ordered = torch.from_numpy(values).sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], torch.from_numpy(places).gather(1, ordered.indices[:, :k])


def marks_for(rows: int, vocabulary_size: int) -> np.ndarray:
    """`[rows, V rounded up to whole words]` bool: where a comparison of logits is written; columns beyond V stay False."""
    return np.zeros((rows, -(-vocabulary_size // WORD) * WORD), dtype=np.bool_)


def _reaching(rows: np.ndarray, thresholds: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every `rows [n, V] >= thresholds [n, 1]`, in order; few of them: whole words are looked for first."""
    np.greater_equal(rows, thresholds, out=marks[:, : rows.shape[1]])
    words = np.flatnonzero(marks.view(np.uint64).reshape(-1) != 0)
    word, byte = np.nonzero(marks.reshape(-1, WORD)[words])
    row, ids = np.divmod(words[word] * WORD + byte, marks.shape[1])
    return row, ids
