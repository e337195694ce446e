"""Encode `RawTargets` as stored arrays and decode them to `SoftTargets`; the log-probabilities are coded by `logprob_codecs`.

The top value of a row is not stored: it is -log_z at temperature 1. Instead of log_z, the odds of the tail are stored: its
exact mass over the mass of the *decoded* head. So kept mass plus tail mass is 1 in what a reader decodes, at every temperature;
the tail's mass is right with every codec; and a row without a tail is decoded without one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kd.cache_builder.store.encoding.arrays import Arrays, ArraySpec, id_dtype
from kd.cache_builder.store.encoding.logprob_codecs import CODECS, FLOAT16_MIN, power_sums
from kd.cache_builder.store.encoding.rank_bands import with_cut_tokens
from kd.cache_builder.store.followers import FOLLOWERS, LISTED
from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.ragged import ENTRY_ARRAYS, KEPT, TAIL_DRAWS, columns_of_entries
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.cache_builder.store.targets import RawTargets, TargetConfig


def array_specs(config: TargetConfig, vocabulary_size: int, version: int = 3) -> list[ArraySpec]:
    """All arrays that a cache with these settings and this format version stores, in a fixed order."""
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
    log_z = ArraySpec(
        "log_z", "float32", len(config.temperatures), {"quantity": "log sum_v exp((z_v - max z) / T), nats"} | grid
    )
    byte_end = ArraySpec("byte_end", "uint32", None, {"quantity": "end of the gold token in the target's UTF-8 bytes"})
    if coded and config.top_k:
        log_z = ArraySpec(
            "tail_odds",
            CODECS[config.logprob_codec].tail,
            len(config.temperatures),
            {
                "quantity": "log of the mass beyond the kept tokens over the mass of the kept ones, at temperature T",
                "decode": "log sum_v exp((z_v - max z) / T) = log sum_j exp(r_j / T) + log(1 + exp(tail_odds)), with r_j "
                "as decoded from `logprobs`",
            }
            | grid,
        )
    if coded:
        byte_end = ArraySpec(
            "byte_length",
            "uint32",
            None,
            {
                "quantity": "bytes of the target from the end of the token before (of its example) to the end of this one",
                "decode": "byte_end = sum over the rows of the example so far, modulo 2^32",
            },
        )
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
        if config.id_codec == "followers":
            specs[-1:] = _in_lists(specs[-1], vocabulary_size)
        specs += CODECS[config.logprob_codec].arrays(config.top_k)
    if config.ragged:
        count = "uint8" if config.top_k < 256 else "uint16"
        quantity = "number of tokens that the row keeps"
        if config.certain_below:
            quantity += f"; 1 where the entropy is below {config.certain_below:g} nats"
        specs.append(ArraySpec(KEPT, count, None, {"quantity": quantity}))
    if config.tail_bands:
        beyond = {"rows": "of the ranks of a band, those beyond the tokens that the row keeps"} if config.ragged else {}
        specs.append(
            ArraySpec(
                "tail_bands",
                "float16",
                config.tail_bands * len(config.band_temperatures),
                {
                    "quantity": "log mass of rank band b at a temperature, nats; columns are [temperature, band]",
                    "edges": config.edges(vocabulary_size),
                    "temperatures": list(config.band_temperatures),
                }
                | beyond,
            )
        )
    if config.samples:
        counts = "uint8" if config.samples < 256 else "uint16"
        specs.append(of_ids("sample_ids", config.samples, "distinct ids drawn from p"))
        specs.append(ArraySpec("sample_counts", counts, config.samples, {"quantity": "draws of each id; 0 = unused"}))
    if config.tail_samples:
        count = "uint8" if config.tail_samples < 256 else "uint16"
        specs.append(
            ArraySpec(TAIL_DRAWS, count, None, {"quantity": "number of tokens drawn from beyond the kept ones"})
        )
        drawn = of_ids("tail_ids", config.tail_samples, "ids drawn from p at temperature 1 beyond the kept tokens")
        rule = f"code j of a row is tail_ids[0] + ... + tail_ids[j]; {drawn.attributes['decode']}; each draw stands for the mass "
        rule += "beyond the kept tokens over the row's `tail_draws`"
        attributes = {**drawn.attributes, "decode": rule}
        specs.append(replace(drawn, steps=True, ragged=True, counts=TAIL_DRAWS, attributes=attributes))
    if kept.boundary:
        specs.append(
            ArraySpec(
                "boundary_logprob",
                "float16",
                None,
                {"quantity": "log P(next token starts a word or ends the text), nats"},
            )
        )
    if not coded:
        return specs
    # Measured (docs/log.md): small numbers want their bits by column; in rows of ids zstd finds what occurred before
    by_column = ("logprobs", "tail_odds", "sample_counts", FOLLOWERS)
    specs = [replace(s, by_column=True) if s.name in by_column else replace(s, shuffle="shuffle") for s in specs]
    if version > 2:
        specs = [replace(s, separator=".") for s in specs]
    return [_of_entries(s) if s.ragged or (config.ragged and s.name in ENTRY_ARRAYS) else s for s in specs]


def _in_lists(token_ids: ArraySpec, vocabulary_size: int) -> list[ArraySpec]:
    """The array of ids as places in lists of followers, and the array with these lists."""
    rule = f"a value of {LISTED} or more is {LISTED} more than the code of the id; a lower value v is the code in row i + v of "
    rule += f"`{FOLLOWERS}`, where i is the first row of the shard whose first column is the value of `gold_ids` in the row before "
    rule += "this one (0 in the first row of a shard); for codes, see `gold_ids`"
    dtype, pair = (
        id_dtype(vocabulary_size + LISTED),
        "codes of a token and of one that the teacher often expects after it",
    )
    places = replace(token_ids, dtype=dtype, attributes={**token_ids.attributes, "decode": rule})
    return [places, ArraySpec(FOLLOWERS, token_ids.dtype, 2, {"quantity": pair})]


def _of_entries(spec: ArraySpec) -> ArraySpec:
    """The same array with rows that differ in length."""
    rule = (
        f"chunk c holds the tokens of its rows, row after row, `{spec.counts}` of each, and then zeros; where `decode` "
    )
    rule += "speaks of a row, its tokens alone are meant"
    return replace(spec, ragged=True, by_column=False, attributes={**spec.attributes, "rows": rule})


def encode(
    raw: RawTargets, config: TargetConfig, *, vocabulary_size: int | None = None
) -> tuple[Arrays, dict[str, float]]:
    """Quantise n rows. Returns the stored arrays and the sums of the quality figures over the rows.

    vocabulary_size   number of the teacher's ids; needed for rank bands of rows that differ in length

    Few rows are encoded at a time: in float64, the head of a shard would be larger than everything else a build holds.

    Quality: `mass_kept` = Σ p over the kept tokens at T=1; `head_kl` = KL(teacher || decoded) in nats over the
    kept tokens and the rest as one outcome; `gold_nll` in nats; `top1` = how often the gold token ranks first;
    `tokens_kept` = how many each row keeps, where rows differ in length; `one_token` = rows that keep one, where some are certain.
    """
    parts = [
        _encode(_rows(raw, slice(first, first + ENCODED_ROWS)), config, vocabulary_size)
        for first in range(0, max(len(raw.gold_ids), 1), ENCODED_ROWS)
    ]
    stored = {name: np.concatenate([arrays[name] for arrays, _ in parts]) for name in parts[0][0]}
    return stored, {name: math.fsum(sums[name] for _, sums in parts) for name in parts[0][1]}


ENCODED_ROWS = 2000
"""Rows encoded at once. It is not a power of two, because the elements of a column would then compete for the same cache lines."""


def _rows(raw: RawTargets, part: slice) -> RawTargets:
    taken: dict[str, Any] = {name: None if value is None else value[part] for name, value in vars(raw).items()}
    return RawTargets(**taken)


def _encode(raw: RawTargets, config: TargetConfig, vocabulary_size: int | None) -> tuple[Arrays, dict[str, float]]:
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
        bands = raw.tail_bands
        if config.ragged:
            values = np.exp(exact - log_z[:, [one]])
            lengths = config.lengths(values, raw.entropy) if raw.kept is None else raw.kept
            beyond = np.arange(exact.shape[1]) >= lengths[:, None]
            if bands is not None:
                assert vocabulary_size is not None
                cut = np.where(beyond, exact, -np.inf)
                bands = _bands_beyond(bands, config, config.edges(vocabulary_size), cut, log_z)
            exact[beyond] = decoded[beyond] = -np.inf  # of no mass: what is cut belongs to the tail
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
        with np.errstate(invalid="ignore"):  # -inf - -inf
            kl = np.where(p > 0, p * (log_p - log_q), 0.0).sum(1) + tail * np.log(tail / tail_decoded)
        quality |= {"mass_kept": float(p.sum()), "head_kl": float(np.maximum(kl, 0.0).sum())}
        stored |= head | {"tail_odds": odds}
        if PROFILES[config.profile].ids and raw.token_ids is not None:
            stored["token_ids"] = raw.token_ids
        if config.ragged:
            stored |= {name: stored[name][~beyond] for name in ENTRY_ARRAYS} | {KEPT: lengths}
            quality |= lengths_measured(lengths, config)
        if bands is not None:
            stored["tail_bands"] = bands
    else:
        stored["log_z"] = log_z
    if raw.tail_draws is not None:
        quality["tail_draws"] = float(raw.tail_draws.sum())
    for name in ("sample_ids", "sample_counts", "tail_ids", TAIL_DRAWS, "boundary_logprob"):
        value = getattr(raw, name)
        if value is not None:
            stored[name] = value
    return stored, quality


def lengths_measured(kept: np.ndarray, config: TargetConfig) -> dict[str, float]:
    """The quality figures that follow from lengths: kept tokens, and rows of one token where some rows are certain."""
    certain = {"one_token": float((kept == 1).sum())} if config.certain_below else {}
    return {"tokens_kept": float(kept.sum())} | certain


def _bands_beyond(
    bands: np.ndarray, config: TargetConfig, edges: Sequence[int], log_p: np.ndarray, log_z: np.ndarray
) -> np.ndarray:
    """`[n, band temperatures * bands]` log-masses: those beyond the K tokens, and the cut ones among these K.

    log_p  [n, K]  relative log-probabilities at temperature 1 of cut tokens; minus infinity in place of the kept ones
    """
    rows, ranks = np.nonzero(log_p > -np.inf)
    parts = []
    for part, temperature in zip(
        np.split(bands, len(config.band_temperatures), axis=1), config.band_temperatures, strict=True
    ):
        cut = log_p[rows, ranks] / temperature - log_z[rows, config.temperatures.index(temperature)]
        parts.append(with_cut_tokens(part, edges, rows, ranks, cut))
    return np.concatenate(parts, axis=1)


def decode(stored: Mapping[str, np.ndarray], config: TargetConfig, top_k: int | None = None) -> SoftTargets:
    """Stored arrays of N rows -> `SoftTargets`; with `top_k`, fewer tokens than stored, and the tail that follows from them.
    Where rows differ in length, those are cut that are longer.

    Arrays that were not read are None. Without those of the head, there is no normaliser at any temperature.
    """
    optional: dict[str, Any] = {}
    temperatures = config.temperatures
    if config.top_k and "logprobs" in stored:
        k = config.top_k if top_k is None else top_k
        decode_rows = _decode_entries if config.ragged else _decode_head
        log_z, optional["logprobs"], mass = decode_rows(stored, config, k)
        if k == config.top_k:
            optional["tail_mass"] = mass
        if config.ragged:
            optional |= _first_entries(stored, k)
        elif "token_ids" in stored:
            optional["token_ids"] = stored["token_ids"][:, :k].astype(np.int32, order="C", copy=False)
    elif "log_z" in stored:
        log_z = stored["log_z"]
    else:  # without the head, no temperature can be worked out
        log_z, temperatures = np.empty((len(stored["gold_ids"]), 0), dtype=np.float32), ()
    if "tail_bands" in stored:
        bands = stored["tail_bands"].astype(np.float32, order="C")
        optional["tail_bands"] = bands.reshape(len(bands), len(config.band_temperatures), config.tail_bands)
    if "sample_ids" in stored:
        optional["sample_ids"] = stored["sample_ids"].astype(np.int64, order="C")
        optional["sample_counts"] = stored["sample_counts"].astype(np.int64, order="C")
    if "tail_ids" in stored and top_k in (None, config.top_k):  # the tail of fewer tokens is another one
        optional["tail_ids"] = stored["tail_ids"].astype(np.int32, copy=False)
        optional["tail_draws"] = stored[TAIL_DRAWS].astype(np.int64)
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


DECODED_ROWS = 2000
"""Rows of the head decoded at once: few enough for the processor's caches, and enough to make calls cheap."""


