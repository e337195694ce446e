"""The k largest logits of each row, which a teacher pass stores and ULD compares one by one.

On a CPU numpy finds them by a threshold, elsewhere `torch.topk` does. Among equal logits the lowest id comes first.
"""

from __future__ import annotations

import numpy as np
import torch

BLOCK_COLUMNS = 64
"""Largest number of columns per block in `top_k_by_threshold`. Blocks are smaller for a large k: there are at least 8 k."""
SPARE = 8
"""Logits beyond the k-th that `top_k_at_once` sorts too, to settle ties."""
WORD = 8
"""Booleans that are tested at once, as one 64-bit word."""


def top_k_by_topk(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and ids `[n, k]` of the largest of `logits [n, V]`, descending; among equal logits the lowest id comes first.

    `torch.topk` leaves the order of equal logits open, so rows with equal ones among the first k + 1 are sorted.
    """
    values, ids = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    tied = (values[:, 1:] == values[:, :-1]).any(dim=1).nonzero().squeeze(1)
    values, ids = values[:, :k], ids[:, :k]
    if len(tied):
        ordered = logits[tied].sort(dim=1, descending=True, stable=True)
        values[tied], ids[tied] = ordered.values[:, :k], ordered.indices[:, :k]
    return values, ids


def top_k_at_once(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same without waiting for the device; also `tied [n]`, rows in which `SPARE` more logits all equal the k-th.

    Ties at rank k occur in one or two of 100,000 rows or so. There `torch.topk` keeps any of the equal logits, and finding
    the lowest ids in every row would take as long as topk itself. So `SPARE` more logits are taken and sorted. The caller
    has to score rows again in which even these are all tied.
    """
    values, ids = logits.topk(min(k + SPARE, logits.shape[1]), dim=1)
    tied = values[:, k - 1] == values[:, -1]
    if values.shape[1] == logits.shape[1]:  # the whole row was sorted
        tied = torch.zeros_like(tied)
    ids, order = ids.sort(dim=1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids.gather(1, order)[:, :k], tied


def top_k_by_threshold(
    logits: torch.Tensor, k: int, marks: np.ndarray | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on a CPU, twice as fast: `logits [n, V]` float32 with contiguous rows -> values, ids `[n, k]`.

    The columns are divided into B blocks, column v into block v mod B. The k largest of the B block maxima are k logits of
    the row, so the k-th of them is at most the row's k-th largest logit. The logits that reach this threshold (about
    k * (1 + k / 2B) columns) contain the top-k and everything equal to its last, and only they are sorted. Block maxima are
    elementwise maxima of contiguous runs of columns; blocks of neighbouring columns were slower than `topk` itself.

    marks   working memory, see `marks_for`
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
    columns_of = np.zeros(values.shape, dtype=np.int64)
    values[row, slot], columns_of[row, slot] = rows[row, ids], ids
    ordered = torch.from_numpy(values).sort(dim=1, descending=True, stable=True)
    return ordered.values[:, :k], torch.from_numpy(columns_of).gather(1, ordered.indices[:, :k])


def marks_for(rows: int, vocabulary_size: int) -> np.ndarray:
    """Working memory of `top_k_by_threshold`: `[rows, V rounded up to whole words]` bool; columns beyond V stay False."""
    return np.zeros((rows, -(-vocabulary_size // WORD) * WORD), dtype=np.bool_)


def _reaching(rows: np.ndarray, thresholds: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every `rows [n, V] >= thresholds [n, 1]`, in order. They are few, so whole words are tested first."""
    np.greater_equal(rows, thresholds, out=marks[:, : rows.shape[1]])
    words = np.flatnonzero(marks.view(np.uint64).reshape(-1) != 0)
    word, byte = np.nonzero(marks.reshape(-1, WORD)[words])
    row, ids = np.divmod(words[word] * WORD + byte, marks.shape[1])
    return row, ids
