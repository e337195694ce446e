"""Addresses that name no place are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from servers import HubServer, Proxy

from kd.cache_builder.share.pull import pull
from kd.cache_builder.share.push import push
from kd.common.errors import CacheError, DataError, KdError
from kd.common.progress import final

pytestmark = pytest.mark.usefixtures("hasty")


def test_addresses_that_name_no_place_are_refused(cache: Path, tmp_path: Path, s3: Proxy, hub: HubServer):
    for url, kind, words in (
        ("ftp://host/cache", DataError, "kind of address"),
        ("hf://us/cache", CacheError, "not the address"),
        ("hf://datasets/us/cache/../other", CacheError, "not the address"),
        ("hf://datasets/us/none", CacheError, "hub refused"),
        ("s3://", CacheError, "not the address"),
        ("s3://nobody/cache", CacheError, "no cache"),
        ("file://elsewhere/cache", CacheError, "this machine"),
    ):
        with pytest.raises(kind, match=words):
            final(pull(url, tmp_path / "copy"))
    for url, words in (("https://host/cache", "only be read"), ("s3://nobody/cache", "no such bucket")):
        with pytest.raises(KdError, match=words):
            final(push(cache, url))
