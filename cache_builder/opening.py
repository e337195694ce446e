"""Open a cache for reading: a folder, a URL, the beginning of a fingerprint, or several of them with weights.

reader = open_cache("runs/cache")
reader = open_cache("hf://datasets/OWNER/NAME", cache_bytes=20 * 10**9)
reader = open_cache({"runs/a": 0.7, "runs/b": 0.3})
"""

from __future__ import annotations

import os

from kd.cache_builder.share.places import is_remote, local_path
from kd.cache_builder.store.cache_files import CacheFiles, LocalFiles
from kd.cache_builder.store.readers.mixed_reader import MixedReader
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.readers.reading import Reader
from kd.cache_builder.upkeep.cache_registry import located
from kd.cache_builder.weighted_caches import CacheSpec, as_caches, shares_of


def open_cache(spec: CacheSpec, *, top_k: int | None = None, cache_bytes: int | None = None) -> Reader:
    """A reader of one cache, or of a mixture of several.

    spec          a path, a URL, the beginning of a fingerprint; several with weights as a mapping or as `A=0.7,B=0.3`
    top_k         tokens per row to hand out; None = all that are stored
    cache_bytes   most bytes of a URL's shards that are kept on this disk; None = `KD_CACHE_BYTES`, or 20 GB

    Raises CacheError for an incomplete or missing cache, CacheMismatchError for caches that cannot be mixed.

    >>> import kd
    >>> cache = kd.open_cache("cache", top_k=8)
    >>> len(cache), cache[0].targets.token_ids.shape[1]
    (36, 8)
    >>> by_fingerprint = kd.open_cache(cache.manifest.fingerprint[:12])
    >>> len(kd.open_cache({"cache": 0.7, str(by_fingerprint.root): 0.3}))
    72
    """
    caches = as_caches(spec)
    readers = [CacheReader(open_files(one.location, cache_bytes), top_k=top_k) for one in caches]
    if len(readers) == 1:
        return readers[0]
    return MixedReader(list(zip(readers, shares_of(caches), strict=True)), top_k=top_k)


def open_files(cache: str | os.PathLike[str], cache_bytes: int | None = None) -> CacheFiles:
    """The files of one cache: in the folder of a path or fingerprint, or in the mirror of a URL. Raises CacheError."""
    if not is_remote(cache):
        return LocalFiles(located(local_path(cache)))
    from kd.cache_builder.share.mirror import open_mirror

    return open_mirror(str(cache), cache_bytes)
