"""Merge caches of one teacher, tokenizer and settings into one that holds the examples of all. No teacher is needed.

    for step in merge_caches([one, two], out): ...

A merger's text is that of its caches, in their order; its fingerprint covers theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kd.cache_builder.store.readers.mixed_reader import refuse_unlike
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.upkeep.derived_cache import DerivedCache, Piece, write_derived
from kd.common.errors import CacheMismatchError, DataError
from kd.common.files import digest_of
from kd.common.progress import Progress


def merge_caches(paths: Sequence[Path], out: Path) -> Iterator[Progress[Path]]:
    """Write the examples of several caches, one cache after another, to `out`.

    The same call continues where an earlier one stopped. Raises as `planned_merge` does, and CacheMismatchError where `out`
    holds another cache.
    """
    yield from write_derived(planned_merge(paths), out)


def planned_merge(paths: Sequence[Path]) -> DerivedCache:
    """What `merge_caches` would write.

    Raises CacheMismatchError, with the difference, where the caches are not of one teacher, tokenizer and settings.
    """
    readers = [CacheReader(path) for path in paths]
    refuse_unlike(readers, ("teacher", "tokenizer", "blocks", "targets"), "these caches cannot be merged")
    prints = [r.manifest.fingerprint for r in readers]
    if len(readers) < 2 or len(set(prints)) < len(prints):
        raise DataError("a merger wants two or more different caches", found=", ".join(p[:12] for p in prints))
    first = readers[0].manifest
    words = text_rules_of(readers)
    corpus = {"kind": first.identity["corpus"]["kind"], "text_digest": digest_of(prints), "merged": prints}
    identity = first.identity | {"corpus": corpus, "tokenizer": words}
    pieces = [
        [Piece(source, shard, 0, last - start)]
        for source, r in enumerate(readers)
        for shard, (start, last, _) in enumerate(r.manifest.shards)
    ]
    return DerivedCache(readers, identity, first.targets, pieces, ", ".join(map(str, paths)))


def text_rules_of(readers: Sequence[CacheReader]) -> dict[str, Any]:
    """The entry `tokenizer` of a merger's identity, with the rules by which its texts became ids.

    A cache that names earlier rules, or none, has rows that are the same by all later ones, unless it is older than they are.
    Raises CacheMismatchError for such a cache beside one that names them.
    """
    latest = max(readers, key=_named_rules)
    older = [
        r for r in readers if max(_named_rules(r), r.manifest.provenance.get("text_rules", 1)) < _named_rules(latest)
    ]
    if older:
        raise CacheMismatchError(
            "these caches cannot be merged",
            first=latest.root,
            other=older[0].root,
            found="rows by newer rules of tokenising pairs, and an older cache that may have other rows by them",
            try_="the older cache built again",
        )
    return dict(latest.manifest.identity["tokenizer"])


def _named_rules(reader: CacheReader) -> int:
    return int(reader.manifest.identity["tokenizer"].get("text_rules", 1))
