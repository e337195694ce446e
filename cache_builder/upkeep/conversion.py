"""Convert stored rows to other settings: fewer tokens, another codec, another profile. No teacher is needed.

For fewer tokens or another codec, the rows are decoded and encoded again: the mass of dropped tokens goes into the tail, at
every temperature. Rows of one length can become rows that differ in length, but not the other way. Rank bands of rows that differ
in length begin at the same ranks in the slice, and receive what is cut.
"""

from __future__ import annotations

import numpy as np

from kd.cache_builder.store.encoding import codecs
from kd.cache_builder.store.encoding.arrays import Arrays
from kd.cache_builder.store.encoding.logprob_codecs import CODECS, FLOAT16_MIN
from kd.cache_builder.store.encoding.rank_bands import with_cut_tokens
from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.ragged import KEPT, TAIL_DRAWS, columns_of_entries, entry_sums
from kd.cache_builder.store.row_figures import entropy_bounds
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.upkeep.redrawn_tails import StoredTail, redrawn


def converted(
    stored: Arrays, old: TargetConfig, new: TargetConfig, vocabulary_size: int, uniforms: np.ndarray | None = None
) -> Arrays:
    """Stored rows under the settings `new`, which keep no more than `old`. The same arrays come back where
    no row changes.

    uniforms   [N] in [0, 1), with which draws from a tail are drawn again where the tail has grown
    """
    if old.keeps_as(new) and ("log_z" in stored) == (not new.top_k):
        return stored
    rows = _converted(stored, old, new, vocabulary_size)
    if new.tail_samples:
        assert uniforms is not None
        rows |= _drawn_tails(stored, rows, old, new, uniforms)
    return rows


def _drawn_tails(stored: Arrays, rows: Arrays, old: TargetConfig, new: TargetConfig, uniforms: np.ndarray) -> Arrays:
    """The draws of the converted `rows`: as they were where the head kept its tokens, and drawn again where it did not."""
    targets = codecs.decode(stored, old)
    assert targets.token_ids is not None
    assert targets.tail_ids is not None
    assert targets.tail_draws is not None
    have = np.full(len(targets), old.top_k) if targets.kept is None else targets.kept
    want = rows[KEPT] if new.ragged else np.full(len(targets), new.top_k)
    cut = np.arange(int(have.max(initial=1))) >= want[:, None]
    if not cut.any() and old.tail_samples == new.tail_samples:
        return {"tail_ids": stored["tail_ids"], TAIL_DRAWS: stored[TAIL_DRAWS]}
    kept = np.where(cut, targets.padded(np.exp(targets.logprobs_at(1.0)), 0.0), 0.0)
    used = np.arange(targets.tail_ids.shape[1]) < targets.tail_draws[:, None]
    share = targets.tail_mass_at(1.0) / np.maximum(targets.tail_draws, 1)
    tail = StoredTail(
        np.concatenate([targets.padded(targets.token_ids, 0.0), targets.tail_ids], axis=1).astype(
            stored["tail_ids"].dtype
        ),
        np.concatenate([kept, np.where(used, share[:, None], 0.0)], axis=1),
    )
    ids, counts = redrawn(tail, new.tail_samples, uniforms)
    same = (want == have) & (old.tail_samples == new.tail_samples)
    ids[same], counts[same] = stored["tail_ids"][same, : ids.shape[1]], stored[TAIL_DRAWS][same]
    return {"tail_ids": ids, TAIL_DRAWS: counts}


def _converted(stored: Arrays, old: TargetConfig, new: TargetConfig, vocabulary_size: int) -> Arrays:
    """All but the draws from tails."""
    kept = {name: stored[name] for name in ("gold_ids", "gold_logprob", "gold_rank", "byte_end")}
    for name, wanted in (
        ("tail_bands", new.tail_bands),
        ("sample_ids", new.samples),
        ("sample_counts", new.samples),
        ("boundary_logprob", PROFILES[new.profile].boundary),
    ):
        if wanted:
            kept[name] = stored[name]
    if not new.top_k:
        return kept | {"log_z": codecs.decode(stored, old).log_z}
    if new.ragged:
        return kept | _shorter_rows(stored, old, new, vocabulary_size)
    if PROFILES[new.profile].ids:
        kept["token_ids"] = stored["token_ids"][:, : new.top_k]
    relative = CODECS[old.logprob_codec].decode(stored)
    codec = CODECS[new.logprob_codec]
    head = codec.encode(np.ascontiguousarray(relative[:, : new.top_k]))
    before, after = relative.astype(np.float64), codec.decode(head).astype(np.float64)
    odds = np.empty((len(before), len(new.temperatures)))
    for t, temperature in enumerate(new.temperatures):
        mass = np.exp(before / temperature)
        if "tail_odds" in stored:
            tail = np.exp(stored["tail_odds"][:, t].astype(np.float64)) * mass.sum(1)
        else:
            tail = np.maximum(np.exp(stored["log_z"][:, t].astype(np.float64)) - mass.sum(1), 0.0)
        tail += mass[:, new.top_k :].sum(1)
        with np.errstate(divide="ignore"):
            odds[:, t] = np.maximum(np.log(tail / np.exp(after / temperature).sum(1)), FLOAT16_MIN)
    return kept | head | {"tail_odds": odds.astype(codec.tail)}


