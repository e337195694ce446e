"""Log-probabilities as small numbers, and back: the mapping between `RawTargets` and the stored arrays.

A head row is stored relative to its top value (0 >= r_1 >= ... >= r_k), as one of

    graded         r_j = -scale[sum_{i<=j} steps_i], steps uint16; the scale's points lie the further apart the less
    graded-fine    probable a value is, so every value costs about the same error; fine and coarse differ in density
    graded-coarse
    linear8        r_j = -q_j * span / 255, q uint8, span float16 per row     1 byte per value
    float16        r_j as float16                                             2 bytes
    float32        r_j as float32                                             4 bytes, exact

What each weighs after compression and what it costs in KL is a table in docs/cache-format.md (benchmarks/sizes.py).
float16 ends at -65504 nats, and so do the scales; what lies below is stored as that, and its probability, 0, is the same.

The top value itself is not stored: it is -log_z at temperature 1. Neither is log_z, but the odds of the tail: its
exact mass over that of the *decoded* head. So kept mass plus tail mass is 1 for what a reader decodes, at every
temperature, the tail's mass is right whatever the head's codec, and where there is no tail none is decoded.

Add a codec: a class with `arrays`, `encode`, `decode` and one line in `CODECS`; the test battery finds it there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Protocol

import numpy as np

from kd.cache_builder.targets import PROFILES, RawTargets, SoftTargets, TargetConfig, band_edges

Arrays = dict[str, np.ndarray]

FLOAT16_MIN = float(np.finfo(np.float16).min)


@dataclass(frozen=True)
class ArraySpec:
    """One stored array: `[rows]` or `[rows, columns]`."""

    name: str
    dtype: str
    columns: int | None
    attributes: Mapping[str, Any]
    """What a reader without our code needs: quantity, unit, decoding rule."""
    ids: bool = False
    """Token ids: the array holds their codes, see `codes_by_count`."""
    by_column: bool = False
    """A chunk holds one column after another (the `transpose` codec): the values of a rank are alike."""
    shuffle: Literal["shuffle", "bitshuffle"] = "bitshuffle"
    """What blosc reorders before zstd: bits, or whole bytes (`shuffle`)."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression."""
        return int(np.dtype(self.dtype).itemsize) * (1 if self.columns is None else self.columns)


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


