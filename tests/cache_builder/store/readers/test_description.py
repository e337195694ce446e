"""A reader says which cache it reads: teacher, text, rows, bytes and profile, also as a table for a notebook."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from xml.etree import ElementTree

import pytest

from kd.cache_builder.store.readers.description import facts, html_table
from kd.cache_builder.store.readers.mixed_reader import MixedReader
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import load_manifest


def cells(html: str) -> dict[str, str]:
    """Header -> text of each row of a well-formed table."""
    return {row[0].text or "": row[1].text or "" for row in ElementTree.fromstring(html).iter("tr")}


def test_a_reader_names_its_teacher_rows_bytes_and_profile(cache: Path):
    reader = CacheReader(cache)
    manifest, size = reader.manifest, sum(p.stat().st_size for p in cache.rglob("*") if p.is_file())
    text = repr(reader)
    assert text.startswith(f"CacheReader({str(cache)!r}, teacher={manifest.provenance['teacher']!r}, ")
    assert f"rows={manifest.rows:,}, bytes={size:,}, profile='{manifest.targets.profile}, " in text
    assert "\n" not in text


def test_a_slice_of_the_top_k_is_told(cache: Path):
    stored = load_manifest(cache).targets.top_k
    assert f"top-k 2 of {stored}'" in repr(CacheReader(cache, top_k=2))
    assert f"top-k {stored}'" in repr(CacheReader(cache))


def test_a_mixture_names_its_caches_with_their_weights(cache: Path):
    one, other = CacheReader(cache), CacheReader(cache)
    text = repr(MixedReader([(one, 3.0), (other, 1.0)]))
    assert text.startswith(f"MixedReader('{cache}=0.75, {cache}=0.25', teacher=")
    assert f"rows={2 * one.manifest.rows:,}" in text


@pytest.mark.parametrize("mixed", [False, True])
def test_the_table_of_a_notebook_says_the_same(cache: Path, mixed: bool):
    one = CacheReader(cache)
    reader = MixedReader([(one, 1.0), (CacheReader(cache), 1.0)]) if mixed else one
    shown = cells(reader._repr_html_())
    assert list(shown) == ["teacher", "text", "examples", "rows", "bytes", "profile", "fingerprint"]
    assert shown["rows"] == f"{reader.manifest.rows:,}"
    assert shown["fingerprint"] == reader.manifest.fingerprint[:12]
    assert all(value in repr(reader) for value in shown.values())


def test_names_cannot_break_out_of_the_table(cache: Path):
    hostile = "<script>alert('x')</script> & \"more\""
    manifest = load_manifest(cache)
    manifest = dataclasses.replace(manifest, provenance=manifest.provenance | {"teacher": hostile})
    html = html_table(hostile, facts(manifest, 0))
    assert "<script>" not in html
    assert cells(html)["teacher"] == hostile
