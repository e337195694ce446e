"""A cache of format version 2 and one of version 3 say the same; an unfinished build goes on in the version it was begun in."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.opening import open_files
from kd.cache_builder.share.pull import pull
from kd.cache_builder.store.cache_files import bytes_below
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.commits import shard_files
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.upkeep.merge_caches import merge_caches
from kd.cache_builder.upkeep.repair import reopen
from kd.cache_builder.upkeep.slice_cache import slice_cache
from kd.cache_builder.upkeep.summary import cache_summary
from kd.cache_builder.upkeep.verify import verify
from kd.common.progress import final


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory, build_request) -> Path:
    """A cache of version 2, as the releases before version 3 wrote it."""
    out = tmp_path_factory.mktemp("second") / "cache"
    plan = plan_build(build_request(out))
    for _ in build(dataclasses.replace(plan, manifest=dataclasses.replace(plan.manifest, format_version=2))):
        pass
    return out


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory, build_request, run_build) -> Path:
    """The same cache in version 3."""
    out = tmp_path_factory.mktemp("third") / "cache"
    run_build(build_request(out))
    return out


def same_examples(one: CacheReader, other: CacheReader) -> None:
    assert len(one) == len(other)
    for a, b in zip(one.read(range(len(one))), other.read(range(len(other))), strict=True):
        assert (a.id, a.prompt, a.target, a.context_ids.tolist()) == (b.id, b.prompt, b.target, b.context_ids.tolist())
        for name in ("gold_ids", "log_z", "token_ids", "logprobs", "byte_end"):
            np.testing.assert_array_equal(getattr(a.targets, name), getattr(b.targets, name))


def test_both_say_the_same_under_one_fingerprint(second: Path, third: Path):
    old, new = load_manifest(second), load_manifest(third)
    assert (old.format_version, new.format_version) == (2, 3)
    assert (old.fingerprint, old.shards) == (new.fingerprint, new.shards)
    assert final(verify(second)) == final(verify(third)) == ()
    same_examples(CacheReader(second), CacheReader(third))
    for index in range(len(old.shards)):
        before, after = shard_files(old.arrays, index), shard_files(new.arrays, index)
        for name in before:
            if name != "examples":
                assert (second / before[name]).read_bytes() == (third / after[name]).read_bytes()


def test_lengths_of_any_range_are_those_of_the_examples(second: Path, third: Path):
    one, other = CacheReader(second), CacheReader(third)
    examples = one.read(range(len(one)))
    tokens, rows = [len(e.input_ids) for e in examples], [len(e.targets) for e in examples]
    for first, stop in ((0, len(one)), (1, 2), (3, len(one)), (len(one) // 2, len(one) // 2 + 3)):
        for reader in (one, other):
            found = reader.lengths(first, stop)
            assert (found[0].tolist(), found[1].tolist()) == (tokens[first:stop], rows[first:stop])
    for reader in (one, other):
        for first, stop in ((2, 2), (-1, 2), (0, len(one) + 1)):
            with pytest.raises(IndexError):
                reader.lengths(first, stop)


def test_version_3_is_no_larger_and_has_no_folder_for_a_shard(second: Path, third: Path):
    assert bytes_below(third) < bytes_below(second)
    arrays = len(load_manifest(third).arrays)
    assert sum(p.is_dir() for p in third.rglob("*")) == len(["commits", "examples", "lengths", "targets.zarr"]) + arrays


def test_a_summary_adds_up_what_is_on_the_disk_and_opens_no_shard(second: Path, third: Path, monkeypatch):
    old, new = cache_summary(second), cache_summary(third)
    assert new["bytes"] == bytes_below(third)
    assert old["bytes"] == bytes_below(second)
    assert old["array_bytes_per_token"] == new["array_bytes_per_token"]
    monkeypatch.setattr("kd.cache_builder.store.cache_files.LocalFiles.read_commit", None)
    monkeypatch.setattr("kd.cache_builder.store.cache_files.LocalFiles.stored_bytes", None)
    assert cache_summary(third) == new


def test_an_unfinished_build_of_version_2_is_continued_as_version_2(second, tmp_path, build_request, run_build, tree):
    out = shutil.copytree(second, tmp_path / "cache")
    before = tree(out)
    load_manifest(out).reopened().save(out, "building.json")
    (out / "manifest.json").unlink()
    for index in (1, 3):
        (out / f"commits/{index:05d}.json").unlink()
    last = run_build(build_request(out))[-1]
    assert last.complete
    assert tree(out) == before


def test_a_damaged_shard_of_either_is_built_again_with_the_same_bytes(
    second, third, tmp_path, build_request, run_build, tree
):
    for cache in (second, third):
        out = shutil.copytree(cache, tmp_path / f"v{load_manifest(cache).format_version}")
        before = tree(out)
        name = shard_files(load_manifest(out).arrays, 2)["gold_ids"]
        (out / name).write_bytes(b"\0" * (out / name).stat().st_size)
        findings = final(verify(out))
        reopen(out, list(findings))
        assert not load_manifest(out).complete
        run_build(build_request(out))
        assert tree(out) == before


def test_shards_of_version_2_are_copied_into_a_build_of_version_3(
    second, third, tmp_path, build_request, run_build, tree
):
    request = dataclasses.replace(build_request(tmp_path / "c"), extend=second)
    last = run_build(request)[-1]
    assert last.copied == last.shards_total
    assert tree(tmp_path / "c") == tree(third)


def test_slices_and_mergers_of_version_2_are_of_version_3(second: Path, third: Path, tmp_path: Path):
    made = []
    for cache in (second, third):
        made.append(tmp_path / f"slice{len(made)}")
        final(slice_cache(cache, made[-1], examples=(1, 5)))
        assert load_manifest(made[-1]).format_version == 3
    same_examples(*map(CacheReader, made))
    final(merge_caches([second, made[1]], tmp_path / "both"))
    reader = CacheReader(tmp_path / "both")
    assert (reader.manifest.format_version, len(reader)) == (3, len(CacheReader(second)) + 4)
    assert final(verify(tmp_path / "both")) == ()


@pytest.mark.parametrize("which", ["second", "third"])
def test_a_part_and_a_mirror_of_either_read_as_the_whole(which, request, tmp_path, monkeypatch):
    monkeypatch.setenv("KD_HOME", str(tmp_path / "home"))
    cache = request.getfixturevalue(which)
    whole = CacheReader(cache)
    same_examples(CacheReader(open_files(cache.as_uri())), whole)
    first, stop, _ = whole.manifest.shards[1]
    final(pull(cache.as_uri(), tmp_path / "part", examples=(first, stop)))
    assert final(verify(tmp_path / "part")) == ()
    part = CacheReader(tmp_path / "part")
    for mine, theirs in zip(part.lengths(), whole.lengths(), strict=True):
        assert mine[first:stop].tolist() == theirs[first:stop].tolist()
        assert not mine[:first].any()
        assert not mine[stop:].any()
    here = [p for p in (tmp_path / "part").rglob("*") if p.is_file() and p.name != "partial.json"]
    if which == "third":
        assert cache_summary(tmp_path / "part")["bytes"] == sum(p.stat().st_size for p in here)
    final(pull(cache.as_uri(), tmp_path / "part"))
    digests = [
        {p.relative_to(r).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in r.rglob("*") if p.is_file()}
        for r in (cache, tmp_path / "part")
    ]
    assert digests[0] == digests[1]