class Graded:
    """Places on `graded_scale(step)`, as differences between neighbours; no error is carried along a row."""

    tail = "float16"

    def __init__(self, step: float) -> None:
        self.step = step

    def arrays(self, k: int) -> list[ArraySpec]:
        scale = graded_scale(self.step)
        rule = {
            "quantity": _QUANTITY, "codec": "graded", "decode": "-scale[logprobs[0] + ... + logprobs[j]] for value j",
            "scale": _decimals(self.step),
        }  # fmt: skip
        return [ArraySpec("logprobs", "uint8" if len(scale) <= 2**8 else "uint16", k, rule)]

    def encode(self, relative: np.ndarray) -> Arrays:
        scale = graded_scale(self.step)
        places = np.searchsorted((scale[1:] + scale[:-1]) / 2, -relative.T)
        return {"logprobs": np.diff(places, axis=0, prepend=0).astype(np.min_scalar_type(len(scale) - 1)).T}

    def decode(self, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        scale = -graded_scale(self.step)
        places = np.array(stored["logprobs"].T, dtype=np.min_scalar_type(len(scale) - 1), order="C")
        for above, below in pairwise(places):  # [K, N]: whole columns at once
            np.add(below, above, out=below)
        return scale.take(places, mode="clip").T


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


CODECS: dict[str, LogprobCodec] = {
    "graded": Graded(1 / 46),
    "graded-fine": Graded(1 / 640),
    "graded-coarse": Graded(1 / 20),
    "linear8": Linear8(),
    "float16": Float("float16"),
    "float32": Float("float32"),
}


def id_dtype(vocabulary_size: int) -> str:
    """Smallest unsigned dtype that holds every id."""
    return "uint16" if vocabulary_size <= 2**16 else "uint32"


def array_specs(config: TargetConfig, vocabulary_size: int, version: int = 2) -> list[ArraySpec]:
    """All arrays a cache of this configuration and format version stores, in a fixed order."""
    kept, ids = PROFILES[config.profile], id_dtype(vocabulary_size)
    coded = version > 1

    def of_ids(name: str, columns: int | None, quantity: str) -> ArraySpec:
        rule = {"quantity": quantity}
        if coded:
            rule["decode"] = (
                "a value c is the id whose `code` in vocabulary.parquet is c; an id beyond that table is its own code"
            )
        return ArraySpec(name, ids, columns, rule, ids=coded)

    grid = {"temperatures": list(config.temperatures)}
    log_z = ArraySpec("log_z", "float32", len(config.temperatures), {
        "quantity": "log sum_v exp((z_v - max z) / T), nats"} | grid)  # fmt: skip
    byte_end = ArraySpec("byte_end", "uint32", None, {"quantity": "end of the gold token in the target's UTF-8 bytes"})
    if coded and config.top_k:
        log_z = ArraySpec("tail_odds", CODECS[config.logprob_codec].tail, len(config.temperatures), {
            "quantity": "log of the mass beyond the kept tokens over the mass of the kept ones, at temperature T",
            "decode": "log sum_v exp((z_v - max z) / T) = log sum_j exp(r_j / T) + log(1 + exp(tail_odds)), with r_j "
                      "as decoded from `logprobs`"} | grid)  # fmt: skip
    if coded:
        byte_end = ArraySpec("byte_length", "uint32", None, {
            "quantity": "bytes of the target from the end of the token before (of its example) to the end of this one",
            "decode": "byte_end = sum over the rows of the example so far, modulo 2^32"})  # fmt: skip
    specs = [
        of_ids("gold_ids", None, "id of the token that was actually there"),
        log_z,
        ArraySpec("gold_logprob", "float16", None, {"quantity": "log p(gold token), temperature 1, nats"}),
        ArraySpec("gold_rank", ids, None, {"quantity": "number of tokens more probable than the gold token"}),
        byte_end,
    ]
    if config.top_k:
        if kept.ids:
            specs.append(of_ids("token_ids", config.top_k, "ids, most probable first"))
        specs += CODECS[config.logprob_codec].arrays(config.top_k)
    if config.tail_bands:
        specs.append(ArraySpec("tail_bands", "float16", config.tail_bands * len(config.band_temperatures), {
            "quantity": "log mass of rank band b at a temperature, nats; columns are [temperature, band]",
            "edges": band_edges(config.top_k, vocabulary_size, config.tail_bands),
            "temperatures": list(config.band_temperatures)}))  # fmt: skip
    if config.samples:
        counts = "uint8" if config.samples < 256 else "uint16"
        specs.append(of_ids("sample_ids", config.samples, "distinct ids drawn from p"))
        specs.append(ArraySpec("sample_counts", counts, config.samples, {"quantity": "draws of each id; 0 = unused"}))
    if kept.boundary:
        specs.append(ArraySpec("boundary_logprob", "float16", None, {
            "quantity": "log P(next token starts a word or ends the text), nats"}))  # fmt: skip
    if not coded:
        return specs
    # Measured (docs/log.md): small numbers want their bits by column; in rows of ids zstd finds what occurred before
    by_column = ("logprobs", "tail_odds", "sample_counts")
    return [replace(s, by_column=True) if s.name in by_column else replace(s, shuffle="shuffle") for s in specs]


def encode(raw: RawTargets, config: TargetConfig) -> tuple[Arrays, dict[str, float]]:
    """Quantise n rows. Returns the stored arrays and the sums of the quality figures over the rows.

    A few rows at a time: in float64 the head of a shard is larger than everything else a build holds.

    Quality: `mass_kept` = Σ p over the kept tokens at T=1; `head_kl` = KL(teacher || decoded) in nats over the
    kept tokens and the rest as one outcome; `gold_nll` in nats; `top1` = how often the gold token ranks first.
    """
    parts = [_encode(_rows(raw, slice(first, first + ENCODED_ROWS)), config)
             for first in range(0, max(len(raw.gold_ids), 1), ENCODED_ROWS)]  # fmt: skip
    stored = {name: np.concatenate([arrays[name] for arrays, _ in parts]) for name in parts[0][0]}
    return stored, {name: math.fsum(sums[name] for _, sums in parts) for name in parts[0][1]}


ENCODED_ROWS = 2000
"""Rows encoded at once; no power of two, or whole columns share a cache line's place."""


def _rows(raw: RawTargets, part: slice) -> RawTargets:
    own: dict[str, Any] = {name: None if value is None else value[part] for name, value in vars(raw).items()}
    return RawTargets(**own)


def _encode(raw: RawTargets, config: TargetConfig) -> tuple[Arrays, dict[str, float]]:
    log_z = raw.log_z.astype(np.float64)
    one = config.temperatures.index(1.0)
    stored: Arrays = {
        "gold_ids": raw.gold_ids,
        "gold_logprob": np.maximum(raw.gold_logprob, FLOAT16_MIN),
        "gold_rank": raw.gold_rank,
        "byte_end": raw.byte_end,
    }
    quality = {
        "rows": float(len(raw.gold_ids)),
        "gold_nll": float(-raw.gold_logprob.astype(np.float64).sum()),
        "top1": float((raw.gold_rank == 0).sum()),
    }
    if raw.relative is not None:
        codec = CODECS[config.logprob_codec]
        exact, head = raw.relative.astype(np.float64), codec.encode(raw.relative)
        decoded = codec.decode(head).astype(np.float64)
        odds, adjusted = np.empty_like(log_z), np.empty_like(log_z)
        for t, temperature in enumerate(config.temperatures):
            tail = np.maximum(np.exp(log_z[:, t]) - np.exp(exact / temperature).sum(1), 0.0)
            kept = np.exp(decoded / temperature).sum(1)
            with np.errstate(divide="ignore"):
                odds[:, t] = np.maximum(np.log(tail / kept), FLOAT16_MIN).astype(codec.tail)
            adjusted[:, t] = np.log(kept) + np.log1p(np.exp(odds[:, t]))
        p, log_p, log_q = np.exp(exact - log_z[:, [one]]), exact - log_z[:, [one]], decoded - adjusted[:, [one]]
        tail = np.maximum(1 - p.sum(1), 1e-12)
        tail_decoded = np.maximum(1 - np.exp(log_q).sum(1), 1e-12)
        kl = (p * (log_p - log_q)).sum(1) + tail * np.log(tail / tail_decoded)
        quality |= {"mass_kept": float(p.sum()), "head_kl": float(np.maximum(kl, 0.0).sum())}
        stored |= head | {"tail_odds": odds}
        if PROFILES[config.profile].ids and raw.token_ids is not None:
            stored["token_ids"] = raw.token_ids
    else:
        stored["log_z"] = log_z
    for name in ("tail_bands", "sample_ids", "sample_counts", "boundary_logprob"):
        value = getattr(raw, name)
        if value is not None:
            stored[name] = value
    return stored, quality


def decode(stored: Mapping[str, np.ndarray], config: TargetConfig, top_k: int | None = None) -> SoftTargets:
    """Stored arrays of N rows -> `SoftTargets`; `top_k` keeps fewer tokens than stored (a slice, tail re-derived).

    Arrays that were not read are None; without the head's there is no normaliser either, at no temperature.
    """
    optional: dict[str, Any] = {}
    temperatures = config.temperatures
    if config.top_k and "logprobs" in stored:
        k = config.top_k if top_k is None else top_k
        relative = CODECS[config.logprob_codec].decode(stored)
        log_z = _log_z(stored, relative, config.temperatures)
        optional["logprobs"] = np.ascontiguousarray(relative[:, :k] - log_z[:, [config.temperatures.index(1.0)]])
        if "token_ids" in stored:
            optional["token_ids"] = stored["token_ids"][:, :k].astype(np.int64, order="C", copy=False)
    elif "log_z" in stored:
        log_z = stored["log_z"]
    else:  # the head was left out, and what is there answers for no temperature
        log_z, temperatures = np.empty((len(stored["gold_ids"]), 0), dtype=np.float32), ()
    if "tail_bands" in stored:
        bands = stored["tail_bands"].astype(np.float32, order="C")
        optional["tail_bands"] = bands.reshape(len(bands), len(config.band_temperatures), config.tail_bands)
    if "sample_ids" in stored:
        optional["sample_ids"] = stored["sample_ids"].astype(np.int64, order="C")
        optional["sample_counts"] = stored["sample_counts"].astype(np.int64, order="C")
    if "boundary_logprob" in stored:
        optional["boundary_logprob"] = stored["boundary_logprob"].astype(np.float32)
    return SoftTargets(
        gold_ids=stored["gold_ids"].astype(np.int64),
        log_z=log_z,
        temperatures=temperatures,
        gold_logprob=stored["gold_logprob"].astype(np.float32),
        gold_rank=stored["gold_rank"].astype(np.int64),
        byte_end=stored["byte_end"].astype(np.int64),
        band_temperatures=config.band_temperatures if "tail_bands" in stored else (),
        **optional,
    )


def _log_z(stored: Mapping[str, np.ndarray], relative: np.ndarray, temperatures: tuple[float, ...]) -> np.ndarray:
    """`[N, T]` float32 normalisers: stored (format version 1), or from the decoded head and the odds of the tail."""
    if "log_z" in stored:
        return np.asarray(stored["log_z"], dtype=np.float32)
    log_z = np.empty((len(relative), len(temperatures)), dtype=np.float32)
    powers, previous = np.empty_like(relative), 0.0
    for t in reversed(range(len(temperatures))):
        if previous == 2 * temperatures[t]:  # a product is a tenth of an exponential
            np.multiply(powers, powers, out=powers)
        else:
            np.exp(np.divide(relative, np.float32(temperatures[t]), out=powers), out=powers)
        previous = temperatures[t]
        odds = np.exp(stored["tail_odds"][:, t].astype(np.float32))
        log_z[:, t] = np.log(powers.sum(axis=1)) + np.log1p(odds)
    return log_z
