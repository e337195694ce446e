"""Caches whose ids are places in lists of followers: the same rows as any other, whoever builds, cuts, merges or copies them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from kd.cache_builder.share.pull import pull
from kd.cache_builder.store.followers import FOLLOWERS, LISTED
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import Layout
from kd.cache_builder.store.records.part import part_of
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.upkeep.merge_caches import merge_caches
from kd.cache_builder.upkeep.slice_cache import slice_cache
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheDamageError, DataError
from kd.common.progress import final

PROFILES = {"kl": {}, "adaptive": {"top_k": 40, "min_probability": 0.004}}
LAYOUT = Layout(256, 64)


@pytest.fixture(scope="module", params=PROFILES)
def pair(request: pytest.FixtureRequest, tmp_path_factory, build_request, run_build) -> tuple[Path, Path]:
    """`(plain, listed)`: one build with ids as codes, one with ids in lists."""
    folder = tmp_path_factory.mktemp("lists")
    for name in ("frequency", "followers"):
        run_build(
            build_request(folder / name, profile=request.param, id_codec=name, layout=LAYOUT, **PROFILES[request.param])
        )
    return folder / "frequency", folder / "followers"


def all_rows(root: Path) -> SoftTargets:
    reader = CacheReader(root)
    return reader.read_rows(range(len(reader)))


def assert_equal_rows(one: Path, other: Path) -> None:
    a, b = all_rows(one), all_rows(other)
    for name, values in vars(a).items():
        if isinstance(values, np.ndarray):
            np.testing.assert_array_equal(values, getattr(b, name), err_msg=name)
            assert values.dtype == getattr(b, name).dtype


def values_of(root: Path, array: str) -> dict[str, bytes]:
    folder = root / "targets.zarr" / array
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.name != "zarr.json"}


def test_rows_are_those_of_a_plain_cache(pair: tuple[Path, Path]):
    plain, listed = pair
    assert_equal_rows(plain, listed)
    assert final(verify(listed)) == ()
    manifests = [CacheReader(root).manifest for root in pair]
    assert manifests[0].fingerprint != manifests[1].fingerprint
    assert "id_codec" not in manifests[0].identity["targets"]
    assert [a.name for a in manifests[1].arrays if a.name == FOLLOWERS] == [FOLLOWERS]
    record = json.loads((listed / "commits" / "00000.json").read_text())["files"]
    assert f"targets.zarr/{FOLLOWERS}/c.0.0" in record


def test_it_does_list_ids(pair: tuple[Path, Path]):
    """Else every test here would say little: in a shard of 256 rows an id must follow a token four times."""
    import zarr

    group = zarr.open_group(pair[1] / "targets.zarr", mode="r")
    values = np.asarray(group["token_ids"][:])
    assert ((values > 0) & (values < LISTED)).sum() > 20
    assert np.asarray(group[FOLLOWERS][:]).any()


def test_two_builders_write_the_bytes_of_one(pair: tuple[Path, Path], tmp_path: Path, build_request, run_build, tree):
    profile = CacheReader(pair[1]).config.profile
    for number in (2, 1):
        settings = PROFILES[profile] | {"id_codec": "followers"}
        run_build(build_request(tmp_path / "c", profile=profile, shard=(number, 2), layout=LAYOUT, **settings))
    assert len(CacheReader(pair[1]).manifest.shards) > 1
    mine, theirs = tree(tmp_path / "c"), tree(pair[1])
    assert {n for n in mine if not n.endswith("manifest.json")} == {
        n for n in theirs if not n.endswith("manifest.json")
    }
    for array in ("token_ids", FOLLOWERS):
        assert values_of(tmp_path / "c", array) == values_of(pair[1], array)


def test_slices_store_ids_either_way(pair: tuple[Path, Path], tmp_path: Path):
    plain, listed = pair
    final(slice_cache(plain, tmp_path / "to", id_codec="followers"))
    assert_equal_rows(tmp_path / "to", plain)
    for array in ("token_ids", FOLLOWERS):  # the same lists come out, because shards are the same
        assert values_of(tmp_path / "to", array) == values_of(listed, array)
    assert CacheReader(tmp_path / "to").manifest.quality == CacheReader(plain).manifest.quality
    final(slice_cache(listed, tmp_path / "from", id_codec="frequency"))
    assert_equal_rows(tmp_path / "from", plain)
    final(slice_cache(listed, tmp_path / "few", top_k=3, examples=(1, 9)))
    few = CacheReader(tmp_path / "few")
    assert few.config.id_codec == "followers"
    assert few.manifest.targets.top_k == 3
    mine, whole = few[0].targets, CacheReader(plain, top_k=3)[1].targets
    np.testing.assert_array_equal(mine.token_ids, whole.token_ids)


def test_a_merger_has_lists_of_its_own(pair: tuple[Path, Path], tmp_path: Path):
    for name, examples in (("a", (0, 7)), ("b", (7, 12))):
        final(slice_cache(pair[1], tmp_path / name, examples=examples))
    final(merge_caches([tmp_path / "a", tmp_path / "b"], tmp_path / "both"))
    assert final(verify(tmp_path / "both")) == ()
    both, whole = CacheReader(tmp_path / "both"), CacheReader(pair[0])
    for number in range(len(both)):
        np.testing.assert_array_equal(both[number].targets.token_ids, whole[number].targets.token_ids)


def test_a_part_with_ids_holds_the_lists(pair: tuple[Path, Path], tmp_path: Path, serve):
    manifest = CacheReader(pair[1]).manifest
    assert FOLLOWERS in part_of(manifest, arrays=["token_ids"]).arrays
    assert FOLLOWERS not in part_of(manifest, arrays=["logprobs"]).arrays
    final(pull(serve(pair[1]).url, tmp_path / "part", arrays=lambda _: ["token_ids", "logprobs"]))
    assert_equal_rows(tmp_path / "part", pair[0])
    reader = CacheReader(pair[1])
    reader.keep(["gold_ids", "gold_logprob", "gold_rank", "byte_length", "kept", "token_ids"])
    assert reader.shard(0).arrays.keys() >= {"token_ids"}


def test_lists_that_are_lost_are_damage(pair: tuple[Path, Path], tmp_path: Path):
    copied = Path(shutil.copytree(pair[1], tmp_path / "copy"))
    (copied / "targets.zarr" / FOLLOWERS / "c.0.0").unlink()
    with pytest.raises(CacheDamageError):
        CacheReader(copied)[0]


@pytest.mark.parametrize("profile", ["uld", "sampled"])
def test_a_profile_without_ids_refuses_it(profile: str):
    with pytest.raises(DataError, match="keeps no most probable tokens"):
        TargetConfig.of_profile(profile, id_codec="followers")


def test_a_slice_without_ids_has_no_lists(tmp_path: Path, build_request, run_build):
    run_build(build_request(tmp_path / "full", profile="full", samples=2, tail_bands=2, id_codec="followers"))
    final(slice_cache(tmp_path / "full", tmp_path / "uld", profile="uld"))
    assert CacheReader(tmp_path / "uld").config.id_codec == "frequency"
    assert final(verify(tmp_path / "uld")) == ()
