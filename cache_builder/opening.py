"""Open a cache for reading: a folder, a URL, the beginning of a fingerprint, or several of them with weights.

reader = open_cache("runs/cache")
reader = open_cache("hf://datasets/OWNER/NAME", cache_bytes=20 * 10**9)
reader = open_cache("runs/a=0.7,runs/b=0.3")
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from kd.cache_builder.share.places import is_remote, local_path
from kd.cache_builder.store.cache_files import CacheFiles, LocalFiles
from kd.cache_builder.store.mixed_reader import MixedReader
from kd.cache_builder.store.reader import CacheReader
from kd.cache_builder.store.readers.reading import Reader
from kd.cache_builder.upkeep.cache_registry import located
from kd.common.errors import DataError


def open_cache(spec: str | os.PathLike[str], *, top_k: int | None = None, cache_bytes: int | None = None) -> Reader:
    """A reader of one cache, or of a mixture of several.

    spec          a path, a URL, the beginning of a fingerprint, or `A=0.7,B=0.3`
    top_k         tokens per row to hand out; None means all that are stored
    cache_bytes   for a URL: most bytes of its shards kept on this disk; None means `KD_CACHE_BYTES`, or 20 GB

    Raises CacheError for an incomplete or missing cache, CacheMismatchError for caches that cannot be mixed.
    """
    parts = weighted(str(spec))
    readers = [CacheReader(open_files(place, cache_bytes), top_k=top_k) for place, _ in parts]
    if len(parts) == 1:
        return readers[0]
    return MixedReader([(r, weight) for r, (_, weight) in zip(readers, parts, strict=True)], top_k=top_k)


def open_files(place: str | os.PathLike[str], cache_bytes: int | None = None) -> CacheFiles:
    """The files of one cache: in the folder of a path or fingerprint, or in the mirror of a URL. Raises CacheError."""
    if not is_remote(place):
        return LocalFiles(located(local_path(place)))
    from kd.cache_builder.share.mirror import open_mirror

    return open_mirror(str(place), cache_bytes)


def weighted(spec: str) -> list[tuple[str, float]]:
    """`A=0.7,B=0.3` -> `[("A", 0.7), ("B", 0.3)]`; one cache has the weight 1. Raises DataError."""
    if Path(spec).exists():
        return [(spec, 1.0)]
    if not re.search(r"=[^,/]*(,|$)", spec):
        several = spec.split(",")
        if len(several) > 1 and all("://" in one or Path(one).exists() for one in several):
            raise DataError(
                "several caches are mixed by weights",
                found=spec,
                expected="PATH=WEIGHT of each",
                try_="--cache runs/a=0.7 --cache runs/b=0.3",
            )
        return [(spec, 1.0)]
    parts = []
    for item in spec.split(","):
        path, sign, weight = item.rpartition("=")
        try:
            parts.append((path, float(weight)))
        except ValueError:
            sign = ""
        if not sign or not path or not 0 < parts[-1][1] < float("inf"):
            raise DataError(
                "not a mixture of caches",
                found=item,
                expected="PATH=WEIGHT with a positive weight",
                try_="--cache runs/a=0.7 --cache runs/b=0.3",
            )
    total = sum(weight for _, weight in parts)
    return [(path, weight / total) for path, weight in parts]
