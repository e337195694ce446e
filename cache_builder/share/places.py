"""Addresses of caches: `open_remote` and the kinds of address that it knows."""

from __future__ import annotations

import os
from collections.abc import Callable

from kd.cache_builder.share.hub_remote import HubRemote
from kd.cache_builder.share.remotes import FolderRemote, Remote, local_path
from kd.cache_builder.share.s3_remote import S3Remote
from kd.cache_builder.share.web_remote import WebRemote
from kd.common.errors import unknown_name

__all__ = ["REMOTES", "is_remote", "local_path", "open_remote"]


def is_remote(address: str | os.PathLike[str]) -> bool:
    """True for the address of a cache elsewhere (`SCHEME://…`), False for a path. A file:// address is a path."""
    return "://" in str(address) and not str(address).startswith("file://")


def open_remote(url: str) -> Remote:
    """The remote that an address or a path names. Raises CacheError or DataError for an address that names none."""
    scheme = str(url).split("://")[0] if is_remote(url) else "file"
    if scheme not in REMOTES:
        raise unknown_name("kind of address", scheme, REMOTES, found=url)
    return REMOTES[scheme](str(url))


REMOTES: dict[str, Callable[[str], Remote]] = {
    "file": FolderRemote,
    "hf": HubRemote,
    "http": WebRemote,
    "https": WebRemote,
    "s3": S3Remote,
}
