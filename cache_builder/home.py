"""The user's cache directory: local mirrors of caches that are read from a URL. Anything under it may be removed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from kd.data.errors import DataError

CACHE_BYTES = 20 * 10**9
"""Bytes of shards kept of a cache that is read from a URL, unless --cache-bytes or KD_CACHE_BYTES says otherwise."""
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def kd_home() -> Path:
    """`$KD_HOME`, by default `~/.cache/kd`."""
    named = os.environ.get("KD_HOME")
    return Path(named) if named else Path.home() / ".cache" / "kd"


def mirrors() -> Path:
    """Folder of the mirrors: one per manifest, by its digest. They are not whole: no list of caches should show them."""
    return kd_home() / "mirrors"


def byte_count(text: str) -> int:
    """`20GB`, `512MiB`, `1.5G` or plain bytes. Raises DataError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if match is None or match[2] not in UNITS:
        raise DataError("this is not a number of bytes", found=repr(text), expected="e.g. 20GB, 512MiB or 1000000")
    return int(float(match[1]) * UNITS[match[2]])


def cache_bytes(given: int | None = None) -> int:
    """The bound on a mirror's shards: `given`, else `$KD_CACHE_BYTES`, else the default."""
    named = os.environ.get("KD_CACHE_BYTES")
    return given if given is not None else byte_count(named) if named else CACHE_BYTES
