"""Profiles: named choices of what a cache keeps of each row. This module imports nothing heavy: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass

CODEC_NAMES = ("graded", "graded-fine", "graded-coarse", "linear8", "float16", "float32")
"""Names of the codecs of log-probabilities, the keys of `encoding.logprob_codecs.CODECS`."""

ID_CODECS = ("frequency", "followers")
"""How the ids of kept tokens are stored: as codes by frequency, or as places in lists of what follows (`store.followers`)."""


@dataclass(frozen=True)
class Profile:
    """A named choice of what to keep of each row."""

    top_k: int
    """Most probable tokens kept per row; 0 means none."""
    ids: bool
    """True if the ids of these tokens are kept: KL needs them, ULD does not."""
    samples: int
    """Tokens drawn from the distribution at temperature 1 with a seed, per row."""
    tail_bands: int
    """Log-spaced bands of ranks beyond the top-k whose mass is kept."""
    boundary: bool
    """True if log P(next token starts a word or ends the text) is kept."""
    logprob_codec: str = "graded"
    """One of `logprob_codecs.CODECS`. ULD needs a fine one: its gradient is a sign, and rounding can flip the sign where the
    student is close to the teacher (benchmarks/uld.py)."""
    min_probability: float = 0.0
    """Least probability of a kept token; 0 means that every row keeps `top_k` tokens. With one, rows differ in length."""


PROFILES: dict[str, Profile] = {
    "kl": Profile(top_k=64, ids=True, samples=0, tail_bands=0, boundary=False),
    "compact": Profile(top_k=64, ids=True, samples=0, tail_bands=0, boundary=False, logprob_codec="graded-coarse"),
    "adaptive": Profile(top_k=128, ids=True, samples=0, tail_bands=0, boundary=False, min_probability=0.002),
    "uld": Profile(top_k=16, ids=False, samples=0, tail_bands=16, boundary=False, logprob_codec="graded-fine"),
    "sampled": Profile(top_k=0, ids=True, samples=12, tail_bands=0, boundary=False),
    "full": Profile(top_k=64, ids=True, samples=12, tail_bands=16, boundary=True, logprob_codec="graded-fine"),
}
