"""Codecs of log-probabilities: how the head of a row becomes stored arrays, and back.

A head row is stored relative to its top value (0 >= r_1 >= ... >= r_k), as one of

    graded         r_j = -scale[sum_{i<=j} steps_i]; the points of the scale are further apart where values are less
    graded-fine    probable, so every value costs about the same error; the three differ in density; steps have
    graded-coarse  16 bits in graded-fine, 8 in the others
    linear8        r_j = -q_j * span / 255, q uint8, span float16 per row     1 byte per value
    float16        r_j as float16                                             2 bytes
    float32        r_j as float32                                             4 bytes, exact

docs/cache-format.md has a table of the size after compression and the error in KL of each (benchmarks/sizes.py).
float16 ends at -65504 nats, and so do the scales. Lower values are stored as that; their probability, 0, stays the same.

A scale has few values, so values and their exponentials are looked up in tables. Arrow's `take` uses small integers as they
are: it needs a third of the time of exp, two thirds of numpy's take (docs/log.md).

To add a codec, write a class with `arrays`, `encode`, `decode` and `powers`, and add a line to `CODECS`; the tests find it there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kd.cache_builder.store.encoding.arrays import Arrays, ArraySpec
from kd.cache_builder.store.ragged import entry_sums

FLOAT16_MIN = float(np.finfo(np.float16).min)


class LogprobCodec(Protocol):
    """Turns head rows, relative to their top value, into stored arrays and back."""

    tail: str
    """dtype of the tail's odds. They are logarithms; float16 costs at most 5e-8 nats of KL."""

    def arrays(self, k: int) -> list[ArraySpec]:
        """The arrays this codec stores."""

    def encode(self, relative: np.ndarray) -> Arrays:
        """`[N, K]` float32 descending from 0 -> stored arrays."""

    def decode(self, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        """Stored arrays -> `[N, K]` float32, descending."""

    def powers(self, stored: Mapping[str, np.ndarray], relative: np.ndarray, temperature: float) -> np.ndarray:
        """exp(r_j / temperature) `[N, K]` float32 of stored arrays and what they decode to."""


def power_sums(
    codec: LogprobCodec,
    stored: Mapping[str, np.ndarray],
    relative: np.ndarray,
    temperatures: Sequence[float],
    kept: np.ndarray | None = None,
) -> np.ndarray:
    """`[N, T]` float32: `sum_j exp(r_j / T)` of stored arrays and what they decode to, at ascending temperatures.

    With `kept [N]`, `relative [E]` holds so many entries of each row, one row after another.
    """
    sums = np.empty((len(relative if kept is None else kept), len(temperatures)), dtype=np.float32)
    powers, previous = np.empty(0), 0.0
    for t in reversed(range(len(temperatures))):
        # a product takes a tenth of the time of an exponential, a fifth of a look-up
        halved = previous == 2 * temperatures[t]
        powers = powers * powers if halved else codec.powers(stored, relative, temperatures[t])
        previous = temperatures[t]
        if kept is None:
            np.einsum("nk->n", powers, out=sums[:, t])
        else:
            sums[:, t] = entry_sums(powers, kept)
    return sums


@cache
def graded_scale(step: float) -> np.ndarray:
    """`[G]` float32 ascending from 0 to 65504: nats below the top value, `step * e^(y/5)` (at most y/2) apart at y.

    With steps s_j the KL is about sum_j p_j s_j^2 / 24; for a given number of points on the way it is least where
    p_j s_j^2 is the same for all j, which is e^(y/2). The slower growth spares what weighs at temperatures 2 and 4
    (docs/log.md has the comparison).
    """
    points = [0.0]
    while points[-1] < -FLOAT16_MIN:
        y = points[-1]
        points.append(min(y + min(step * math.exp(min(y, 100.0) / 5), max(y / 2, step)), -FLOAT16_MIN))
    return np.array(points, dtype=np.float32)


@cache
def _decimals(step: float) -> list[float]:
    """The scale as the shortest decimals that are the same float32."""
    return [float(str(y)) for y in graded_scale(step)]


def _exponentials(relative: np.ndarray, temperature: float) -> np.ndarray:
    """exp(relative / temperature), for codecs whose values are too many for a table."""
    return np.asarray(np.exp(relative / np.float32(temperature)))


_QUANTITY = "log p(token_j) - log p(token_1) at temperature 1, nats; add -log_z[T=1] for log p"


class Linear8:
    """8 bits linear between the first and the k-th value of each row."""

    tail = "float16"

    def arrays(self, k: int) -> list[ArraySpec]:
        rule = {"quantity": _QUANTITY, "codec": "linear8", "decode": "-logprobs * logprob_span / 255"}
        return [
            ArraySpec("logprobs", "uint8", k, rule),
            ArraySpec("logprob_span", "float16", None, {"quantity": "first minus k-th log-probability, nats"}),
        ]

    def encode(self, relative: np.ndarray) -> Arrays:
        span = np.minimum(-relative[:, -1], -FLOAT16_MIN).astype(np.float16)
        step = np.maximum(span.astype(np.float32), 1e-6)[:, None] / 255
        return {"logprobs": np.clip(np.rint(-relative / step), 0, 255).astype(np.uint8), "logprob_span": span}

    def decode(self, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        step = stored["logprob_span"].astype(np.float32)[:, None] / np.float32(255)
        return stored["logprobs"].astype(np.float32) * -step

    def powers(self, stored: Mapping[str, np.ndarray], relative: np.ndarray, temperature: float) -> np.ndarray:
        return _exponentials(relative, temperature)


class Graded:
    """Indices into `graded_scale(step)`. The array holds the differences between neighbours; errors do not add up along a row."""

    tail = "float16"

    def __init__(self, step: float) -> None:
        self.step = step

    def arrays(self, k: int) -> list[ArraySpec]:
        scale = graded_scale(self.step)
        rule = {
            "quantity": _QUANTITY,
            "codec": "graded",
            "decode": "-scale[logprobs[0] + ... + logprobs[j]] for value j",
            "scale": _decimals(self.step),
        }
        return [ArraySpec("logprobs", np.min_scalar_type(len(scale) - 1).name, k, rule, steps=True)]

    def encode(self, relative: np.ndarray) -> Arrays:
        scale = graded_scale(self.step)
        indices = np.searchsorted((scale[1:] + scale[:-1]) / 2, -relative.T)
        return {"logprobs": indices.astype(np.min_scalar_type(len(scale) - 1)).T}

    def decode(self, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        indices = stored["logprobs"]
        return _look_up(_values(self.step, indices.dtype.str), indices)

    def powers(self, stored: Mapping[str, np.ndarray], relative: np.ndarray, temperature: float) -> np.ndarray:
        indices = stored["logprobs"]
        return _look_up(_powers(self.step, indices.dtype.str, temperature), indices)


@cache
def _values(step: float, dtype: str) -> pa.Array:
    """-scale by index, for every number of `dtype`; indices beyond the scale give its last value."""
    scale = graded_scale(step)
    return pa.array(-np.append(scale, np.full(np.iinfo(dtype).max + 1 - len(scale), scale[-1])))


@cache
def _powers(step: float, dtype: str, temperature: float) -> pa.Array:
    """exp(-scale / temperature) by index, float32."""
    return pa.array(np.exp(_values(step, dtype).to_numpy().astype(np.float64) / temperature).astype(np.float32))


def _look_up(table: pa.Array, indices: np.ndarray) -> np.ndarray:
    """`table[indices]`, read-only; the table has an entry for every number of the indices' dtype."""
    values = pc.take(table, pa.array(indices.reshape(-1)), boundscheck=False).to_numpy()
    return values.reshape(indices.shape)  # type: ignore[no-any-return]


class Float:
    """Values as floats of one width."""

    def __init__(self, dtype: str) -> None:
        self.dtype = self.tail = dtype

    def arrays(self, k: int) -> list[ArraySpec]:
        return [
            ArraySpec("logprobs", self.dtype, k, {"quantity": _QUANTITY, "codec": self.dtype, "decode": "logprobs"})
        ]

    def encode(self, relative: np.ndarray) -> Arrays:
        return {"logprobs": np.maximum(relative, np.finfo(self.dtype).min).astype(self.dtype)}

    def decode(self, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        return stored["logprobs"].astype(np.float32)

    def powers(self, stored: Mapping[str, np.ndarray], relative: np.ndarray, temperature: float) -> np.ndarray:
        return _exponentials(relative, temperature)


CODECS: dict[str, LogprobCodec] = {
    "graded": Graded(1 / 46),
    "graded-fine": Graded(1 / 640),
    "graded-coarse": Graded(1 / 20),
    "linear8": Linear8(),
    "float16": Float("float16"),
    "float32": Float("float32"),
}
