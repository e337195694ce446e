"""`SoftTargets`: what a teacher said about N positions, and the settings that decide how much of it is kept.

Shapes: N positions (rows), K kept tokens, T temperatures of the grid, B rank bands, R draws.
All log-probabilities are natural (nats). `log_z[:, t]` is the log-normaliser at temperature `T_t` relative to
the top logit: log Σ_v exp((z_v - max z) / T_t) >= 0. From it every temperature of the grid is exact:

    log p_T(v) = (z_v - z_top) / T - log_z_T        tail mass at T = 1 - Σ_kept p_T
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np

from kd.cache_builder.store.logprob_codecs import CODECS
from kd.common.errors import CacheError, DataError, unknown_name


@dataclass(frozen=True)
class Profile:
    """Which parts of the teacher's distribution a cache keeps."""

    top_k: int
    """Most probable tokens kept per row; 0 = none."""
    ids: bool
    """Are their ids kept? (KL needs them, ULD does not.)"""
    samples: int
    """Seeded draws from p at temperature 1."""
    tail_bands: int
    """Log-spaced rank bands beyond k whose mass is kept."""
    boundary: bool
    """Keep log P(next token starts a word or ends the text)?"""
    logprob_codec: str = "graded"
    """ULD's gradient is a sign, which a coarse scale turns around where the two curves are close (benchmarks/uld.py)."""


PROFILES: dict[str, Profile] = {
    "kl": Profile(top_k=64, ids=True, samples=0, tail_bands=0, boundary=False),
    "compact": Profile(top_k=64, ids=True, samples=0, tail_bands=0, boundary=False, logprob_codec="graded-coarse"),
    "uld": Profile(top_k=16, ids=False, samples=0, tail_bands=16, boundary=False, logprob_codec="graded-fine"),
    "sampled": Profile(top_k=0, ids=True, samples=12, tail_bands=0, boundary=False),
    "full": Profile(top_k=64, ids=True, samples=12, tail_bands=16, boundary=True, logprob_codec="graded-fine"),
}


@dataclass(frozen=True)
class TargetConfig:
    """What is kept of each row; part of a cache's identity."""

    profile: str = "kl"
    """One of PROFILES."""
    top_k: int = 64
    samples: int = 0
    tail_bands: int = 0
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Temperatures whose normaliser is stored; holds 1, ascending."""
    band_temperatures: tuple[float, ...] = (1.0,)
    """Temperatures whose rank bands are stored."""
    logprob_codec: str = "graded"
    """One of `logprob_codecs.CODECS`."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise unknown_name("profile", self.profile, PROFILES)
        if self.logprob_codec not in CODECS:
            raise unknown_name("logprob codec", self.logprob_codec, CODECS)
        kept = PROFILES[self.profile]
        if kept.top_k and self.top_k < 1:
            raise DataError("top-k is too small", found=self.top_k, expected=f"at least 1 for profile {self.profile}")
        if self.profile == "sampled" and self.samples < 1:
            raise DataError("the sampled profile needs draws", found=self.samples, expected="--samples of at least 1")
        for name, value, most in (
            ("samples", self.samples, 2**16 - 1),
            ("tail-bands", self.tail_bands, 2**10),
            ("seed", self.seed, 2**63),
        ):
            if not 0 <= value <= most:  # draws are counted in at most 16 bits; Philox takes unsigned keys
                raise DataError(f"{name} is out of bounds", found=value, expected=f"0..{most}")
        grid = self.temperatures
        if 1.0 not in grid or list(grid) != sorted(set(grid)) or not all(math.isfinite(t) and t > 0 for t in grid):
            raise DataError(
                "the temperature grid is not usable",
                found=",".join(map(str, grid)),
                expected="ascending positive numbers that include 1",
                try_="--temperatures 1,2,4",
            )
        if not set(self.band_temperatures) <= set(grid):
            raise DataError(
                "bands are asked for at a temperature off the grid",
                found=self.band_temperatures,
                expected=f"some of {grid}",
            )

    @classmethod
    def of_profile(
        cls,
        profile: str,
        *,
        top_k: int | None = None,
        samples: int | None = None,
        tail_bands: int | None = None,
        logprob_codec: str | None = None,
        **rest: object,
    ) -> TargetConfig:
        """The profile's own numbers, except where given."""
        if profile not in PROFILES:
            raise unknown_name("profile", profile, PROFILES)
        kept = PROFILES[profile]
        if not kept.top_k and top_k is not None:
            raise DataError(
                f"the {profile} profile keeps no top-k",
                found=f"--top-k {top_k}",
                try_="--samples R, or --profile kl|full",
            )
        return cls(
            profile=profile,
            top_k=kept.top_k if top_k is None else top_k,
            samples=kept.samples if samples is None else samples,
            tail_bands=kept.tail_bands if tail_bands is None else tail_bands,
            logprob_codec=logprob_codec or kept.logprob_codec,
            **rest,  # type: ignore[arg-type]
        )

    def normalised(self) -> TargetConfig:
        """The same with every setting that changes no stored value at its default."""
        return replace(
            self,
            seed=self.seed if self.samples else 0,
            band_temperatures=self.band_temperatures if self.tail_bands else (1.0,),
            logprob_codec=self.logprob_codec if self.top_k else PROFILES[self.profile].logprob_codec,
        )

    def check_vocabulary(self, size: int) -> None:
        """Refuse a k larger than the vocabulary (`size` ids)."""
        if self.top_k > size:
            raise DataError(
                "top-k is larger than the vocabulary",
                found=f"--top-k {self.top_k}",
                expected=f"at most {size}",
                try_=f"--top-k {min(64, size)}",
            )


