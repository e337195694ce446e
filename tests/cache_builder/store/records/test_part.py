"""A part of a cache says what it holds; what it holds is read and verified, what it does not is an error of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.cache_builder.share.pull import pull
from kd.cache_builder.share.push import push
from kd.cache_builder.store import shard_store
from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.store.records.part import ALWAYS, PARTIAL, Part, load_part, part_of, whole
from kd.cache_builder.upkeep.summary import cache_summary
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheDamageError, CacheError, DataError
from kd.common.progress import final
from kd.common.settings import make
from kd.student_trainer.batches.compatibility import needed_arrays, resolve_objective
from kd.student_trainer.configuration.learning_settings import LossSettings

Tree = Callable[[Path], dict[str, bytes]]


def findings(root: Path) -> list[str]:
    return [f.where for f in final(verify(root))]


def test_examples_are_fetched_with_the_shards_that_hold_them_and_no_others(cache: Path, tmp_path: Path, serve):
    server, manifest = serve(cache), load_manifest(cache)
    first, stop, _ = manifest.shards[1]
    last = final(pull(server.url, tmp_path / "part", examples=(first, first + 1)))
    assert last.part == Part((1,), whole(manifest).arrays)
    fetched = {path[1:] for path in server.gets()}
    others = {
        n for i in range(len(manifest.shards)) if i != 1 for n in commits.shard_files(manifest.arrays, i).values()
    }
    assert not fetched & others
    assert findings(tmp_path / "part") == []
    here, there = CacheReader(tmp_path / "part"), CacheReader(cache)
    for example in range(first, stop):
        np.testing.assert_array_equal(here[example].targets.logprobs, there[example].targets.logprobs)
    assert sorted(here.epoch_order(3, 4)) == list(range(first, stop))
    tokens, rows = here.lengths()
    whole_tokens, whole_rows = there.lengths()
    inside = np.arange(first, stop)
    np.testing.assert_array_equal(tokens[inside], whole_tokens[inside])
    np.testing.assert_array_equal(rows[inside], whole_rows[inside])
    assert tokens.sum() == whole_tokens[inside].sum()
    with pytest.raises(CacheError, match="does not hold that shard") as error:
        here[stop]
    assert error.value.exit_code == 1
    assert f"--examples {manifest.shards[2][0]}:{manifest.shards[2][1]}" in str(error.value)


@pytest.mark.parametrize("loss", ["ce", "kl", "uld", "hybrid", "alm"])
def test_arrays_for_a_loss_are_those_it_reads(loss: str, cache: Path, tmp_path: Path, serve):
    server, manifest = serve(cache), load_manifest(cache)
    needed = needed_arrays(resolve_objective(manifest.targets, make(LossSettings, {"loss": loss})), manifest)
    final(pull(server.url, tmp_path / "part", arrays=lambda m: needed))
    for array in {a.name for a in manifest.arrays} - set(needed):
        assert not server.gets(f"{array}/c/")
    assert ("token_ids" in needed) == (loss in ("kl", "hybrid"))
    assert ("tail_bands" in needed) == (loss in ("uld", "hybrid"))
    assert set(needed) & {"sample_ids", "boundary_logprob"} == set()
    assert findings(tmp_path / "part") == []
    here, there = CacheReader(tmp_path / "part")[3].targets, CacheReader(cache)[3].targets
    for name in ("gold_ids", "gold_logprob", "gold_rank", "byte_end"):
        np.testing.assert_array_equal(getattr(here, name), getattr(there, name))
    if "logprobs" in needed:
        np.testing.assert_array_equal(here.log_z, there.log_z)
        np.testing.assert_array_equal(here.logprobs, there.logprobs)
    else:
        assert here.logprobs is None
        with pytest.raises(CacheError, match="does not hold that temperature"):
            here.grid_index(1.0)
    if "token_ids" not in needed:
        with pytest.raises(CacheError, match="does not hold those arrays") as error:
            CacheReader(tmp_path / "part").keep(["gold_ids", "token_ids"])
        assert "--arrays token_ids" in str(error.value)
        with pytest.raises(CacheError, match="does not hold those arrays"):
            shard_store.read_shard(LocalFiles(tmp_path / "part"), manifest, 0, ["token_ids"])


def test_pulling_more_adds_until_it_is_whole(cache: Path, tmp_path: Path, tree: Tree):
    manifest, part = load_manifest(cache), tmp_path / "part"
    first, middle = manifest.shards[0], manifest.shards[2]
    final(pull(str(cache), part, examples=first[:2], arrays=lambda m: []))
    final(pull(str(cache), part, examples=middle[:2]))
    held = load_part(part, manifest)
    assert held == Part((0, 2), whole(manifest).arrays)  # the smallest rectangle that holds both
    assert findings(part) == []
    last = final(pull(str(cache), part))
    assert last.part is None
    assert tree(part) == tree(cache)
    assert final(pull(str(cache), part, examples=(0, 1))).part is None  # a whole copy stays whole


def test_damage_in_a_part_is_damage(cache: Path, tmp_path: Path):
    manifest, part = load_manifest(cache), tmp_path / "part"
    final(pull(str(cache), part, examples=(0, 1), arrays=lambda m: ["logprobs"]))
    files = commits.shard_files(manifest.arrays, 0)
    for name in (files["logprobs"], files["examples"], "commits/00000.json", "vocabulary.parquet"):
        shutil.copytree(part, tmp_path / "copy")
        (tmp_path / "copy" / name).unlink()
        assert findings(tmp_path / "copy")[0] == name
        shutil.rmtree(tmp_path / "copy")
    (part / "targets.zarr" / "stray").write_text("")
    assert findings(part) == ["targets.zarr/stray"]


@pytest.mark.parametrize(
    "change",
    [
        {"shards": [[0, 10**9]]},
        {"shards": [[-1, 1]]},
        {"shards": [[1, 2], [0, 1]]},
        {"shards": [[0, 1], [0, 1]]},
        {"shards": [[False, True]]},
        {"shards": "all"},
        {"arrays": []},
        {"arrays": ["gold_ids", "../x"]},
        {"arrays": 7},
        {"fingerprint": "0"},
        {"format": "other"},
    ],
)
def test_a_list_that_cannot_be_true_is_damage(change: dict[str, Any], cache: Path, tmp_path: Path):
    from kd.common.files import canonical_json, digest_of

    part = tmp_path / "part"
    final(pull(str(cache), part, examples=(0, 1)))
    document = json.loads((part / PARTIAL).read_text()) | change
    document.pop("checksum")
    (part / PARTIAL).write_text(canonical_json(document | {"checksum": digest_of(document)}))
    with pytest.raises(CacheDamageError):
        load_part(part, load_manifest(part))


def test_an_edited_list_is_damage(cache: Path, tmp_path: Path):
    part = tmp_path / "part"
    final(pull(str(cache), part, examples=(0, 1)))
    (part / PARTIAL).write_text((part / PARTIAL).read_text().replace("gold_rank", "gold_rang"))
    for read in (lambda: CacheReader(part), lambda: findings(part), lambda: cache_summary(part)):
        with pytest.raises(CacheDamageError, match="was changed"):
            read()


def test_a_part_is_described_as_one_and_shared_only_as_one(cache: Path, tmp_path: Path, serve):
    part, manifest = tmp_path / "part", load_manifest(cache)
    final(pull(str(cache), part, examples=(0, 1), arrays=lambda m: []))
    summary = cache_summary(part)
    assert (summary["complete"], summary["part_of_a_cache"], summary["shards_committed"]) == (False, True, 1)
    assert summary["array_bytes_per_token"]["token_ids"] is None
    assert summary["array_bytes_per_token"]["gold_ids"] > 0
    with pytest.raises(CacheError, match="only a whole cache"):
        final(push(part, str(tmp_path / "place")))
    with pytest.raises(CacheError, match="a part of a cache"):
        final(push(cache, str(part)))
    again = final(pull(serve(part).url, tmp_path / "again"))
    assert again.part == load_part(part, manifest)
    with pytest.raises(CacheError, match="does not hold all of that"):
        final(pull(str(part), tmp_path / "more", arrays=lambda m: ["token_ids"]))


def test_a_part_that_is_not_in_the_cache_is_refused(cache: Path, tmp_path: Path):
    manifest = load_manifest(cache)
    for examples in ((0, 0), (3, 2), (0, manifest.examples + 1), (-1, 2)):
        with pytest.raises(CacheError, match="not in the cache"):
            part_of(manifest, examples=examples)
    with pytest.raises(DataError, match="unknown array"):
        final(pull(str(cache), tmp_path / "part", arrays=lambda m: ["logprob"]))
    assert not (tmp_path / "part" / "manifest.json").exists()


def test_a_range_takes_every_shard_it_touches_and_what_belongs_together_stays_together(cache: Path):
    """The slow twin asks every shard for every example."""
    manifest = load_manifest(cache)
    for first in range(0, manifest.examples, 3):
        for stop in range(first + 1, manifest.examples + 1, 2):
            wanted = set(range(first, stop))
            slow = tuple(i for i, (a, b, _) in enumerate(manifest.shards) if wanted & set(range(a, b)))
            assert part_of(manifest, examples=(first, stop)).shards == slow
    assert {"logprobs", "tail_odds"} <= set(part_of(manifest, arrays=["tail_odds"]).arrays)
    assert {"sample_ids", "sample_counts"} <= set(part_of(manifest, arrays=["sample_ids"]).arrays)
    assert set(part_of(manifest, arrays=[]).arrays) == ALWAYS & set(whole(manifest).arrays)
