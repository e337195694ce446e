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
    id_codec: str | None
    """One of `ID_CODECS`."""
    min_probability: float | None
    """See `TargetConfig`, for the profile adaptive; None takes that of a new profile."""
    min_k: int | None
    """The same."""
    tail_bands: int | None
    """0 leaves the rank bands out; None keeps them where the profile does."""
    certain_below: float | None
    """The same; a row is certain where the most that its entropy can be, by what the cache holds, is below this."""
    tail_samples: int | None
    """Draws from what lies beyond the kept tokens; 0 for none. They are drawn again from the stored row where its tail grows."""
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
        certain_below=options.get("certain_below"),
        tail_bands=options.get("tail_bands"),
        tail_samples=options.get("tail_samples"),
        id_codec=options.get("id_codec"),
    )
    first, stop = options.get("examples") or (0, len(reader))
    if not 0 <= first < stop <= len(reader):
        raise DataError("no such examples", found=f"--examples {first}:{stop}", expected=f"within 0:{len(reader)}")
    if config == reader.config and (first, stop) == (0, len(reader)):
        raise DataError(
            "this slice would be the whole cache",
            cache=reader.root,
            try_="--top-k, --profile, --logprob-codec, --id-codec, --certain-below or --examples",
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
    certain_below: float | None = None,
    tail_bands: int | None = None,
    tail_samples: int | None = None,
    id_codec: str | None = None,
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
    same = profile in (None, config.profile)
    codec = logprob_codec or (config.logprob_codec if same else want.logprob_codec)
    least = _least_probability(config, want, min_probability)
    certain = _certain_below(config, want, certain_below)
    new = replace(
        config,
        min_probability=least,
        min_k=_least_kept(config, k if least else 1, min_k, certain=bool(certain)),
        certain_below=certain,
        profile=profile or config.profile,
        top_k=k if want.top_k else 0,
        logprob_codec=codec,
        tail_bands=_bands(config, tail_bands, kept=bool(want.tail_bands) or (bool(least) and same)),
        id_codec=id_codec or (config.id_codec if want.ids and want.top_k else "frequency"),
        samples=config.samples if want.samples else 0,
        tail_samples=_tail_samples(config, want, tail_samples),
    ).normalised()
    if new.tail_bands and new.shortest != config.shortest:
        raise DataError(
            "rank bands begin where the shortest row ends",
            found=f"a slice whose shortest row may keep {new.shortest}",
            expected=config.shortest,
            try_="--tail-bands 0, or --profile kl, compact or adaptive, which need no bands",
        )
    return new


def _bands(config: TargetConfig, asked: int | None, *, kept: bool) -> int:
    """Rank bands of a slice. Raises DataError for a number that the cache does not have."""
    if asked not in (None, 0, config.tail_bands):
        raise DataError(
            "the bands of a cache are kept as they are, or left out",
            found=f"--tail-bands {asked}",
            expected=f"0 or {config.tail_bands}" if config.tail_bands else "0",
        )
    return (config.tail_bands if kept else 0) if asked is None else asked


def _certain_below(config: TargetConfig, want: Profile, asked: float | None) -> float:
    """Entropy of certain rows in a slice. Raises DataError where the cache keeps one token of more rows."""
    if not want.min_probability:
        return asked or 0.0
    if asked is None:
        return config.certain_below
    if asked < config.certain_below:
        raise DataError(
            "certain rows of this cache hold one token",
            found=f"--certain-below {asked:g}",
            expected=f"at least {config.certain_below:g}",
        )
    return asked


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


def _tail_samples(config: TargetConfig, want: Profile, asked: int | None) -> int:
    """Draws from the tails of a slice. Raises DataError where the cache has fewer."""
    if asked is None:
        return config.tail_samples if want.ids and want.top_k else 0
    if asked > config.tail_samples:
        raise DataError(
            "a slice holds no more draws than the cache",
            found=f"--tail-samples {asked}",
            expected=f"0..{config.tail_samples}",
            try_="kd cache build --tail-samples",
        )
    return asked


def _least_kept(config: TargetConfig, top_k: int, asked: int | None, *, certain: bool) -> int:
    """Tokens that every row of a slice keeps, but the certain ones. Raises DataError where rows of the cache may hold fewer."""
    if asked is None:
        return min(2 if certain and not config.ragged else config.min_k, top_k)
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
