"""Which parts of a teacher's distribution a cache keeps: the settings that are part of its identity.

`RawTargets` are the rows that the teacher pass hands to the encoder; a reader hands out `soft_targets.SoftTargets`.
All log-probabilities are natural (nats).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np

from kd.cache_builder.store.profiles import CODEC_NAMES, ID_CODECS, PROFILES
from kd.common.errors import DataError, unknown_name

Rows = TypeVar("Rows")
"""Arrays of numpy, or tensors of torch."""


@dataclass(frozen=True)
class TargetConfig:
    """What is kept of each row. It is part of a cache's identity."""

    profile: str = "kl"
    """Name of the profile, one of `PROFILES`: which parts of the distribution are kept."""
    top_k: int = 64
    """Most probable tokens kept per row; 0 for a profile that keeps none."""
    samples: int = 0
    """Tokens drawn per row at temperature 1; 0 for a profile that keeps none."""
    tail_bands: int = 0
    """Bands of ranks beyond the top-k whose mass is kept; 0 for a profile that keeps none."""
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0)
    """Temperatures whose normaliser is stored, ascending; 1 must be among them."""
    band_temperatures: tuple[float, ...] = (1.0,)
    """Temperatures whose rank bands are stored; each must be among `temperatures`."""
    logprob_codec: str = "graded"
    """How log-probabilities are stored, one of `logprob_codecs.CODECS`."""
    seed: int = 0
    """Seed of the drawn tokens."""
    min_probability: float = 0.0
    """Least probability, at temperature 1, of a kept token; 0 where every row keeps `top_k` tokens. With one, a row keeps the
    tokens that have it, at least `min_k` and at most `top_k`."""
    min_k: int = 1
    """Tokens that every row keeps, however improbable; 1 where all rows keep `top_k`."""
    certain_below: float = 0.0
    """Entropy in nats, at temperature 1, below which a row is certain and keeps its most probable token alone; 0 where no row is
    treated so. With a `min_k` of 2 or more, the rows of one token are the certain ones."""
    tail_samples: int = 0
    """Draws from what lies beyond the kept tokens, at temperature 1: a row whose tail has the mass m draws `tail_samples` times m
    tokens, rounded up, so each stands for at most 1 / `tail_samples`; 0 for none."""
    id_codec: str = "frequency"
    """How the ids of the kept tokens are stored, one of `ID_CODECS`."""

    def __post_init__(self) -> None:
        if self.profile not in PROFILES:
            raise unknown_name("profile", self.profile, PROFILES)
        if self.logprob_codec not in CODEC_NAMES:
            raise unknown_name("logprob codec", self.logprob_codec, CODEC_NAMES)
        if self.id_codec not in ID_CODECS:
            raise unknown_name("id codec", self.id_codec, ID_CODECS)
        kept = PROFILES[self.profile]
        if self.id_codec != "frequency" and not (kept.ids and self.top_k):
            raise DataError(
                "this profile keeps no most probable tokens whose ids could be stored in fewer bytes",
                found=f"--profile {self.profile} --id-codec {self.id_codec}",
                try_="--profile kl, compact, adaptive or full; or --id-codec left out",
            )
        if kept.top_k and self.top_k < 1:
            raise DataError("top-k is too small", found=self.top_k, expected=f"at least 1 for profile {self.profile}")
        if self.profile == "sampled" and self.samples < 1:
            raise DataError("the sampled profile needs draws", found=self.samples, expected="--samples of at least 1")
        for name, value, most in (
            ("samples", self.samples, 2**16 - 1),
            ("tail-bands", self.tail_bands, 2**10),
            ("tail-samples", self.tail_samples, 2**10),
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
        self._check_lengths()
        self._check_tail_samples()
        if not set(self.band_temperatures) <= set(grid):
            raise DataError(
                "rank bands can only be stored at temperatures of the grid",
                found=self.band_temperatures,
                expected=f"some of {grid}",
            )

    def _check_lengths(self) -> None:
        """Raise DataError where the settings of rows that differ in length contradict the others."""
        if not 0.0 <= self.min_probability < 1.0:
            raise DataError(
                "the least probability of a kept token is not usable",
                found=f"--min-probability {self.min_probability:g}",
                expected="from 0 to below 1",
                try_="--min-probability 0.002",
            )
        if self.ragged != bool(PROFILES[self.profile].min_probability):
            raise DataError(
                "a least probability belongs to the profile adaptive",
                found=f"--profile {self.profile} --min-probability {self.min_probability:g}",
                try_="--profile adaptive, with a probability above 0",
            )
        self._check_certainty()
        if not self.ragged and self.min_k != 1:
            raise DataError(
                "a least number of kept tokens belongs to the profile adaptive",
                found=f"--profile {self.profile} --min-k {self.min_k}",
                try_="--profile adaptive, or --min-k left out",
            )
        if not 1 <= self.min_k <= max(self.top_k, 1):
            raise DataError(
                "the least number of kept tokens is not usable",
                found=f"--min-k {self.min_k}",
                expected=f"1..{self.top_k}",
            )
        if self.ragged and self.logprob_codec == "linear8":
            raise DataError(
                "linear8 needs rows of one length", found="--profile adaptive --logprob-codec linear8", try_="graded"
            )

    def _check_certainty(self) -> None:
        """Raise DataError where rows that keep one token because they are certain contradict the other settings."""
        if not 0.0 <= self.certain_below < math.inf:
            raise DataError(
                "the entropy of a certain row is not usable",
                found=f"--certain-below {self.certain_below:g}",
                expected="nats, from 0",
                try_="--certain-below 0.1",
            )
        if self.certain_below and not self.ragged:
            raise DataError(
                "rows of one token belong to the profile adaptive",
                found=f"--profile {self.profile} --certain-below {self.certain_below:g}",
                try_="--profile adaptive; with --min-k and --top-k of one number, all other rows keep so many tokens",
            )

    def _check_tail_samples(self) -> None:
        """Raise DataError where there is no head with ids beside which a tail could be drawn, or where the whole row is drawn."""
        if not self.tail_samples:
            return
        kept = PROFILES[self.profile]
        if not (kept.ids and self.top_k):
            raise DataError(
                "draws from the tail need kept tokens with their ids",
                found=f"--profile {self.profile} --tail-samples {self.tail_samples}",
                expected="profile kl, compact, adaptive or full",
            )
        if self.samples:
            raise DataError(
                "a cache draws from whole rows or from their tails",
                found=f"--samples {self.samples} --tail-samples {self.tail_samples}",
                try_="--samples 0, or leave --tail-samples out",
            )

    @property
    def uniforms(self) -> int:
        """Random numbers that each row is drawn with: one for every draw from a whole row, and one for all draws of a tail."""
        return self.samples or min(self.tail_samples, 1)

    @property
    def ragged(self) -> bool:
        """Whether rows differ in length."""
        return self.min_probability > 0.0

    @property
    def shortest(self) -> int:
        """Tokens that the shortest possible row keeps: the rank at which rank bands begin."""
        if not self.ragged:
            return self.top_k
        return 1 if self.certain_below else self.min_k

    def edges(self, vocabulary_size: int) -> list[int]:
        """Ranks between the rank bands, see `band_edges`; the same for all rows. Empty where there are no bands."""
        return band_edges(self.shortest, vocabulary_size, self.tail_bands) if self.tail_bands else []

    @property
    def identity(self) -> dict[str, Any]:
        """These settings as a cache's identity holds them: those that came with version 3 are named where they count."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        if not self.ragged:
            del values["min_probability"], values["min_k"]
        if not self.certain_below:
            del values["certain_below"]
        if not self.tail_samples:
            del values["tail_samples"]
        if self.id_codec == "frequency":
            del values["id_codec"]
        return values

    def keeps_as(self, other: TargetConfig) -> bool:
        """Whether every row holds the same values under both settings, which may store ids in different ways."""
        return replace(self, id_codec="frequency") == replace(other, id_codec="frequency")

    def lengths(self, probabilities: Rows, entropy: Rows | None = None) -> Rows:
        """`[N]` how many tokens each row keeps, from the `[N, K]` probabilities of the most probable ones, descending.

        entropy   `[N]` of each row in nats, or no less than it; only certain rows need it

        Nothing waits for rows that are on a GPU.
        """
        values: Any = probabilities
        probable: Any = (values >= self.min_probability).sum(1)  # all of them, where all rows keep K
        kept: Any = probable.clip(min=min(self.min_k, values.shape[1]))
        if self.certain_below:
            assert entropy is not None
            nats: Any = entropy
            kept = kept - (kept - 1) * (nats < self.certain_below)
        lengths: Rows = kept
        return lengths

    @classmethod
    def of_profile(
        cls,
        profile: str,
        *,
        top_k: int | None = None,
        samples: int | None = None,
        tail_bands: int | None = None,
        logprob_codec: str | None = None,
        min_probability: float | None = None,
        min_k: int | None = None,
        certain_below: float | None = None,
        tail_samples: int | None = None,
        id_codec: str | None = None,
        **rest: object,
    ) -> TargetConfig:
        """The settings of a profile, with the values given in place of its own. Raises DataError."""
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
            min_probability=kept.min_probability if min_probability is None else min_probability,
            min_k=(2 if certain_below and top_k != 1 else 1) if min_k is None else min_k,
            certain_below=certain_below or 0.0,
            tail_samples=tail_samples or 0,
            id_codec=id_codec or "frequency",
            **rest,  # type: ignore[arg-type]
        )

    def normalised(self) -> TargetConfig:
        """These settings, with each one that changes no stored value set to its default."""
        return replace(
            self,
            seed=self.seed if self.uniforms else 0,
            band_temperatures=self.band_temperatures if self.tail_bands else (1.0,),
            logprob_codec=self.logprob_codec if self.top_k else PROFILES[self.profile].logprob_codec,
        )

    def check_vocabulary(self, size: int) -> None:
        """Raise DataError where the top-k is larger than the vocabulary (`size` ids)."""
        if self.top_k > size:
            raise DataError(
                "top-k is larger than the vocabulary",
                found=f"--top-k {self.top_k}",
                expected=f"at most {size}",
                try_=f"--top-k {min(64, size)}",
            )


def band_edges(top_k: int, vocabulary_size: int, bands: int) -> list[int]:
    """`bands + 1` ascending ranks from k to V, evenly spaced in log rank; band b holds ranks [e_b, e_{b+1}).

    Where there are fewer ranks beyond k than bands, the last bands are empty: their edges are equal.
    """
    first = max(top_k, 1)
    raw = np.geomspace(first, max(vocabulary_size, first + 1), bands + 1)
    edges = [top_k]
    for b in range(1, bands):
        edges.append(min(max(round(float(raw[b])), edges[-1] + 1), vocabulary_size))
    return [*edges, vocabulary_size]


@dataclass
class RawTargets:
    """n rows as the teacher pass hands them to the encoder, before quantisation. Parts that are not kept are None."""

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
    """[n, bands * band temperatures] float32 log-mass; of ranks beyond the K tokens here alone, where rows differ in length"""
    entropy: np.ndarray | None = None
    """[n] float32 nats at temperature 1, or no less than that; needed where certain rows keep one token"""
    sample_ids: np.ndarray | None = None
    """[n, R] int64 unique drawn ids, most drawn first; unused slots 0"""
    sample_counts: np.ndarray | None = None
    """[n, R] int64; unused slots 0; rows sum to R"""
    kept: np.ndarray | None = None
    """[n] int64 tokens that each row keeps, where its tail was drawn beside them; None: as `TargetConfig.lengths` says"""
    tail_ids: np.ndarray | None = None
    """[n, D] int32 tokens drawn from the tail, each as often as it was drawn; unused slots 0"""
    tail_draws: np.ndarray | None = None
    """[n] int64 slots that are used"""
    boundary_logprob: np.ndarray | None = None
    """[n] float32"""
