"""A push that was cut is no cache, the next one continues, and only sound caches are sent."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from servers import Answer

from kd.cache_builder.share.pull import pull
from kd.cache_builder.share.push import push
from kd.cache_builder.share.remotes import FolderRemote
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import load_manifest
from kd.common.errors import CacheDamageError, CacheError
from kd.common.files import process_tag
from kd.common.progress import final

pytestmark = pytest.mark.usefixtures("hasty")
Tree = Callable[[Path], dict[str, bytes]]


@pytest.mark.parametrize("kind", ["s3", "hub"])
def test_a_push_survives_errors_of_the_server(
    kind: str, small: Path, tmp_path: Path, tree: Tree, request: pytest.FixtureRequest
):
    server = request.getfixturevalue(kind)
    url = {"s3": "s3://shared/cache", "hub": "hf://datasets/us/cache"}[kind]

    def fault(path: str, before: int, answer: Answer) -> None:
        if before == 0 and ("/commit/" in path or "PUT" in path or path.startswith(("/shared/cache/t", "/lfs/"))):
            answer.status, answer.body = 500, b""
            answer.headers.clear()

    server.fault = fault
    final(push(small, url))
    server.fault = None
    final(pull(url, tmp_path / "copy"))
    assert tree(tmp_path / "copy") == tree(small)


def test_a_push_that_was_cut_is_no_cache_to_anybody_and_goes_on(cache: Path, tmp_path: Path, tree: Tree, monkeypatch):
    write, written = FolderRemote.write, []

    def dies(self: FolderRemote, root: Path, names: list[str]) -> None:
        if len(written) == 20:
            raise KeyboardInterrupt
        written.extend(names)
        write(self, root, names)

    monkeypatch.setattr(FolderRemote, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        final(push(cache, str(tmp_path / "place"), workers=1))
    monkeypatch.setattr(FolderRemote, "write", write)
    with pytest.raises(CacheError, match="no cache"):
        final(pull(str(tmp_path / "place"), tmp_path / "copy"))
    again = final(push(cache, str(tmp_path / "place")))
    assert 0 < again.bytes_moved < again.bytes_total
    assert tree(tmp_path / "place") == tree(cache)


def test_what_a_killed_push_left_is_removed_by_the_next(cache: Path, tmp_path: Path, tree: Tree):
    here, pid, mark = process_tag().rsplit("-", 2)
    dead = tmp_path / "place" / f".staging-{here}-{pid}-{'0' * len(mark)}" / "examples"
    dead.mkdir(parents=True)
    (dead / "00000.parquet").write_bytes(b"half of it")
    list(push(cache, str(tmp_path / "place")))
    assert tree(tmp_path / "place") == tree(cache)


def test_a_damaged_or_unfinished_cache_is_not_shared(cache: Path, tmp_path: Path, build_request, run_build):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    gold = copy / commits.shard_files(load_manifest(cache).arrays, 0)["gold_ids"]
    gold.write_bytes(gold.read_bytes()[:-1] + b"x")
    with pytest.raises(CacheDamageError, match="was changed"):
        final(push(copy, str(tmp_path / "place")))
    assert not (tmp_path / "place" / "manifest.json").exists()
    run_build(build_request(tmp_path / "some", shard=(1, 2)))
    with pytest.raises(CacheError, match="only a whole cache"):
        final(push(tmp_path / "some", str(tmp_path / "place")))
