"""Both readers are a `Reader`, and an example shows its shapes, not its numbers."""

from __future__ import annotations

import inspect
from pathlib import Path

from kd.cache_builder.store.readers.mixed_reader import MixedReader
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.readers.reading import Reader


def members(protocol: type) -> set[str]:
    """Names of the attributes and methods that a protocol asks for."""
    methods = {name for name, value in vars(protocol).items() if inspect.isfunction(value) and name != "__init__"}
    return {name for name in methods if not name.startswith("_no_init")} | set(protocol.__annotations__)


def test_a_mixture_offers_what_a_reader_does_without_being_a_cache_reader(cache: Path):
    one = CacheReader(cache)
    mixture = MixedReader([(one, 1.0), (CacheReader(cache), 1.0)])
    assert not isinstance(mixture, CacheReader)
    assert {"read", "manifest", "__len__", "example_table"} <= members(Reader)
    for reader in (one, mixture):
        assert [name for name in members(Reader) if not hasattr(reader, name)] == []


def test_tables_of_a_mixture_are_those_of_its_caches(cache: Path):
    one = CacheReader(cache)
    mixture = MixedReader([(one, 1.0), (CacheReader(cache), 1.0)])
    assert list(mixture.shards) == list(range(2 * len(one.shards)))
    tables = [mixture.example_table(shard, ["id"]) for shard in mixture.shards]
    assert tables == 2 * [one.example_table(shard, ["id"]) for shard in one.shards]


def test_an_example_shows_shapes_and_no_text(cache: Path):
    example = CacheReader(cache)[0]
    text = repr(example)
    assert text.startswith(f"CachedExample(index=0, id={example.id!r}, prompt={len(example.prompt)} characters")
    assert f"targets={len(example.targets)} rows" in text
    assert example.target not in text
