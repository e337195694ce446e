"""What the identity of a cache says of a teacher that gave less than its logits, or whose weights nobody here has read.

    identity["teacher"]["given"]     "log-probabilities": the k largest at temperature 1, and no logits
    identity["teacher"]["weights"]   "unknown": the weights could not be digested
    identity["teacher"]["gold"]      "top-k": of a token of the text that is not among the kept ones, only a bound is known
    identity["teacher"]["tail"]      "unknown": the kept probabilities are those of a row without its tail, and sum to 1
    identity["teacher"]["imported"]  the format and the digests of the files that others have made the rows in

A served teacher gives log-probabilities of its k most probable tokens. What they leave of 1 is the exact mass of the tail at
temperature 1. At any other temperature the normaliser is a sum over all logits, which such a teacher does not give, so the
cache holds temperature 1 alone. It holds neither rank bands, nor draws, nor boundaries. Caches of other teachers lack these
entries, so their fingerprints are what they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.targets import TargetConfig
from kd.common.errors import DataError

GIVEN, LOGPROBS = "given", "log-probabilities"
WEIGHTS, UNKNOWN = "weights", "unknown"
GOLD, TOP_K = "gold", "top-k"
TAIL, IMPORTED = "tail", "imported"
WHY_ONE = "the teacher gave log-probabilities at temperature 1; another temperature needs all of its logits"
"""The reason for which such a cache serves no other temperature."""


def logprobs_only(teacher: Mapping[str, Any]) -> bool:
    """Whether the teacher gave log-probabilities at temperature 1 and no logits; `teacher`: that part of an identity."""
    return teacher.get(GIVEN) == LOGPROBS


def weights_unknown(teacher: Mapping[str, Any]) -> bool:
    """Whether the weights could not be digested, so that the fingerprint does not cover them."""
    return teacher.get(WEIGHTS) == UNKNOWN


def gold_in_top_k(teacher: Mapping[str, Any]) -> bool:
    """Whether the log-probability of a token of the text is known only where it is among the kept ones."""
    return teacher.get(GOLD) == TOP_K


def tail_unknown(teacher: Mapping[str, Any]) -> bool:
    """Whether nobody knows what lies beyond the kept tokens."""
    return teacher.get(TAIL) == UNKNOWN


def refuse_beyond_logprobs(config: TargetConfig, where: object) -> None:
    """Raise DataError for targets that do not follow from the top-k log-probabilities at temperature 1."""
    beyond_logprobs = {
        "--temperatures " + ",".join(f"{t:g}" for t in config.temperatures): config.temperatures != (1.0,),
        f"--tail-bands {config.tail_bands}": config.tail_bands > 0,
        f"--samples {config.samples}": config.samples > 0,
        f"--tail-samples {config.tail_samples}": config.tail_samples > 0,
        f"--profile {config.profile}": PROFILES[config.profile].boundary or not config.top_k,
    }
    if any(beyond_logprobs.values()):
        raise DataError(
            "the teacher gives log-probabilities at temperature 1, and no logits",
            where=where,
            found=", ".join(option for option, beyond in beyond_logprobs.items() if beyond),
            expected="profile kl, compact, adaptive, or uld with --tail-bands 0; temperature 1",
            try_="leave these options out; or a teacher that is loaded here, which gives its logits",
        )
