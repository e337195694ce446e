"""`partial.json`: the list of what a copy holds, where it holds only some shards or some arrays of a cache.

The manifest and the commits stay those of the whole cache, byte for byte, so every digest keeps its meaning. What is not
listed was never fetched; reading it is an error of its own, not damage. Arrays that every reader needs (gold tokens, their
log-probability and rank, byte ends) are in every part.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.cache_builder.store.encoding.logprob_codecs import CODECS
from kd.cache_builder.store.followers import FOLLOWERS
from kd.cache_builder.store.ragged import KEPT, TAIL_DRAWS
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.common.errors import CacheDamageError, CacheError, unknown_name
from kd.common.files import canonical_json, digest_of, read_json, write_atomic

PARTIAL = "partial.json"
FORMAT = "kd-cache-part"
ALWAYS = {"gold_ids", "log_z", "gold_logprob", "gold_rank", "byte_end", "byte_length", KEPT}
"""Arrays that every part holds, if the cache has them: a few bytes per row."""


@dataclass(frozen=True)
class Part:
    """Which shards a copy holds, and which arrays of each of them."""

    shards: tuple[int, ...]
    """Indices of the shards, ascending."""
    arrays: tuple[str, ...]
    """Names of the arrays, in the manifest's order."""

    def save(self, root: Path, manifest: CacheManifest) -> None:
        """Write `partial.json`, whole or not at all."""
        write_atomic(root / PARTIAL, self.to_json(manifest))

    def to_json(self, manifest: CacheManifest) -> str:
        """Canonical JSON text, in which runs of shards are `[first, one past the last]`."""
        document = {
            "format": FORMAT,
            "fingerprint": manifest.fingerprint,
            "shards": _runs(self.shards),
            "arrays": list(self.arrays),
        }
        return canonical_json(document | {"checksum": digest_of(document)})

    def require(self, arrays: Collection[str], root: Path) -> None:
        """Raise CacheError where this copy does not hold some of `arrays`."""
        missing = [name for name in arrays if name not in self.arrays]
        if missing:
            raise CacheError(
                "this copy does not hold those arrays of the cache",
                where=root / PARTIAL,
                missing=", ".join(missing),
                found=", ".join(self.arrays),
                try_=f"kd cache pull URL PATH --arrays {','.join(missing)}",
            )

    def joined(self, other: Part, manifest: CacheManifest) -> Part:
        """The smallest part that holds both."""
        names = {*self.arrays, *other.arrays}
        return Part(
            tuple(sorted({*self.shards, *other.shards})), tuple(a.name for a in manifest.arrays if a.name in names)
        )


def whole(manifest: CacheManifest) -> Part:
    """The part that holds everything."""
    return Part(tuple(range(len(manifest.shards))), tuple(a.name for a in manifest.arrays))


def part_of(
    manifest: CacheManifest, *, examples: tuple[int, int] | None = None, arrays: Collection[str] | None = None
) -> Part:
    """The shards that hold `examples` (first, one past the last), with `arrays` and those that every reader needs.

    None stands for all examples, and for all arrays. Raises CacheError for a range that is not in the cache, DataError for an
    array that is not.
    """
    every = whole(manifest)
    first, stop = (0, manifest.examples) if examples is None else examples
    if not 0 <= first < stop <= manifest.examples:
        raise CacheError(
            "these examples are not in the cache",
            found=f"{first}:{stop}",
            expected=f"a range within 0:{manifest.examples}",
        )
    shards = tuple(i for i, (a, b, _) in enumerate(manifest.shards) if a < stop and first < b)
    if arrays is None:
        return Part(shards, every.arrays)
    for name in arrays:
        if name not in every.arrays:
            raise unknown_name("array", name, every.arrays)
    wanted = {*arrays, *ALWAYS}
    for together in _indivisible(manifest):
        if wanted & together:
            wanted |= together
    return Part(shards, tuple(name for name in every.arrays if name in wanted))


def _indivisible(manifest: CacheManifest) -> list[set[str]]:
    """Groups of arrays that can only be decoded together."""
    targets = manifest.targets
    head = {a.name for a in CODECS[targets.logprob_codec].arrays(targets.top_k)} if targets.top_k else set()
    drawn = [{"sample_ids", "sample_counts"}, {"tail_ids", TAIL_DRAWS}]
    return [head | {"tail_odds"}, *drawn, {"token_ids", FOLLOWERS}]


def load_part(root: Path, manifest: CacheManifest) -> Part | None:
    """The part that `partial.json` lists; None for a whole cache. Raises CacheDamageError when the list cannot be true."""
    path = root / PARTIAL
    if not os.path.lexists(path):
        return None
    document = read_json(path, inside=root)
    checksum = document.pop("checksum", None)
    if checksum != digest_of(document) or document.get("format") != FORMAT:
        raise CacheDamageError(
            "the list of what this copy holds was changed", where=path, try_="kd cache pull again, from where it came"
        )
    if document.get("fingerprint") != manifest.fingerprint:
        raise CacheDamageError("the list of what this copy holds belongs to another cache", where=path)
    try:
        shards = [i for first, stop in document["shards"] for i in _run(first, stop, len(manifest.shards))]
        arrays = tuple(str(name) for name in document["arrays"])
    except Exception as error:  # a damaged or hostile document can break any of the above in any way
        raise CacheDamageError(
            "the list of what this copy holds cannot be read", where=path, found=f"{type(error).__name__}: {error}"
        ) from error
    stored = [a.name for a in manifest.arrays]
    if shards != sorted(set(shards)) or not set(stored) & ALWAYS <= set(arrays) <= set(stored):
        raise CacheDamageError("the list of what this copy holds contradicts the manifest", where=path)
    return Part(tuple(shards), arrays)


def refuse_absent(root: Path, manifest: CacheManifest, index: int) -> None:
    """Raise CacheError for a shard that this copy does not hold and does not list."""
    part = load_part(root, manifest)
    if part is not None and index not in part.shards:
        first, stop, _ = manifest.shards[index]
        raise CacheError(
            "this copy does not hold that shard of the cache",
            where=root / PARTIAL,
            shard=index,
            found=f"{len(part.shards)} of {len(manifest.shards)} shards",
            try_=f"kd cache pull URL PATH --examples {first}:{stop}",
        )


def _run(first: Any, stop: Any, shards: int) -> range:
    if type(first) is not int or type(stop) is not int or not 0 <= first < stop <= shards:
        raise CacheError("a range of shards is out of bounds", found=f"{first!r}:{stop!r}"[:80])
    return range(first, stop)


def _runs(shards: Sequence[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for index in shards:
        if runs and runs[-1][1] == index:
            runs[-1][1] += 1
        else:
            runs.append([index, index + 1])
    return runs
