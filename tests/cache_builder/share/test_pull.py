"""A pull writes nothing outside its folder, mends a damaged copy, and continues after it was killed."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd.cache_builder.share.pull import STAGING, pull
from kd.cache_builder.share.push import push
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheDamageError, CacheError, CacheMismatchError
from kd.common.progress import final

pytestmark = pytest.mark.usefixtures("hasty")
Tree = Callable[[Path], dict[str, bytes]]


def findings(root: Path) -> list[str]:
    return [f"{f.where}: {f.problem}" for f in final(verify(root))]


def rewritten(cache: Path, folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose manifest was changed by somebody who can compute its checksum."""
    from kd.common.files import canonical_json, digest_of

    shutil.copytree(cache, folder)
    document = json.loads((folder / "manifest.json").read_text())
    document.pop("checksum")
    change(document)
    (folder / "manifest.json").write_text(canonical_json(document | {"checksum": digest_of(document)}))
    return folder


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", "a/../../escaped", "..\\escaped", "a//b"])
def test_a_name_that_leaves_the_directory_is_refused_before_anything_is_fetched(
    name: str, cache: Path, tmp_path: Path, serve
):
    def change(document: dict[str, Any]) -> None:
        document["files"][name] = {"bytes": 3, "sha256": "0" * 64}

    server = serve(rewritten(cache, tmp_path / "hostile", change))
    with pytest.raises(CacheDamageError, match="contradicts itself"):
        final(pull(server.url, tmp_path / "deep" / "copy"))
    assert [path for path in server.gets() if "manifest" not in path and "partial" not in path] == []
    assert not list(tmp_path.rglob("escaped"))


def test_what_cannot_fit_is_refused_before_it_is_fetched(cache: Path, tmp_path: Path, serve, monkeypatch):
    server = serve(cache)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CacheError, match="too small"):
        final(pull(server.url, tmp_path / "copy"))
    assert not server.gets("gold_ids/c")


def test_a_pull_mends_a_damaged_copy(cache: Path, tmp_path: Path, tree: Tree):
    copy = tmp_path / "copy"
    shutil.copytree(cache, copy)
    gold = copy / commits.shard_files(load_manifest(cache).arrays, 0)["gold_ids"]
    gold.write_bytes(gold.read_bytes()[:-1] + b"x")
    (copy / "commits" / "00001.json").unlink()
    (copy / "vocabulary.parquet").write_bytes(b"")
    assert len(findings(copy)) >= 3
    last = final(pull(str(cache), copy))
    assert tree(copy) == tree(cache)
    assert last.files == 3


def test_another_cache_is_not_overwritten(cache: Path, tmp_path: Path, build_request, run_build, tree: Tree):
    run_build(build_request(tmp_path / "other"))
    before = tree(tmp_path / "other")
    with pytest.raises(CacheMismatchError, match="another cache is there") as error:
        final(pull(str(cache), tmp_path / "other"))
    assert "differs targets.profile" in error.value.details
    assert tree(tmp_path / "other") == before or STAGING in {p.name for p in (tmp_path / "other").iterdir()}
    with pytest.raises(CacheMismatchError, match="another cache is there"):
        final(push(cache, str(tmp_path / "other")))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("…")
    with pytest.raises(CacheError, match="not empty"):
        final(pull(str(cache), tmp_path / "mine"))


def test_two_pulls_into_one_directory_are_refused(cache: Path, tmp_path: Path, tree: Tree, serve):
    first = pull(serve(cache).url, tmp_path / "copy")
    next(first)
    with pytest.raises(CacheError, match="another pull"):
        next(pull(str(cache), tmp_path / "copy"))
    final(first)
    assert tree(tmp_path / "copy") == tree(cache)


@pytest.mark.slow
def test_a_pull_that_is_killed_again_and_again_ends_with_the_same_bytes(cache: Path, tmp_path: Path, tree: Tree, serve):
    server, copy = serve(cache), tmp_path / "copy"
    server.fault = lambda path, before, answer: setattr(answer, "pause", 0.02)
    program = (
        f"from kd.cache_builder.share.pull import pull\nfor _ in pull({server.url!r}, {str(copy)!r}, workers=2): pass"
    )
    killed = 0
    for moment in (0.2, 0.5, 0.9, 1.4, 2.0, 2.7):  # seconds after the first bytes
        before = server.sent
        process = subprocess.Popen([sys.executable, "-c", program])
        while server.sent == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        process.kill()
        killed += process.wait() == -signal.SIGKILL
    assert killed >= 3
    server.fault = None
    final(pull(server.url, copy))
    assert tree(copy) == tree(cache)