def _decode_head(
    stored: Mapping[str, np.ndarray], config: TargetConfig, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """`log_z [N, T]`, log-probabilities `[N, k]`, mass beyond all stored tokens `[N, T]` (None in format version 1); float32."""
    codec, one, version1 = CODECS[config.logprob_codec], config.temperatures.index(1.0), "log_z" in stored
    size, grid = len(stored["logprobs"]), len(config.temperatures)
    log_z, logprobs = np.empty((size, grid), dtype=np.float32), np.empty((size, k), dtype=np.float32)
    mass = None if version1 else np.empty_like(log_z)
    head = {name: stored[name] for name in ("logprobs", "logprob_span") if name in stored}
    for first in range(0, size, DECODED_ROWS):
        rows = slice(first, first + DECODED_ROWS)
        part = {name: values[rows] for name, values in head.items()}
        if mass is None:
            relative, log_z[rows] = codec.decode(part), stored["log_z"][rows]
        else:
            relative = codec.decode(part)
            sums = power_sums(codec, part, relative, config.temperatures)
            odds = np.exp(stored["tail_odds"][rows].astype(np.float32))
            whole = 1 + odds  # of the kept mass
            np.log(sums * whole, out=log_z[rows])
            with np.errstate(invalid="ignore"):  # odds of infinity, which the normaliser then shows
                np.divide(odds, whole, out=mass[rows])
        np.subtract(relative[:, :k], log_z[rows, one : one + 1], out=logprobs[rows])
    return log_z, logprobs, mass


def _decode_entries(
    stored: Mapping[str, np.ndarray], config: TargetConfig, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_decode_head`, of rows that differ in length: the log-probabilities are `[E]`."""
    codec, one = CODECS[config.logprob_codec], config.temperatures.index(1.0)
    kept = stored[KEPT]
    relative = codec.decode(stored)
    sums = power_sums(codec, stored, relative, config.temperatures, kept)
    odds = np.exp(stored["tail_odds"].astype(np.float32))
    whole = 1 + odds
    log_z = np.log(sums * whole)
    with np.errstate(invalid="ignore"):  # odds of infinity, which the normaliser then shows
        mass = odds / whole
    logprobs = relative - np.repeat(log_z[:, one], kept)
    return log_z, logprobs if k >= config.top_k else logprobs[columns_of_entries(kept) < k], mass


def _first_entries(stored: Mapping[str, np.ndarray], k: int) -> dict[str, np.ndarray]:
    """Lengths of rows, and the ids where they are stored, of the first `k` tokens of each row."""
    kept = stored[KEPT].astype(np.int64)
    taken = {"kept": np.minimum(kept, k)}
    if "token_ids" in stored:
        ids = stored["token_ids"].astype(np.int32, copy=False)
        taken["token_ids"] = ids if (kept <= k).all() else ids[columns_of_entries(kept) < k]
    return taken
