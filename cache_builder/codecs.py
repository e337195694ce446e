"""Log-probabilities as small numbers, and back: the mapping between `RawTargets` and the stored arrays.

A head row is stored relative to its top value (0 >= r_1 >= ... >= r_k), as one of

    linear8    r_j = -q_j * span / 255, q uint8, span float16 per row     1 byte per value, KL error about 1e-5
    float16    r_j as float16                                             2 bytes, about 1e-7
    float32    r_j as float32                                             4 bytes, exact

float16 ends at -65504 nats; what lies below is stored as that, and its probability, 0, is the same.
The top value itself is not stored: it is -log_z at temperature 1. After quantising, `log_z` is computed again
from the *decoded* head and the *exact* tail, so that kept mass plus tail mass is 1 for what a reader decodes,
at every temperature, and the tail's mass is right whatever the head's codec.

Add a codec: a class with `arrays`, `encode`, `decode` and one line in `CODECS`; the test battery finds it there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

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

    @property
    def row_bytes(self) -> int:
        """Bytes of one row before compression."""
        return int(np.dtype(self.dtype).itemsize) * (1 if self.columns is None else self.columns)


class LogprobCodec(Protocol):
    """How a head row, relative to its top value, becomes stored arrays."""

    def arrays(self, k: int) -> list[ArraySpec]:
        """The arrays this codec stores."""

    def encode(self, relative: np.ndarray) -> Arrays:
        """`[N, K]` float32 descending from 0 -> stored arrays."""

    def decode(self, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        """Stored arrays -> `[N, K]` float32, descending."""


_QUANTITY = "log p(token_j) - log p(token_1) at temperature 1, nats; add -log_z[T=1] for log p"


class Linear8:
    """8 bits linear between the first and the k-th value of each row."""

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


class Float:
    """Values as floats of one width."""

    def __init__(self, dtype: str) -> None:
        self.dtype = dtype

    def arrays(self, k: int) -> list[ArraySpec]:
        return [
            ArraySpec("logprobs", self.dtype, k, {"quantity": _QUANTITY, "codec": self.dtype, "decode": "logprobs"})
        ]

    def encode(self, relative: np.ndarray) -> Arrays:
        return {"logprobs": np.maximum(relative, np.finfo(self.dtype).min).astype(self.dtype)}

    def decode(self, stored: Mapping[str, np.ndarray]) -> np.ndarray:
        return stored["logprobs"].astype(np.float32)


CODECS: dict[str, LogprobCodec] = {
    "linear8": Linear8(),
    "float16": Float("float16"),
    "float32": Float("float32"),
}


def id_dtype(vocabulary_size: int) -> str:
    """Smallest unsigned dtype that holds every id."""
    return "uint16" if vocabulary_size <= 2**16 else "uint32"


def array_specs(config: TargetConfig, vocabulary_size: int) -> list[ArraySpec]:
    """All arrays a cache of this configuration stores, in a fixed order."""
    kept, ids = PROFILES[config.profile], id_dtype(vocabulary_size)
    specs = [
        ArraySpec("gold_ids", ids, None, {"quantity": "id of the token that was actually there"}),
        ArraySpec("log_z", "float32", len(config.temperatures), {
            "quantity": "log sum_v exp((z_v - max z) / T), nats", "temperatures": list(config.temperatures)}),
        ArraySpec("gold_logprob", "float16", None, {"quantity": "log p(gold token), temperature 1, nats"}),
        ArraySpec("gold_rank", ids, None, {"quantity": "number of tokens more probable than the gold token"}),
        ArraySpec("byte_end", "uint32", None, {"quantity": "end of the gold token in the target's UTF-8 bytes"}),
    ]  # fmt: skip
    if config.top_k:
        if kept.ids:
            specs.append(ArraySpec("token_ids", ids, config.top_k, {"quantity": "ids, most probable first"}))
        specs += CODECS[config.logprob_codec].arrays(config.top_k)
    if config.tail_bands:
        specs.append(ArraySpec("tail_bands", "float16", config.tail_bands * len(config.band_temperatures), {
            "quantity": "log mass of rank band b at a temperature, nats; columns are [temperature, band]",
            "edges": band_edges(config.top_k, vocabulary_size, config.tail_bands),
            "temperatures": list(config.band_temperatures)}))  # fmt: skip
    if config.samples:
        counts = "uint8" if config.samples < 256 else "uint16"
        specs.append(ArraySpec("sample_ids", ids, config.samples, {"quantity": "distinct ids drawn from p"}))
        specs.append(ArraySpec("sample_counts", counts, config.samples, {"quantity": "draws of each id; 0 = unused"}))
    if kept.boundary:
        specs.append(ArraySpec("boundary_logprob", "float16", None, {
            "quantity": "log P(next token starts a word or ends the text), nats"}))  # fmt: skip
    return specs


def encode(raw: RawTargets, config: TargetConfig) -> tuple[Arrays, dict[str, float]]:
    """Quantise n rows. Returns the stored arrays and the sums of the quality figures over the rows.

    Quality: `mass_kept` = Σ p over the kept tokens at T=1; `head_kl` = KL(teacher || decoded) in nats over the
    kept tokens and the rest as one outcome; `gold_nll` in nats; `top1` = how often the gold token ranks first.
    """
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
        adjusted = np.empty_like(log_z)
        for t, temperature in enumerate(config.temperatures):
            whole = np.exp(log_z[:, t])
            tail = np.maximum(whole - np.exp(exact / temperature).sum(1), 0.0)
            adjusted[:, t] = np.log(np.exp(decoded / temperature).sum(1) + tail)
        p, log_p, log_q = np.exp(exact - log_z[:, [one]]), exact - log_z[:, [one]], decoded - adjusted[:, [one]]
        tail = np.maximum(1 - p.sum(1), 1e-12)
        tail_decoded = np.maximum(1 - np.exp(log_q).sum(1), 1e-12)
        kl = (p * (log_p - log_q)).sum(1) + tail * np.log(tail / tail_decoded)
        quality |= {"mass_kept": float(p.sum()), "head_kl": float(np.maximum(kl, 0.0).sum())}
        stored |= head
        log_z = adjusted
        if PROFILES[config.profile].ids and raw.token_ids is not None:
            stored["token_ids"] = raw.token_ids
    stored["log_z"] = log_z
    for name in ("tail_bands", "sample_ids", "sample_counts", "boundary_logprob"):
        value = getattr(raw, name)
        if value is not None:
            stored[name] = value
    return stored, quality


def decode(stored: Mapping[str, np.ndarray], config: TargetConfig, top_k: int | None = None) -> SoftTargets:
    """Stored arrays of N rows -> `SoftTargets`; `top_k` keeps fewer tokens than stored (a slice, tail re-derived)."""
    log_z = np.asarray(stored["log_z"], dtype=np.float32)
    optional: dict[str, Any] = {}
    if config.top_k:
        k = config.top_k if top_k is None else top_k
        relative = CODECS[config.logprob_codec].decode(stored)[:, :k]
        optional["logprobs"] = relative - log_z[:, [config.temperatures.index(1.0)]]
        if "token_ids" in stored:
            optional["token_ids"] = stored["token_ids"][:, :k].astype(np.int64)
    if "tail_bands" in stored:
        bands = stored["tail_bands"].astype(np.float32)
        optional["tail_bands"] = bands.reshape(len(bands), len(config.band_temperatures), config.tail_bands)
    if "sample_ids" in stored:
        optional["sample_ids"] = stored["sample_ids"].astype(np.int64)
        optional["sample_counts"] = stored["sample_counts"].astype(np.int64)
    if "boundary_logprob" in stored:
        optional["boundary_logprob"] = stored["boundary_logprob"].astype(np.float32)
    return SoftTargets(
        gold_ids=stored["gold_ids"].astype(np.int64),
        log_z=log_z,
        temperatures=config.temperatures,
        gold_logprob=stored["gold_logprob"].astype(np.float32),
        gold_rank=stored["gold_rank"].astype(np.int64),
        byte_end=stored["byte_end"].astype(np.int64),
        band_temperatures=config.band_temperatures if "tail_bands" in stored else (),
        **optional,
    )
