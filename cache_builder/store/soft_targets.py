"""`SoftTargets`: a teacher's predictions at N positions, as a reader hands them out.

Shapes: N positions (rows), K kept tokens, T temperatures of the grid, B rank bands, R draws.
All log-probabilities are natural (nats). `log_z[:, t]` is the log-normaliser at temperature `T_t` relative to
the top logit: log Σ_v exp((z_v - max z) / T_t) >= 0. From it every temperature of the grid is exact:

    log p_T(v) = (z_v - z_top) / T - log_z_T        tail mass at T = 1 - Σ_kept p_T
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np

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
    """[N, K] int32, most probable first"""
    logprobs: np.ndarray | None = None
    """[N, K] float32 nats at temperature 1, descending"""
    tail_mass: np.ndarray | None = None
    """[N, T] float32 probability beyond the kept tokens, where it is stored; None = what the kept ones leave of 1"""
    tail_bands: np.ndarray | None = None
    """[N, band temperatures, B] float32 log-mass of rank bands beyond k"""
    sample_ids: np.ndarray | None = None
    """[N, R] int64"""
    sample_counts: np.ndarray | None = None
    """[N, R] int64, 0 in unused slots"""
    boundary_logprob: np.ndarray | None = None
    """[N] float32"""

    def __len__(self) -> int:
        return len(self.gold_ids)

    def __repr__(self) -> str:
        arrays = [
            f"{name}={list(value.shape)} {value.dtype}"
            for name, value in vars(self).items()
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
        """`[N, K]` float64 log-probabilities of the kept tokens at a temperature of the grid; exact, not re-estimated."""
        if self.logprobs is None:
            raise CacheError("this cache holds no top-k log-probabilities", try_="kd cache info PATH shows its profile")
        if temperature == 1.0:
            return self.logprobs.astype(np.float64)
        top = self.log_z[:, [self.grid_index(1.0)]].astype(np.float64)
        relative = self.logprobs.astype(np.float64) + top
        return np.asarray(relative / temperature - self.log_z[:, [self.grid_index(temperature)]].astype(np.float64))

    def tail_mass_at(self, temperature: float) -> np.ndarray:
        """`[N]` float64: probability beyond the kept tokens at a temperature of the grid."""
        if self.tail_mass is not None:
            return self.tail_mass[:, self.grid_index(temperature)].astype(np.float64)
        return np.asarray(np.maximum(0.0, 1.0 - np.exp(self.logprobs_at(temperature)).sum(axis=1)))


def take_rows(targets: SoftTargets, rows: slice) -> SoftTargets:
    """A range of rows of every array."""
    taken: dict[str, Any] = {n: v[rows] if isinstance(v, np.ndarray) else v for n, v in vars(targets).items()}
    return SoftTargets(**taken)


def concatenate(parts: Sequence[SoftTargets]) -> SoftTargets:
    """Rows of several examples of one cache, one after another."""
    joined: dict[str, Any] = {}
    for f in fields(parts[0]):
        if isinstance(getattr(parts[0], f.name), np.ndarray):
            joined[f.name] = np.concatenate([getattr(p, f.name) for p in parts])
    return replace(parts[0], **joined)
