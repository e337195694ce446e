"""Which place an address names: `open_remote` and the kinds of address there are."""

from __future__ import annotations

import os
from collections.abc import Callable

from kd.cache_builder.share.hub_remote import Hub
from kd.cache_builder.share.remotes import Bucket, Folder, Remote, Web, local_path
from kd.common.errors import unknown_name

__all__ = ["REMOTES", "is_url", "local_path", "open_remote"]


def is_url(place: str | os.PathLike[str]) -> bool:
    """Is this the address of a cache elsewhere (`SCHEME://…`), not a path? A file:// address is a path."""
    return "://" in str(place) and not str(place).startswith("file://")


def open_remote(url: str) -> Remote:
    """The place an address (or a path) names. Raises CacheError or DataError for an address that names none."""
    scheme = str(url).split("://")[0] if is_url(url) else "file"
    if scheme not in REMOTES:
        raise unknown_name("kind of address", scheme, REMOTES, found=url)
    return REMOTES[scheme](str(url))


REMOTES: dict[str, Callable[[str], Remote]] = {
    "file": Folder,
    "hf": Hub,
    "http": Web,
    "https": Web,
    "s3": Bucket,
}
