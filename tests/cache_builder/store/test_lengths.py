"""Lengths in pages: any batches make the same pages, any range reads as it was written, and damage is named."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kd.cache_builder.store import lengths
from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.lengths import LENGTH_SCHEMA, LengthPages, read_page, write_length_pages
from kd.cache_builder.store.records.cache_tables import write_columns
from kd.cache_builder.store.records.commits import file_entry
from kd.common.errors import CacheDamageError


@given(rows=st.lists(st.integers(1, 9), min_size=1, max_size=40), data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_pages_do_not_depend_on_how_the_lengths_arrive(tmp_path, monkeypatch, rows, data):
    monkeypatch.setattr(lengths, "PAGE_EXAMPLES", 7)
    borders = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    batches = [(part + 2, part) for part in np.split(np.array(rows), borders)]
    names = write_length_pages(tmp_path, batches)
    assert len(names) == -(-len(rows) // 7)
    found = [
        read_page(LocalFiles(tmp_path), n, file_entry(tmp_path / n), len(rows[7 * i : 7 * i + 7]))
        for i, n in enumerate(names)
    ]
    assert np.concatenate([page[1] for page in found]).tolist() == rows
    assert np.concatenate([page[0] for page in found]).tolist() == [n + 2 for n in rows]


def test_a_million_equal_lengths_are_a_few_hundred_bytes(tmp_path):
    tokens = np.full(2**20, 256)
    assert write_length_pages(tmp_path, [(tokens, tokens - 1)]) == ["lengths/00000.parquet"]
    assert (tmp_path / "lengths/00000.parquet").stat().st_size < 20_000


@pytest.mark.parametrize(
    ("tokens", "rows", "count"), [([3, 3], [2, 0], 2), ([3, 1], [2, 2], 2), ([3, 3], [2, -1], 2), ([3], [2], 2)]
)
def test_impossible_lengths_are_damage_that_names_the_page(tmp_path, tokens, rows, count):
    name = "lengths/00000.parquet"
    write_columns(tmp_path / name, {"tokens": tokens, "rows": rows}, LENGTH_SCHEMA)
    with pytest.raises(CacheDamageError) as error:
        read_page(LocalFiles(tmp_path), name, file_entry(tmp_path / name), count)
    assert name in str(error.value)


def test_any_range_reads_as_the_whole_page_with_and_without_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "PAGE_EXAMPLES", 20)
    rows = np.random.default_rng(0).integers(1, 9, 50)
    tokens = rows + np.arange(50)
    reads = []
    for size in (8, 20):  # the latter as earlier releases wrote pages
        monkeypatch.setattr(lengths, "GROUP_EXAMPLES", size)
        folder = tmp_path / str(size)
        names = write_length_pages(folder, [(tokens, rows)])
        manifest: Any = SimpleNamespace(examples=50, files={name: file_entry(folder / name) for name in names})
        monkeypatch.setattr(lengths, "GROUP_EXAMPLES", 8)
        pages = LengthPages(LocalFiles(folder), manifest)
        for first in range(50):
            for stop in range(first + 1, 51):
                found = pages.read(first, stop)
                assert found[0].tolist() == tokens[first:stop].tolist()
                assert found[1].tolist() == rows[first:stop].tolist()
        reads.append(pages._page.cache_info().misses)
    assert reads == [3, 3]


def test_a_short_range_does_not_decode_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "PAGE_EXAMPLES", 20)
    monkeypatch.setattr(lengths, "GROUP_EXAMPLES", 5)
    rows = np.arange(1, 21)
    names = write_length_pages(tmp_path, [(rows, rows)])
    manifest: Any = SimpleNamespace(examples=20, files={n: file_entry(tmp_path / n) for n in names})
    pages = LengthPages(LocalFiles(tmp_path), manifest)
    assert pages.read(11, 14)[1].tolist() == [12, 13, 14]
    assert pages._page.cache_info().misses == 0
