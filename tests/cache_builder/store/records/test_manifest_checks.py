"""File names of a stranger's document stay in the cache's folder."""

from __future__ import annotations

import pytest

from kd.cache_builder.store.records.manifest_checks import check_inside
from kd.common.errors import CacheError


@pytest.mark.parametrize("name", ["a", "a/b.c", "targets.zarr/log_z/c/0/0", "a..b"])
def test_plain_names_stay_inside(name: str):
    check_inside(name)


@pytest.mark.parametrize("name", ["", "/a", "a/", "./a", "..", "a/../b", "a\\b", "a\0"])
def test_names_that_could_leave_the_directory_are_refused(name: str):
    with pytest.raises(CacheError, match="leaves the cache's directory"):
        check_inside(name)