def _shorter_rows(stored: Arrays, old: TargetConfig, new: TargetConfig, vocabulary_size: int) -> Arrays:
    """The head of rows that differ in length afterwards, and may have done so before."""
    have = stored[KEPT].astype(np.int64) if old.ragged else np.full(len(stored["gold_ids"]), old.top_k)
    targets = codecs.decode(stored, old)
    relative = CODECS[old.logprob_codec].decode(stored).reshape(-1)
    want = _wanted_lengths(targets, have, old, new, vocabulary_size)
    chosen = columns_of_entries(have) < np.repeat(want, have)
    codec = CODECS[new.logprob_codec]
    before = relative.astype(np.float64)
    head = stored["logprobs"].reshape(-1)[chosen]
    if new.logprob_codec != old.logprob_codec:
        head = codec.encode(relative[chosen][:, None])["logprobs"][:, 0]
    after = codec.decode({"logprobs": head}).astype(np.float64)
    odds = np.empty((len(have), len(new.temperatures)))
    for t, temperature in enumerate(new.temperatures):
        mass = np.exp(before / temperature)
        whole = entry_sums(mass, have)
        if "tail_odds" in stored:
            tail = np.exp(stored["tail_odds"][:, t].astype(np.float64)) * whole
        else:
            tail = np.maximum(np.exp(stored["log_z"][:, t].astype(np.float64)) - whole, 0.0)
        tail += entry_sums(np.where(chosen, 0.0, mass), have)
        with np.errstate(divide="ignore"):
            odds[:, t] = np.maximum(np.log(tail / entry_sums(np.exp(after / temperature), want)), FLOAT16_MIN)
    ids = stored["token_ids"].reshape(-1)[chosen]
    rows = {KEPT: want, "token_ids": ids, "logprobs": head, "tail_odds": odds.astype(codec.tail)}
    if new.tail_bands:
        rows["tail_bands"] = _wider_bands(stored["tail_bands"], targets, have, chosen, new, vocabulary_size)
    return rows


def _wanted_lengths(
    targets: SoftTargets, have: np.ndarray, old: TargetConfig, new: TargetConfig, vocabulary_size: int
) -> np.ndarray:
    """`[N]` tokens that rows which hold `have` of them keep in the slice.

    Thresholds that the cache has been built with are not applied again: decoded values lie on both sides of those of the teacher.
    Of the entropy only a bound is known. A row is certain where the most that it can be is below the bound.
    """
    want = have
    if (new.min_probability, new.min_k) != (old.min_probability, old.min_k):
        probable = np.exp(targets.logprobs_at(1.0)).reshape(-1) >= new.min_probability
        want = np.maximum(entry_sums(probable.astype(np.int64), have), np.minimum(new.min_k, have))
    if new.certain_below != old.certain_below:
        _, most = entropy_bounds(targets, vocabulary_size)
        want = np.where(most < new.certain_below, 1, want)
    return np.asarray(np.minimum(want, new.top_k))


def _wider_bands(
    bands: np.ndarray,
    targets: SoftTargets,
    have: np.ndarray,
    chosen: np.ndarray,
    new: TargetConfig,
    vocabulary_size: int,
) -> np.ndarray:
    """`[N, band temperatures * bands]` bands of rows that lose the tokens which are not `chosen [E]`."""
    rows, ranks = np.repeat(np.arange(len(have)), have)[~chosen], columns_of_entries(have)[~chosen]
    parts = np.split(bands, len(new.band_temperatures), axis=1)
    return np.concatenate(
        [
            with_cut_tokens(
                part, new.edges(vocabulary_size), rows, ranks, targets.logprobs_at(temperature).reshape(-1)[~chosen]
            )
            for part, temperature in zip(parts, new.band_temperatures, strict=True)
        ],
        axis=1,
    )


def measured(stored: Arrays, config: TargetConfig) -> dict[str, float]:
    """The quality figures that follow from stored rows: all but `head_kl`, the error against the teacher."""
    targets = codecs.decode(stored, config)
    quality = {
        "rows": float(len(targets)),
        "gold_nll": float(-targets.gold_logprob.astype(np.float64).sum()),
        "top1": float((targets.gold_rank == 0).sum()),
    }
    if config.top_k:
        quality["mass_kept"] = float(np.exp(targets.logprobs_at(1.0)).sum())
    if targets.kept is not None:
        quality |= codecs.lengths_measured(targets.kept, config)
    if targets.tail_draws is not None:
        quality["tail_draws"] = float(targets.tail_draws.sum())
    return quality
