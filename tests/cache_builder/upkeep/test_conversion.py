"""Rows under the settings they have are the rows that are stored."""

from __future__ import annotations

from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.upkeep.conversion import converted


def test_the_same_settings_are_the_same_arrays(kl):
    reader = CacheReader(kl)
    stored = reader.shard(0).arrays
    assert converted(stored, reader.config, reader.config, reader.manifest.vocabulary_size) is stored
