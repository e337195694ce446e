"""Log-probabilities as small numbers, and back: how a head row becomes stored arrays.

A head row is stored relative to its top value (0 >= r_1 >= ... >= r_k), as one of

    graded         r_j = -scale[sum_{i<=j} steps_i]; the scale's points lie the further apart the less probable a
    graded-fine    value is, so every value costs about the same error; fine and coarse differ in density, and steps
    graded-coarse  are 16 bits in the fine one, 8 in the others
    linear8        r_j = -q_j * span / 255, q uint8, span float16 per row     1 byte per value
    float16        r_j as float16                                             2 bytes
    float32        r_j as float32                                             4 bytes, exact

What each weighs after compression and what it costs in KL is a table in docs/cache-format.md (benchmarks/sizes.py).
float16 ends at -65504 nats, and so do the scales; what lies below is stored as that, and its probability, 0, is the same.

A value on a scale is one of a few, and so is its exponential: both are looked up, by Arrow, which takes small integers as
they are: a third of the time of exp, two thirds of numpy's take (docs/log.md).

Add a codec: a class with `arrays`, `encode`, `decode`, `powers` and one line in `CODECS`; the test battery finds it there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kd.cache_builder.store.arrays import Arrays, ArraySpec

FLOAT16_MIN = float(np.finfo(np.float16).min)


class LogprobCodec(Protocol):
    """How a head row, relative to its top value, becomes stored arrays."""

    tail: str
    """dtype of the tail's odds; as logarithms in float16 they cost at most 5e-8 nats of KL."""

    def arrays(self, k: int) -> list[ArraySpec]:
        """The arrays this codec stores."""

    def encode(self, relative: np.ndarray) -> Arrays:
        """`[N, K]` float32 descending from 0 -> stored arrays."""

    def decode(self, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        """Stored arrays -> `[N, K]` float32, descending."""

    def powers(self, stored: Mapping[str, np.ndarray], relative: np.ndarray, temperature: float) -> np.ndarray:
        """exp(r_j / temperature) `[N, K]` float32 of stored arrays and what they decode to."""


def power_sums(
    codec: LogprobCodec, stored: Mapping[str, np.ndarray], relative: np.ndarray, temperatures: Sequence[float]
) -> np.ndarray:
    """`[N, T]` float32: `sum_j exp(r_j / T)` of stored arrays and what they decode to, at ascending temperatures."""
    sums = np.empty((len(relative), len(temperatures)), dtype=np.float32)
    powers, previous = np.empty(0), 0.0
    for t in reversed(range(len(temperatures))):
        # a product is a tenth of an exponential, a fifth of a look-up
        halved = previous == 2 * temperatures[t]
        powers = powers * powers if halved else codec.powers(stored, relative, temperatures[t])
        previous = temperatures[t]
        np.einsum("nk->n", powers, out=sums[:, t])
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
    """exp(relative / temperature), where values are too many to be looked up."""
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
    """Places on `graded_scale(step)`; the array holds the steps between neighbours, and no error is carried along a row."""

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
        places = np.searchsorted((scale[1:] + scale[:-1]) / 2, -relative.T)
        return {"logprobs": places.astype(np.min_scalar_type(len(scale) - 1)).T}

    def decode(self, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        places = stored["logprobs"]
        return _look_up(_values(self.step, places.dtype.str), places)

    def powers(self, stored: Mapping[str, np.ndarray], relative: np.ndarray, temperature: float) -> np.ndarray:
        places = stored["logprobs"]
        return _look_up(_powers(self.step, places.dtype.str, temperature), places)


@cache
def _values(step: float, dtype: str) -> pa.Array:
    """-scale by place, for every number of `dtype`: those beyond the scale are its end."""
    scale = graded_scale(step)
    return pa.array(-np.append(scale, np.full(np.iinfo(dtype).max + 1 - len(scale), scale[-1])))


@cache
def _powers(step: float, dtype: str, temperature: float) -> pa.Array:
    """exp(-scale / temperature) by place, float32."""
    return pa.array(np.exp(_values(step, dtype).to_numpy().astype(np.float64) / temperature).astype(np.float32))


def _look_up(table: pa.Array, places: np.ndarray) -> np.ndarray:
    """`table[places]`, read-only; the table has an entry for every number of the places' dtype."""
    found = pc.take(table, pa.array(places.reshape(-1)), boundscheck=False).to_numpy()
    return found.reshape(places.shape)  # type: ignore[no-any-return]


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
