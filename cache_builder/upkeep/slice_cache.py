"""Slice a cache: fewer tokens per row, another profile or codec, or some of the examples. No teacher is needed.

    for step in slice_cache(path, out, top_k=16, examples=(0, 1000)): ...

The fingerprint of a slice names the cache it was cut from.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TypedDict, Unpack

from kd.cache_builder.store.cache_files import CacheFiles
from kd.cache_builder.store.profiles import PROFILES, Profile
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.upkeep.derived_cache import DerivedCache, Piece, write_derived
from kd.common.errors import DataError
from kd.common.progress import Progress


class SliceOptions(TypedDict, total=False):
    """What a slice keeps. An option that is left out, or None, keeps what the cache has."""

    profile: str | None
    """Keep only what this profile keeps."""
    top_k: int | None
    """Tokens per row."""
    logprob_codec: str | None
    """One of `CODECS`; None takes that of a new profile."""
    min_probability: float | None
    """See `TargetConfig`, for the profile adaptive; None takes that of a new profile."""
    min_k: int | None
    """The same."""
    examples: tuple[int, int] | None
    """First example and one past the last."""


def slice_cache(
    cache: Path | CacheFiles, out: Path, **options: Unpack[SliceOptions]
) -> Generator[Progress[Path], None, None]:
    """Write a smaller cache to `out`; the same call continues where an earlier one stopped.

    Raises as `planned_slice` does, and CacheMismatchError where `out` holds another cache.
    """
    yield from write_derived(planned_slice(cache, **options), out)


def planned_slice(cache: Path | CacheFiles, **options: Unpack[SliceOptions]) -> DerivedCache:
    """What `slice_cache` would write. Raises DataError for what the cache does not hold."""
    reader = CacheReader(cache)
    config = sliced_config(
        reader.config,
        profile=options.get("profile"),
        top_k=options.get("top_k"),
        logprob_codec=options.get("logprob_codec"),
        min_probability=options.get("min_probability"),
        min_k=options.get("min_k"),
    )
    first, stop = options.get("examples") or (0, len(reader))
    if not 0 <= first < stop <= len(reader):
        raise DataError("no such examples", found=f"--examples {first}:{stop}", expected=f"within 0:{len(reader)}")
    if config == reader.config and (first, stop) == (0, len(reader)):
        raise DataError(
            "this slice would be the whole cache",
            cache=reader.root,
            try_="--top-k, --profile, --logprob-codec or --examples",
        )
    identity = reader.manifest.identity | {
        "targets": config.identity,
        "slice": {"of": reader.manifest.fingerprint, "examples": [first, stop]},
    }
    return DerivedCache([reader], identity, config, list(_cut(reader, first, stop)), str(reader.root))


def sliced_config(
    config: TargetConfig,
    *,
    profile: str | None,
    top_k: int | None,
    logprob_codec: str | None,
    min_probability: float | None = None,
    min_k: int | None = None,
) -> TargetConfig:
    """The settings of a slice. Raises DataError for what the cache does not hold."""
    have = PROFILES[config.profile]
    want = PROFILES.get(profile or config.profile)
    if want is None:
        return replace(config, profile=str(profile))  # raises with the list of names
    missing = [
        name
        for name, wanted, held in (
            ("ids", want.ids, have.ids),
            ("top-k log-probabilities", want.top_k, config.top_k),
            ("rank bands", want.tail_bands, config.tail_bands),
            ("draws", want.samples, config.samples),
            ("boundaries", want.boundary, have.boundary),
        )
        if wanted and not held
    ]
    if missing:
        raise DataError(
            "a slice cannot hold what the cache does not",
            found=f"{config.profile} without {', '.join(missing)}",
            expected=f"what profile {profile} keeps",
            try_="a profile that keeps less",
        )
    k = config.top_k if top_k is None else top_k
    if not want.top_k and top_k is not None:
        raise DataError(
            f"the {profile or config.profile} profile keeps no top-k", found=f"--top-k {top_k}", try_="leave it out"
        )
    if want.top_k and not 1 <= k <= config.top_k:
        raise DataError(
            "a slice holds no more tokens per row than the cache", found=f"--top-k {k}", expected=f"1..{config.top_k}"
        )
    if want.tail_bands and k != config.top_k:
        raise DataError(
            "rank bands begin where the stored top-k ends",
            found=f"--top-k {k}",
            expected=config.top_k,
            try_="--profile kl or compact, which keep no bands",
        )
    codec = logprob_codec or (config.logprob_codec if profile in (None, config.profile) else want.logprob_codec)
    least = _least_probability(config, want, min_probability)
    return replace(
        config,
        min_probability=least,
        min_k=_least_kept(config, k if least else 1, min_k),
        profile=profile or config.profile,
        top_k=k if want.top_k else 0,
        logprob_codec=codec,
        tail_bands=config.tail_bands if want.tail_bands else 0,
        samples=config.samples if want.samples else 0,
    ).normalised()


def _least_probability(config: TargetConfig, want: Profile, asked: float | None) -> float:
    """Least probability of a kept token in a slice; 0 for rows of one length. Raises DataError where the cache keeps fewer."""
    if config.ragged and want.top_k and not want.min_probability:
        raise DataError(
            "rows that differ in length cannot be made equal",
            found=f"the profile {config.profile}, which keeps tokens above {config.min_probability:g}",
            try_="--profile adaptive, or a cache with a fixed top-k",
        )
    if not want.min_probability:
        return asked or 0.0
    least = config.min_probability or want.min_probability if asked is None else asked
    if least < config.min_probability:
        raise DataError(
            "a slice holds no less probable tokens than the cache",
            found=f"--min-probability {least:g}",
            expected=f"at least {config.min_probability:g}",
        )
    return least


def _least_kept(config: TargetConfig, top_k: int, asked: int | None) -> int:
    """Tokens that every row of a slice keeps. Raises DataError where rows of the cache may hold fewer."""
    if asked is None:
        return min(config.min_k, top_k)
    if config.ragged and asked > config.min_k:
        raise DataError(
            "rows of this cache may hold fewer tokens",
            found=f"--min-k {asked}",
            expected=f"at most {config.min_k}",
            try_="kd cache build --min-k, or a slice of a cache with a fixed top-k",
        )
    return asked


def _cut(reader: CacheReader, first: int, stop: int) -> Iterator[list[Piece]]:
    """The examples `[first, stop)` in shards as large as the source's."""
    room, pieces = reader.manifest.layout.shard_rows, list[Piece]()
    _, rows = reader.lengths()
    for shard, (start, last, _) in enumerate(reader.manifest.shards):
        for example in range(max(first, start), min(stop, last)):
            if rows[example] > room:
                yield pieces
                room, pieces = reader.manifest.layout.shard_rows, []
            room -= int(rows[example])
            inside = example - start
            if pieces and pieces[-1].shard == shard:
                pieces[-1] = replace(pieces[-1], stop=inside + 1)
            else:
                pieces.append(Piece(0, shard, inside, inside + 1))
    yield pieces
