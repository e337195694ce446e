"""A merger holds the examples of all its caches, copied to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.upkeep.merge_caches import merge_caches
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheMismatchError, DataError
from kd.common.progress import final


def sound(root: Path) -> bool:
    return final(verify(root)) == ()


def run(steps) -> None:
    for _ in steps:
        pass


@pytest.fixture
def halves(tmp_path, text_file, build_request, run_build) -> tuple[Path, Path]:
    """Two caches of the two halves of the stories."""
    end = "\n<|end|>\n" if "<|end|>" in text_file.read_text() else None
    documents = text_file.read_text().split(end or "\n")
    paths = []
    for name, part in (("a", documents[:4]), ("b", documents[4:])):
        (tmp_path / f"{name}.txt").write_text((end or "\n").join(part))
        run_build(build_request(tmp_path / name, text=tmp_path / f"{name}.txt"))
        paths.append(tmp_path / name)
    return paths[0], paths[1]


def test_a_merger_holds_both_caches_one_after_the_other(tmp_path, halves):
    run(merge_caches(halves, tmp_path / "both"))
    both, parts = CacheReader(tmp_path / "both"), [CacheReader(p) for p in halves]
    assert len(both) == sum(map(len, parts))
    expected = [e for p in parts for e in p.read(range(len(p)))]
    for mine, theirs in zip(both.read(range(len(both))), expected, strict=True):
        assert (mine.id, mine.target) == (theirs.id, theirs.target)
        for name in ("token_ids", "logprobs", "log_z", "gold_ids", "byte_end"):
            assert (getattr(mine.targets, name) == getattr(theirs.targets, name)).all(), name
    for name, value in both.manifest.quality.items():
        assert value == pytest.approx(sum(p.manifest.quality[name] for p in parts), rel=1e-12)
    assert sound(tmp_path / "both")


def test_the_order_of_caches_is_part_of_what_a_merger_is(tmp_path, halves):
    run(merge_caches(halves, tmp_path / "ab"))
    run(merge_caches(halves[::-1], tmp_path / "ba"))
    assert load_manifest(tmp_path / "ab").fingerprint != load_manifest(tmp_path / "ba").fingerprint


def test_caches_of_other_settings_or_twice_the_same_are_refused(tmp_path, kl, halves, build_request, run_build):
    run_build(build_request(tmp_path / "k4", top_k=4))
    with pytest.raises(CacheMismatchError, match="cannot be merged") as caught:
        run(merge_caches([kl, tmp_path / "k4"], tmp_path / "m"))
    assert "differs targets.top_k  8 and 4" in str(caught.value)
    with pytest.raises(DataError, match="two or more different"):
        run(merge_caches([kl, kl], tmp_path / "m"))
    assert not (tmp_path / "m").exists()
