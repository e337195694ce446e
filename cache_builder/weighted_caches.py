"""Which caches are read, and in which proportion: the value of `--cache`.

    parse_caches("runs/cache")               one cache
    parse_caches("runs/a=0.7,runs/b=0.3")    a mixture

This module imports nothing heavy: the command line needs it to print its help.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from kd.common.errors import DataError
from kd.common.paths import as_path

MIXED = "--cache runs/a=0.7 --cache runs/b=0.3"
"""How a mixture is spelled on the command line, for errors."""
NAMES_OF_CACHES = "a path, a URL, the beginning of a fingerprint, or a mapping of several to their weights"


@dataclass(frozen=True)
class WeightedCache:
    """One cache of a mixture, or the only one."""

    location: str
    """Path, URL, or the beginning of a fingerprint."""
    weight: float | None = None
    """Weight among the caches of a mixture, relative to the others; None for a cache that is read alone."""

    def __str__(self) -> str:
        return self.location if self.weight is None else f"{self.location}={str(self.weight).removesuffix('.0')}"


CacheSpec: TypeAlias = str | os.PathLike[str] | Mapping[str, float] | Sequence[WeightedCache | tuple[str, float]]
"""What names a cache or a mixture: the text of `parse_caches`, a path, weights by place (mapping or pairs), or the parsed value."""


def parse_caches(text: str) -> tuple[WeightedCache, ...]:
    """`A=0.7,B=0.3` as a mixture, any other text as one cache. Raises DataError."""
    if not text.strip():
        raise DataError("no cache was given", found=repr(text), expected=NAMES_OF_CACHES)
    if os.path.exists(as_path(text)):
        return (WeightedCache(text),)
    if re.search(r"=[^,/]*(,|$)", text):
        return tuple(_weighted(item) for item in text.split(","))
    several = text.split(",")
    if len(several) > 1 and all("://" in one or os.path.exists(as_path(one)) for one in several):
        require_weights([WeightedCache(one) for one in several])
    return (WeightedCache(text),)


def _weighted(item: str) -> WeightedCache:
    location, _, weight = item.rpartition("=")
    try:
        number = float(weight)
    except ValueError:
        number = 0.0
    if not location or not 0 < number < float("inf"):
        raise DataError(
            "not a mixture of caches", found=item, expected="PATH=WEIGHT with a positive weight", try_=MIXED
        )
    return WeightedCache(location, number)


def require_weights(caches: Sequence[WeightedCache]) -> None:
    """Raise DataError for several caches of which one has no weight, or for none."""
    if not caches:
        raise DataError("no cache was given", expected="--cache PATH")
    if len(caches) > 1 and any(one.weight is None for one in caches):
        raise DataError(
            "several caches are mixed by weights",
            found=",".join(map(str, caches)),
            expected="PATH=WEIGHT of each",
            try_=MIXED,
        )


def as_caches(spec: CacheSpec) -> tuple[WeightedCache, ...]:
    """The caches that `spec` names. Raises DataError."""
    if isinstance(spec, str | os.PathLike):
        caches = parse_caches(os.fspath(spec))
    elif isinstance(spec, Mapping):
        caches = tuple(_weighted(f"{location}={weight}") for location, weight in spec.items())
    elif isinstance(spec, list | tuple):
        caches = tuple(_as_cache(one) for one in spec)
    else:
        raise DataError("this names no cache", found=type(spec).__name__, expected=NAMES_OF_CACHES)
    require_weights(caches)
    return caches


def _as_cache(one: Any) -> WeightedCache:
    if isinstance(one, WeightedCache):
        return one
    if isinstance(one, str | os.PathLike):
        return WeightedCache(os.fspath(one))
    if isinstance(one, list | tuple) and len(one) == 2:
        return _weighted(f"{one[0]}={one[1]}")
    raise DataError("this names no cache", found=repr(one)[:80], expected=NAMES_OF_CACHES)


def shares_of(caches: Sequence[WeightedCache]) -> list[float]:
    """Each cache's share of the mixture; the shares sum to 1."""
    weights = [1.0 if one.weight is None else one.weight for one in caches]
    return [weight / sum(weights) for weight in weights]
