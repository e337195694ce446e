"""Slices hold what a build would have made, and what need not change is copied to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from terminal import kd

from kd.cache_builder.store.encoding.logprob_codecs import CODECS
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.store.soft_targets import concatenate
from kd.cache_builder.upkeep.slice_cache import slice_cache
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheMismatchError, DataError
from kd.common.progress import final


def all_rows(root: Path, **options: Any):
    reader = CacheReader(root, **options)
    return concatenate([e.targets for e in reader.read(range(len(reader)))])


def sound(root: Path) -> bool:
    return final(verify(root)) == ()


def run(steps) -> None:
    for _ in steps:
        pass


def test_a_slice_of_k_is_the_build_of_k_but_for_what_the_tail_was_rounded_to(tmp_path, kl, build_request, run_build):
    run(slice_cache(kl, tmp_path / "slice", top_k=3))
    run_build(build_request(tmp_path / "built", top_k=3))
    found, expected = all_rows(tmp_path / "slice"), all_rows(tmp_path / "built")
    assert (found.token_ids == expected.token_ids).all()
    for name in ("gold_ids", "gold_rank", "byte_end", "gold_logprob"):
        assert (getattr(found, name) == getattr(expected, name)).all(), name
    # both put the same head on the same scale; the slice's tail holds five tokens as decoded, not exact: the codec's error
    # is at most half a step of 1/46 on each, on a mass below 1, and float16 odds come on top
    for temperature in found.temperatures:
        difference = np.abs(found.logprobs_at(temperature) - expected.logprobs_at(temperature))
        assert difference.max() < 0.012
    assert sound(tmp_path / "slice")


@pytest.mark.parametrize("codec", ["float32", "graded", "graded-coarse", "linear8", "float16"])
def test_kept_and_tail_mass_of_a_slice_add_up_at_every_temperature(tmp_path, build_request, run_build, codec: str):
    run_build(build_request(tmp_path / "c", logprob_codec=codec))
    run(slice_cache(tmp_path / "c", tmp_path / "s", top_k=2))
    whole, cut = all_rows(tmp_path / "c"), all_rows(tmp_path / "s")
    for t in whole.temperatures:
        kept = np.exp(whole.logprobs_at(t))
        expected = whole.tail_mass_at(t) + kept[:, 2:].sum(1)
        # two float16 odds (2^-11 of a logarithm of some nats), and another span of linear8 for fewer values
        assert np.abs(cut.tail_mass_at(t) - expected).max() < (0.02 if codec == "linear8" else 0.005)


def test_a_slice_of_examples_has_their_rows_to_the_bit(tmp_path, kl):
    reader = CacheReader(kl)
    first, stop = 3, len(reader) - 2
    assert reader.manifest.shards[0][0] < first
    run(slice_cache(kl, tmp_path / "s", examples=(first, stop)))
    part = CacheReader(tmp_path / "s")
    assert len(part) == stop - first
    for mine, theirs in zip(part.read(range(len(part))), reader.read(range(first, stop)), strict=True):
        assert (mine.id, mine.prompt, mine.target) == (theirs.id, theirs.prompt, theirs.target)
        assert (mine.input_ids == theirs.input_ids).all()
        assert (mine.targets.logprobs == theirs.targets.logprobs).all()
        assert (mine.targets.log_z == theirs.targets.log_z).all()
    assert sound(tmp_path / "s")
    assert "head_kl" not in part.manifest.quality  # not measured on these
    assert part.manifest.quality["rows"] == part.manifest.rows


@pytest.mark.parametrize("profile", ["kl", "compact", "uld", "sampled"])
def test_a_full_cache_holds_every_other_profile(tmp_path, cache, profile: str):
    run(slice_cache(cache, tmp_path / "s", profile=profile))
    whole, cut = all_rows(cache), all_rows(tmp_path / "s")
    assert sound(tmp_path / "s")
    assert (cut.token_ids is None) == (profile in ("uld", "sampled"))
    if profile == "sampled":
        assert (cut.sample_ids == whole.sample_ids).all()
        assert np.abs(cut.log_z - whole.log_z).max() == 0
        return
    codec: Any = CODECS[CacheReader(tmp_path / "s").config.logprob_codec]
    assert (
        np.abs(np.diff(cut.logprobs) - np.diff(whole.logprobs)).max() < 40 * codec.step
    )  # far out steps grow to y/2 at most
    assert np.abs(cut.logprobs[:, 0] - whole.logprobs[:, 0]).max() < 2 * codec.step
    if profile == "uld":
        assert (cut.tail_bands == whole.tail_bands).all()


def test_a_slice_killed_in_between_continues_to_the_same_bytes(tmp_path, kl, tree):
    run(slice_cache(kl, tmp_path / "whole", top_k=3))
    running = slice_cache(kl, tmp_path / "s", top_k=3)
    next(running)
    running.close()
    run(slice_cache(kl, tmp_path / "s", top_k=3))
    assert tree(tmp_path / "s") == tree(tmp_path / "whole")
    with pytest.raises(CacheMismatchError, match="made from something else"):
        run(slice_cache(kl, tmp_path / "s", top_k=2))


def test_a_slice_killed_at_its_very_end_is_tidied_by_the_same_call(tmp_path, kl, tree):
    """Between writing `manifest.json` and removing `building.json`."""
    run(slice_cache(kl, tmp_path / "s", top_k=4))
    whole = tree(tmp_path / "s")
    (tmp_path / "s" / "building.json").write_bytes((tmp_path / "s" / "manifest.json").read_bytes())
    run(slice_cache(kl, tmp_path / "s", top_k=4))
    assert tree(tmp_path / "s") == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "whole cache"),
        ({"top_k": 9}, "no more tokens"),
        ({"profile": "full"}, "cannot hold what"),
        ({"profile": "nonsense"}, "unknown profile"),
        ({"examples": (0, 10_000)}, "no such examples"),
    ],
)
def test_slices_that_cannot_be(tmp_path, kl, options: dict, message: str):
    with pytest.raises(DataError, match=message):
        run(slice_cache(kl, tmp_path / "s", **options))
    assert not (tmp_path / "s").exists()


def test_a_slice_pulled_from_an_address_is_the_slice_of_the_cache(tmp_path, kl):
    kd("cache", "push", kl, f"file://{tmp_path / 'there'}")
    kd("cache", "pull", f"file://{tmp_path / 'there'}", tmp_path / "here", "--top-k", 3, "--examples", "2:9")
    run(slice_cache(kl, tmp_path / "slice", top_k=3, examples=(2, 9)))
    assert load_manifest(tmp_path / "here").fingerprint == load_manifest(tmp_path / "slice").fingerprint
    found, expected = all_rows(tmp_path / "here"), all_rows(tmp_path / "slice")
    assert (found.logprobs == expected.logprobs).all()
    assert (found.token_ids == expected.token_ids).all()
    assert sound(tmp_path / "here")
