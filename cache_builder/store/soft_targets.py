"""`SoftTargets`: a teacher's predictions at N positions, as a reader hands them out.

Shapes: N positions (rows), K kept tokens, T temperatures of the grid, B rank bands, R draws. Where rows differ in length, the
kept tokens are E entries, one row after another, and `[N, K]` is `[E]`.
All log-probabilities are natural (nats). `log_z[:, t]` is the log-normaliser at temperature `T_t` relative to
the top logit: log Σ_v exp((z_v - max z) / T_t) >= 0. From it every temperature of the grid is exact:

    log p_T(v) = (z_v - z_top) / T - log_z_T        tail mass at T = 1 - Σ_kept p_T
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from kd.cache_builder.store.ragged import ENTRY_ARRAYS, entry_sums, offsets_of
from kd.common.errors import CacheError


@dataclass(frozen=True, repr=False)
class SoftTargets:
    """Decoded targets of N rows. Sorted by log-probability; ids unique; kept mass + tail mass = 1."""

    gold_ids: np.ndarray
    """[N] int64: the token that was actually there"""
    log_z: np.ndarray
    """[N, T] float32: log-normaliser at each temperature, see above"""
    temperatures: tuple[float, ...]
    """the grid, ascending, holds 1"""
    gold_logprob: np.ndarray
    """[N] float32 nats at temperature 1"""
    gold_rank: np.ndarray
    """[N] int64"""
    byte_end: np.ndarray
    """[N] int64: end of the gold token in the example's target text, UTF-8 bytes"""
    band_temperatures: tuple[float, ...] = ()
    """temperatures of `tail_bands`"""
    token_ids: np.ndarray | None = None
    """[N, K] int32 (or [E]), most probable first"""
    logprobs: np.ndarray | None = None
    """[N, K] float32 (or [E]) nats at temperature 1, descending"""
    kept: np.ndarray | None = None
    """[N] int64: tokens that each row keeps; None where all rows keep K"""
    tail_mass: np.ndarray | None = None
    """[N, T] float32 probability beyond the kept tokens, where it is stored; None = what the kept ones leave of 1"""
    tail_bands: np.ndarray | None = None
    """[N, band temperatures, B] float32 log-mass of rank bands beyond k"""
    sample_ids: np.ndarray | None = None
    """[N, R] int64"""
    sample_counts: np.ndarray | None = None
    """[N, R] int64, 0 in unused slots"""
    tail_ids: np.ndarray | None = None
    """[N, D] int32 tokens drawn from beyond the kept ones at temperature 1, each as often as it was drawn; 0 in unused slots"""
    tail_draws: np.ndarray | None = None
    """[N] int64: slots of `tail_ids` that are used; each stands for the tail's mass over this number"""
    boundary_logprob: np.ndarray | None = None
    """[N] float32"""

    def __len__(self) -> int:
        return len(self.gold_ids)

    def __repr__(self) -> str:
        arrays = [
            f"{name}={list(value.shape)} {value.dtype}"
            for name, value in ((f.name, getattr(self, f.name)) for f in fields(self))
            if isinstance(value, np.ndarray)
        ]
        return f"SoftTargets(rows={len(self)}, temperatures={self.temperatures}, {', '.join(arrays)})"

    def band_index(self, temperature: float) -> int:
        """Row of `tail_bands` for `temperature`; CacheError when its bands are not stored."""
        if temperature not in self.band_temperatures:
            raise CacheError(
                "this cache holds no rank bands at that temperature",
                found=f"temperature {temperature:g}",
                expected=f"one of {', '.join(f'{t:g}' for t in self.band_temperatures)}",
                try_="kd cache build --band-temperatures",
            )
        return self.band_temperatures.index(temperature)

    def grid_index(self, temperature: float) -> int:
        """Column of `log_z` for `temperature`; CacheError when it is off the stored grid."""
        if temperature not in self.temperatures:
            raise CacheError(
                "this cache does not hold that temperature",
                found=f"temperature {temperature:g}",
                expected=f"one of {', '.join(f'{t:g}' for t in self.temperatures)}",
                try_="--temperature from the grid, or build with --temperatures",
            )
        return self.temperatures.index(temperature)

    def logprobs_at(self, temperature: float) -> np.ndarray:
        """`[N, K]` (or `[E]`) float64 log-probabilities of the kept tokens at a temperature of the grid; exact."""
        if self.logprobs is None:
            raise CacheError("this cache holds no top-k log-probabilities", try_="kd cache info PATH shows its profile")
        if temperature == 1.0:
            return self.logprobs.astype(np.float64)
        top, log_z = (self.per_entry(self.log_z[:, self.grid_index(t)].astype(np.float64)) for t in (1.0, temperature))
        return np.asarray((self.logprobs.astype(np.float64) + top) / temperature - log_z)

    def tail_mass_at(self, temperature: float) -> np.ndarray:
        """`[N]` float64: probability beyond the kept tokens at a temperature of the grid."""
        if self.tail_mass is not None:
            return self.tail_mass[:, self.grid_index(temperature)].astype(np.float64)
        return np.asarray(np.maximum(0.0, 1.0 - self.row_sums(np.exp(self.logprobs_at(temperature)))))

    def per_entry(self, values: np.ndarray) -> np.ndarray:
        """`values [N]` for each kept token: `[N, 1]`, or `[E]` where rows differ in length."""
        return values[:, None] if self.kept is None else np.repeat(values, self.kept)

    def row_sums(self, values: np.ndarray) -> np.ndarray:
        """Sums `[N]` of one value for each kept token."""
        return np.asarray(values.sum(axis=1) if self.kept is None else entry_sums(values, self.kept))

    def padded(self, values: np.ndarray, filling: float | None = None) -> np.ndarray:
        """One value for each kept token as `[N, K]`, as many as the longest row; then `filling`, or its first value."""
        if self.kept is None:
            return values
        longest = int(self.kept.max(initial=1))
        inside = np.arange(longest) < self.kept[:, None]
        if filling is None:
            wide = np.repeat(values[self.most_probable][:, None], longest, axis=1)
        else:
            wide = np.full(inside.shape, filling, dtype=values.dtype)
        wide[inside] = values
        return wide

    @property
    def most_probable(self) -> np.ndarray:
        """Places `[N]` in the flattened `token_ids` and `logprobs` of each row's most probable token."""
        return self.offsets[:-1]

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where the kept tokens of each row begin in the flattened `token_ids` and `logprobs`, and how many there are `[N + 1]`."""
        if self.kept is not None:
            return offsets_of(self.kept)
        columns = next((values.shape[1] for values in (self.logprobs, self.token_ids) if values is not None), 0)
        return np.arange(len(self) + 1) * columns


def take_rows(targets: SoftTargets, rows: slice) -> SoftTargets:
    """A range of rows of every array."""
    entries = rows
    if targets.kept is not None:
        start, stop, _ = rows.indices(len(targets))
        entries = slice(targets.offsets[start], targets.offsets[max(start, stop)])
    taken: dict[str, Any] = {}
    for f in fields(targets):
        value = getattr(targets, f.name)
        if isinstance(value, np.ndarray):
            taken[f.name] = value[entries if f.name in ENTRY_ARRAYS else rows]
    return replace(targets, **taken)


def concatenate(parts: Sequence[SoftTargets]) -> SoftTargets:
    """Rows of several examples of one cache, one after another."""
    joined: dict[str, Any] = {}
    for f in fields(parts[0]):
        if isinstance(getattr(parts[0], f.name), np.ndarray):
            joined[f.name] = np.concatenate([getattr(p, f.name) for p in parts])
    return replace(parts[0], **joined)
