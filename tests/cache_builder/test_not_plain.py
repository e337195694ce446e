"""A pipe, a device, a folder or a link in the place of any file of a cache: an error in words, at once, from every command."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from crashing import child
from hostile import NOT_PLAIN, a_link_to_the_same_bytes_elsewhere

from kd.cache_builder.share.pull import pull
from kd.cache_builder.share.push import push
from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.cache_tables import TABLES
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.upkeep.cache_registry import listing
from kd.cache_builder.upkeep.repair import mend, mend_manifest
from kd.cache_builder.upkeep.slice_cache import slice_cache
from kd.cache_builder.upkeep.summary import cache_summary
from kd.cache_builder.upkeep.verify import verify
from kd.common.errors import CacheDamageError, CacheError, KdError
from kd.common.progress import final

SECONDS = 20
"""Most time for all commands on one damaged cache; each takes a tenth of a second."""


def read_all(root: Path) -> None:
    reader = CacheReader(root)
    reader.vocabulary()
    reader.lengths()
    reader.read(range(len(reader)))


def refuses(action: Callable[[], object]) -> bool:
    """True where an action ends with an error of ours. Another exception fails the test."""
    try:
        action()
    except KdError:
        return True
    return False


def every_command(root: Path, name: str, work: Path) -> None:
    """Run every command that reads a cache over one with something else at `name`."""
    signal.alarm(SECONDS)
    work.mkdir()
    assert refuses(lambda: read_all(root)), "read"
    try:
        found = {finding.where for finding in final(verify(root))}
        assert name in found, f"verify names {found}"
    except CacheError:
        assert name in ("manifest.json", *TABLES), "verify"
    assert refuses(lambda: list(push(root, str(work / "pushed")))), "push"
    assert not (work / "pushed" / "manifest.json").exists()
    assert refuses(lambda: list(pull(str(root), work / "pulled"))), "pull"
    assert not (work / "pulled" / "manifest.json").exists()
    for action in (lambda: cache_summary(root), lambda: listing(root), lambda: list(slice_cache(root, work / "slice"))):
        refuses(action)  # some need only part of the files


def files_of(root: Path) -> list[str]:
    return sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())


@pytest.mark.parametrize("make", NOT_PLAIN, ids=lambda make: make.__name__)
def test_every_file_of_a_cache(make: Callable[[Path], None], small: Path, tmp_path: Path):
    for number, name in enumerate(files_of(small)):
        root = tmp_path / f"c{number}"
        shutil.copytree(small, root)
        make(root / name)
        assert child(partial(every_command, root, name, root.with_suffix(".work"))) == (0, ""), name


@pytest.mark.parametrize("make", NOT_PLAIN, ids=lambda make: make.__name__)
def test_the_list_of_a_part(make: Callable[[Path], None], small: Path, tmp_path: Path):
    def act() -> None:
        signal.alarm(SECONDS)
        list(pull(str(small), tmp_path / "c", arrays=lambda manifest: []))
        make(tmp_path / "c" / "partial.json")
        assert refuses(lambda: read_all(tmp_path / "c"))
        assert refuses(lambda: list(verify(tmp_path / "c")))
        assert refuses(lambda: list(pull(str(tmp_path / "c"), tmp_path / "copy")))

    assert child(act) == (0, "")


def test_a_pull_replaces_what_is_no_file_and_writes_nothing_outside(small: Path, tmp_path: Path, tree):
    root = tmp_path / "c"
    shutil.copytree(small, root)
    names = ["manifest.json", "commits/00000.json", "targets.zarr/gold_ids/c.0", "vocabulary.parquet"]
    for name in names:
        a_link_to_the_same_bytes_elsewhere(root / name)
    outside = {name: (root / name).readlink() for name in names}
    before = {name: path.read_bytes() for name, path in outside.items()}
    list(pull(str(small), root))
    assert tree(root) == tree(small)
    assert not any((root / name).is_symlink() for name in names)
    assert {name: path.read_bytes() for name, path in outside.items()} == before


@pytest.mark.parametrize("name", ["commits", "examples", "targets.zarr/gold_ids", ".staging-pull"])
def test_a_folder_that_leads_elsewhere_is_not_written_to(name: str, small: Path, tmp_path: Path):
    root, elsewhere = tmp_path / "c", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (root / name).parent.mkdir(parents=True)
    (root / name).symlink_to(elsewhere)
    with pytest.raises(CacheError, match="leaves it"):
        list(pull(str(small), root))
    assert list(elsewhere.iterdir()) == []


def test_a_pipe_among_the_files_of_an_earlier_pull_is_refused(small: Path, tmp_path: Path):
    (tmp_path / "c" / ".staging-pull").mkdir(parents=True)
    os.mkfifo(tmp_path / "c" / ".staging-pull" / "vocabulary.parquet")
    signal.alarm(SECONDS)
    with pytest.raises(CacheError, match="no pull has left"):
        list(pull(str(small), tmp_path / "c"))
    signal.alarm(0)


@pytest.fixture
def mended(small: Path, tmp_path: Path) -> Path:
    shutil.copytree(small, tmp_path / "c")
    return tmp_path / "c"


def test_repair_replaces_a_link_by_the_file(mended: Path, small: Path, tree):
    for name in ("commits/00000.json", "targets.zarr/gold_ids/c.0"):
        a_link_to_the_same_bytes_elsewhere(mended / name)
    findings = final(verify(mended))
    last = final(mend(mended, LocalFiles(small), findings))
    assert last.failed == ()
    assert tree(mended) == tree(small)
    a_link_to_the_same_bytes_elsewhere(mended / "manifest.json")
    with pytest.raises(CacheDamageError):
        load_manifest(mended)
    assert mend_manifest(mended, LocalFiles(small))
    assert final(verify(mended)) == ()
