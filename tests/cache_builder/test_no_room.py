"""Where a disk has no room, no inodes, a limit of file sizes, or may not be written: an error of ours, and nothing is lost.

Every way to write a cache (build, slice, merge, push, pull, repair) runs in a forked child on such a disk, and then on one
that has room.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from crashing import child

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.share.pull import pull
from kd.cache_builder.share.push import push
from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.upkeep.merge_caches import merge_caches
from kd.cache_builder.upkeep.repair import mend, reopen
from kd.cache_builder.upkeep.slice_cache import slice_cache
from kd.cache_builder.upkeep.verify import verify
from kd.common.progress import final

LIMITS = {
    "full": ("size=60k", "the disk is full"),
    "no inodes": ("nr_inodes=12", "the file system can hold no more files"),
    "read-only": ("ro", "cannot write the cache"),
    "file size": ("", "a file would be larger than is allowed here"),
}
"""Kind of limit -> how tmpfs is mounted, and the beginning of the error."""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, build_request) -> dict[str, Path]:
    """Two finished caches."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "other.txt").write_text("It rained for a day and a night. " * 20)
    requests = {
        "one": build_request(folder / "one"),
        "two": build_request(folder / "two", text=folder / "other.txt"),
    }
    for request in requests.values():
        list(build(plan_build(request)))
    return {name: request.out for name, request in requests.items()}


@pytest.fixture
def ways(sources: dict[str, Path], build_request) -> dict[str, Callable[[Path], object]]:
    """Name -> a function that writes a cache to a folder."""
    one, two = sources["one"], sources["two"]

    def repair(out: Path) -> None:
        findings = final(verify(out))
        list(mend(out, LocalFiles(one), findings))

    return {
        "build": lambda out: list(build(plan_build(build_request(out)))),
        "slice": lambda out: list(slice_cache(one, out, top_k=4)),
        "merge": lambda out: list(merge_caches([one, two], out)),
        "push": lambda out: list(push(one, str(out))),
        "pull": lambda out: list(pull(str(one), out)),
        "repair": repair,
    }


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("way", ["build", "slice", "merge", "push", "pull", "repair"])
def test_no_room_is_a_clear_error_and_the_same_call_continues(
    way: str, limit: str, ways, mounted, sources, tmp_path: Path
):
    options, headline = LIMITS[limit]
    disk = mounted(options.replace("ro", ""))
    out = disk / "c"
    if way == "repair":
        if limit in ("full", "no inodes"):
            pytest.skip("a damaged cache does not fit either")
        shutil.copytree(sources["one"], out)
        (out / "vocabulary.parquet").unlink()
    if limit == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)

    def limited() -> None:
        if limit == "file size":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        ways[way](out)

    code, text = child(limited)
    assert code == 1, text
    assert text.startswith(headline), text
    if out.exists():
        shutil.copytree(out, tmp_path / "c")
    assert child(lambda: ways[way](tmp_path / "c")) == (0, "")
    assert final(verify(tmp_path / "c")) == ()
    assert list((tmp_path / "c").rglob(".*")) == []


def test_a_repair_that_may_not_write_says_so(mounted, sources):
    disk = mounted("")
    shutil.copytree(sources["one"], disk / "c")
    (disk / "c" / "examples" / "00000.parquet").unlink()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    findings = final(verify(disk / "c"))
    code, text = child(lambda: reopen(disk / "c", findings))
    assert (code, text.splitlines()[0]) == (1, "cannot write the cache")
    assert os.path.exists(disk / "c" / "manifest.json")
