"""Sums of exp over the vocabulary, `log Σ_v exp((z_v - max z) / T)`, for all temperatures of a grid from one pass of exp.

Where temperatures double (1, 2, 4), exp(x/2) is squared into exp(x); and the sum of the squares is the sum at half the
temperature, so that every second power is never written. On a CPU the passes are numpy's and OpenBLAS's, on the calling thread
alone: the sparsifier gives whole blocks to each thread, and what torch shares out within every pass waits for the slowest
thread at each (docs/log.md).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

SEGMENT = 512
"""Columns that are added by one dot product. BLAS adds them in whole vectors, a few roundings each, and numpy adds the
segments by pairs; half as many columns take 10 % longer (benchmarks/chunks.py)."""


def padded_width(vocabulary_size: int, device_type: str) -> int:
    """Columns of the working memory of `log_normalisers`. Those beyond the vocabulary must hold 0; they are not written."""
    return vocabulary_size if device_type != "cpu" else -(-vocabulary_size // SEGMENT) * SEGMENT


def log_normalisers(shifted: torch.Tensor, temperatures: Sequence[float], powers: torch.Tensor) -> torch.Tensor:
    """Logits with maximum 0, `shifted [n, V]` -> `[n, T]`. Every sum contains exp(0) = 1, so its logarithm is finite.

    `powers [n, padded_width(V)]` is overwritten. Its first V columns may be `shifted` itself where temperatures double.
    """
    columns: dict[float, torch.Tensor] = {}
    filled = powers[:, : shifted.shape[1]]
    held = 0.0
    for temperature in sorted(temperatures, reverse=True):
        if held and held == 4 * temperature:
            square(filled)
            held /= 2
        if held == 2 * temperature:
            sums = row_sums_of_squares(powers)
        else:
            exp_of_quotient(shifted, temperature, filled)
            sums, held = row_sums(powers), temperature
        columns[temperature] = sums.log()
    return torch.stack([columns[t] for t in temperatures], dim=1)


def entropies(shifted: torch.Tensor, log_z: torch.Tensor, bound: float) -> torch.Tensor:
    """`[n]` float32: entropy in nats at temperature 1 of rows of logits with maximum 0, `shifted [n, V]`.

    It is log z - Σ p x, and no less than log z, which is the surprise of the most probable token. On a CPU rows for which that
    already exceeds `bound` get log z itself: where the teacher is not certain, nothing else is computed.

    log_z   [n]   log-normaliser of each row at temperature 1
    """
    if shifted.device.type != "cpu":
        p = torch.exp(shifted)
        return log_z - (p * shifted.clamp(min=LOWEST)).sum(dim=1) / p.sum(dim=1)
    nats = log_z.clone()
    for row in (log_z < bound).nonzero().squeeze(1).tolist():
        x = shifted[row].numpy()
        p = np.exp(x)
        nats[row] -= float(np.sum(p * np.maximum(x, np.float32(LOWEST)))) / float(np.sum(p))
    return nats


LOWEST = -200.0
"""A logit below the top one whose probability is 0 in float32; lower ones, infinity too, count as it."""


def subtract(logits: torch.Tensor, top: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Write `logits [n, V] - top [n, 1]` into `out`, and return it."""
    if logits.device.type != "cpu":
        return torch.sub(logits, top, out=out)
    with np.errstate(invalid="ignore"):  # infinity minus infinity: such rows are refused because of their normalisers
        np.subtract(logits.numpy(), top.numpy(), out=out.numpy())
    return out


def exp_of_quotient(shifted: torch.Tensor, temperature: float, out: torch.Tensor) -> None:
    """Write `exp(shifted / temperature)` into `out`, which may be `shifted`; all are `[n, V]` float32.

    numpy's exp rounds a little worse than torch's and takes half as long on a CPU. The error of `log_z` does not change,
    because its own rounding is larger. Dividing by a power of two equals multiplying by its inverse, exactly.
    """
    if shifted.device.type != "cpu":
        torch.div(shifted, temperature, out=out).exp_()
        return
    x, y = shifted.numpy(), out.numpy()
    if math.frexp(temperature)[0] == 0.5:
        np.multiply(x, np.float32(1 / temperature), out=y)
    else:
        np.divide(x, np.float32(temperature), out=y)
    np.exp(y, out=y)


def square(x: torch.Tensor) -> None:
    """Square `x` in place."""
    if x.device.type != "cpu":
        x.mul_(x)
    else:
        np.multiply(x.numpy(), x.numpy(), out=x.numpy())


def row_sums(x: torch.Tensor) -> torch.Tensor:
    """Sum of each row, `[n, W] -> [n]`. On a CPU W is a multiple of SEGMENT."""
    if x.device.type != "cpu":
        return x.sum(dim=1)
    return torch.from_numpy(np.vecdot(_segments(x), np.ones(SEGMENT, dtype=np.float32)).sum(axis=1))


def row_sums_of_squares(x: torch.Tensor) -> torch.Tensor:
    """Sum of squares of each row, `[n, W] -> [n]`. The squares are not stored."""
    if x.device.type != "cpu":
        squares: torch.Tensor = torch.linalg.vector_norm(x, dim=1).square_()
        return squares
    segments = _segments(x)
    return torch.from_numpy(np.vecdot(segments, segments).sum(axis=1))


def _segments(x: torch.Tensor) -> np.ndarray:
    return x.numpy().reshape(len(x), -1, SEGMENT)