def band_edges(top_k: int, vocabulary_size: int, bands: int) -> list[int]:
    """`bands + 1` ascending ranks from k to V, evenly spaced in log rank; band b holds ranks [e_b, e_{b+1}).

    Where ranks run out (few beyond k) bands at the end are empty: equal edges.
    """
    first = max(top_k, 1)
    raw = np.geomspace(first, max(vocabulary_size, first + 1), bands + 1)
    edges = [top_k]
    for b in range(1, bands):
        edges.append(min(max(round(float(raw[b])), edges[-1] + 1), vocabulary_size))
    return [*edges, vocabulary_size]


@dataclass
class RawTargets:
    """What the teacher pass hands to the encoder for n rows, before quantisation (arrays or None)."""

    gold_ids: np.ndarray
    """[n] int64"""
    log_z: np.ndarray
    """[n, T] float32"""
    gold_logprob: np.ndarray
    """[n] float32, at temperature 1"""
    gold_rank: np.ndarray
    """[n] int64, 0 = the gold token is the most probable"""
    byte_end: np.ndarray
    """[n] int64"""
    token_ids: np.ndarray | None = None
    """[n, K] int32, most probable first"""
    relative: np.ndarray | None = None
    """[n, K] float32 logits minus the top logit, descending, first 0"""
    tail_bands: np.ndarray | None = None
    """[n, bands * band temperatures] float32 log-mass"""
    sample_ids: np.ndarray | None = None
    """[n, R] int64 unique drawn ids, most drawn first; unused slots 0"""
    sample_counts: np.ndarray | None = None
    """[n, R] int64; unused slots 0; rows sum to R"""
    boundary_logprob: np.ndarray | None = None
    """[n] float32"""


@dataclass(frozen=True)
class SoftTargets:
    """Decoded targets of N rows. Sorted by log-probability; ids unique; kept mass + tail mass = 1."""

    gold_ids: np.ndarray
    """[N] int64: the token that was actually there"""
    log_z: np.ndarray
    """[N, T] float32, see the module's head"""
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
    token_ids: np.ndarray | None = field(default=None)
    """[N, K] int32, most probable first"""
    logprobs: np.ndarray | None = field(default=None)
    """[N, K] float32 nats at temperature 1, descending"""
    tail_mass: np.ndarray | None = field(default=None)
    """[N, T] float32 probability beyond the kept tokens, where it is stored; None = what the kept ones leave of 1"""
    tail_bands: np.ndarray | None = field(default=None)
    """[N, band temperatures, B] float32 log-mass of rank bands beyond k"""
    sample_ids: np.ndarray | None = field(default=None)
    """[N, R] int64"""
    sample_counts: np.ndarray | None = field(default=None)
    """[N, R] int64, 0 in unused slots"""
    boundary_logprob: np.ndarray | None = field(default=None)
    """[N] float32"""

    def __len__(self) -> int:
        return len(self.gold_ids)

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
