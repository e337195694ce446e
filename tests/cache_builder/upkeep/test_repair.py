"""A repaired cache has the bytes it had, whatever was done to it; what was sound is not touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from terminal import kd

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.opening import open_files
from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.upkeep.cache_registry import places_of
from kd.cache_builder.upkeep.repair import mend, mend_manifest, reopen
from kd.cache_builder.upkeep.verify import verify
from kd.cli import cli
from kd.common.errors import CacheDamageError, CacheError, CacheMismatchError, KdError
from kd.common.progress import final


def findings_of(root: Path) -> tuple:
    return final(verify(root))


def harm(root: Path) -> list[str]:
    """Damage of every kind in shards 0, 1 and 2 and outside of shards; the names of what is touched."""
    (root / "targets.zarr/token_ids/c.0.0").write_bytes(b"")
    (root / "examples/00001.parquet").unlink()
    flip(root / "commits/00002.json")
    flip(root / "vocabulary.parquet")
    (root / "targets.zarr/logprobs/zarr.json").unlink()
    return [
        "targets.zarr/token_ids/c.0.0",
        "examples/00001.parquet",
        "commits/00002.json",
        "vocabulary.parquet",
        "targets.zarr/logprobs/zarr.json",
    ]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.fixture
def damaged(tmp_path: Path, cache: Path) -> Path:
    shutil.copytree(cache, tmp_path / "c")
    return tmp_path / "c"


def test_a_second_copy_mends_everything_and_nothing_else_is_touched(damaged, cache, tree):
    names = harm(damaged)
    times = {p: p.stat().st_mtime_ns for p in damaged.rglob("*") if p.is_file()}
    last = final(mend(damaged, LocalFiles(cache), findings_of(damaged)))
    assert last.failed == ()
    assert sorted(last.mended) == sorted(names)
    assert tree(damaged) == tree(cache)
    untouched = [p for p in times if p.relative_to(damaged).as_posix() not in names]
    assert {p: p.stat().st_mtime_ns for p in untouched} == {p: times[p] for p in untouched}


def test_a_copy_with_other_bytes_mends_nothing(damaged, cache, tmp_path):
    shutil.copytree(cache, tmp_path / "copy")
    for name in harm(damaged):
        (tmp_path / "copy" / name).write_bytes(b"nonsense")
    before = findings_of(damaged)
    last = final(mend(damaged, LocalFiles(tmp_path / "copy"), before))
    assert last.mended == ()
    assert len(last.failed) == 5
    assert findings_of(damaged) == before


@pytest.mark.usefixtures("home")
def test_a_copy_behind_a_url_mends_everything_too(damaged, cache, tree, serve):
    names = harm(damaged)
    last = final(mend(damaged, open_files(serve(cache).url), findings_of(damaged)))
    assert sorted(last.mended) == sorted(names)
    assert tree(damaged) == tree(cache)


@pytest.mark.parametrize("how", ["flip", "empty", "remove"])
def test_an_unreadable_manifest_comes_back_from_a_copy(damaged, cache, tree, how: str):
    path = damaged / "manifest.json"
    {"flip": flip, "empty": lambda p: p.write_bytes(b""), "remove": Path.unlink}[how](path)
    with pytest.raises(CacheDamageError):
        load_manifest(damaged)
    assert mend_manifest(damaged, LocalFiles(cache))
    assert not mend_manifest(damaged, LocalFiles(cache))
    assert tree(damaged) == tree(cache)


def test_the_manifest_of_another_cache_is_refused(damaged, tmp_path, build_request, run_build, tree):
    run_build(build_request(tmp_path / "other"))
    flip(damaged / "manifest.json")
    before = tree(damaged)
    with pytest.raises(CacheMismatchError, match="another cache"):
        mend_manifest(damaged, LocalFiles(tmp_path / "other"))
    assert tree(damaged) == before


def test_reopened_the_build_makes_the_damaged_shards_alone_and_ends_with_the_same_bytes(
    tmp_path, build_request, run_build, tree, monkeypatch
):
    from kd.cache_builder.teacher.teacher_pass import Teacher

    request = build_request(tmp_path / "c")
    run_build(request)
    before = tree(tmp_path / "c")
    harm(tmp_path / "c")
    reopen(tmp_path / "c", findings_of(tmp_path / "c"))
    with pytest.raises(CacheError, match="not complete"):
        CacheReader(tmp_path / "c")
    scored, run = [], Teacher.run
    monkeypatch.setattr(Teacher, "run", lambda self, rows, first: scored.append(first) or run(self, rows, first))
    run_build(request)
    assert scored == [first for first, _, _ in load_manifest(tmp_path / "c").shards[:3]]
    assert tree(tmp_path / "c") == before


@pytest.mark.parametrize("killed_after", [0, 1, 2])
def test_a_repair_killed_while_it_reopens_loses_nothing_and_hides_nothing(
    tmp_path, build_request, run_build, tree, monkeypatch, killed_after: int
):
    from kd.cache_builder.upkeep import repair

    request = build_request(tmp_path / "c")
    run_build(request)
    before = tree(tmp_path / "c")
    (tmp_path / "c" / "examples/00001.parquet").unlink()
    calls = 0

    def deadly(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls > killed_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(repair, "sync_folder", deadly)
        if killed_after < 2:
            with pytest.raises(KeyboardInterrupt):
                reopen(tmp_path / "c", findings_of(tmp_path / "c"))
            if (tmp_path / "c" / "manifest.json").exists():
                assert findings_of(tmp_path / "c")  # a missing commit: still damaged
    if findings_of(tmp_path / "c"):
        reopen(tmp_path / "c", findings_of(tmp_path / "c"))
    list(build(plan_build(request)))
    assert tree(tmp_path / "c") == before


# the command


@pytest.fixture
def built(tmp_path, model_dir, text_file) -> Path:
    out = tmp_path / "built"
    arguments = [
        "cache",
        "build",
        "--teacher",
        str(model_dir),
        f"--data={text_file}",
        "--seq-len",
        "32",
        "--top-k",
        "8",
        "--shard-rows",
        "128",
        "--no-bos",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--profile-build",
    ]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return out


def test_repair_builds_with_the_recorded_options(built, tree):
    assert load_manifest(built).provenance["options"].keys() == {
        "teacher",
        "spec",
        "seq_len",
        "top_k",
        "shard_rows",
        "bos",
        "device",
    }
    before = tree(built)
    harm(built)
    assert CliRunner().invoke(cli, ["cache", "verify", str(built)]).exit_code == 3
    done = CliRunner().invoke(cli, ["cache", "repair", str(built), "--json"], catch_exceptions=False)
    result = json.loads(done.stdout)
    assert done.exit_code == 0
    assert (result["rebuilt_shards"], result["byte_identical"], result["sound"]) == ([0, 1, 2], True, True)
    assert tree(built) == before
    again = CliRunner().invoke(cli, ["cache", "repair", str(built)], catch_exceptions=False)
    assert again.exit_code == 0
    assert "sound" in again.stdout
    assert tree(built) == before


def test_repair_finds_a_teacher_that_moved(built, tree, model_dir, tmp_path):
    before = tree(built)
    manifest = load_manifest(built)
    manifest.provenance["options"]["teacher"] = str(tmp_path / "gone")
    manifest.save(built, "manifest.json")
    (built / "examples/00000.parquet").unlink()
    lost = CliRunner().invoke(cli, ["cache", "repair", str(built)])
    assert isinstance(lost.exception, KdError)
    done = CliRunner().invoke(cli, ["cache", "repair", str(built), "--teacher", str(model_dir)], catch_exceptions=False)
    assert done.exit_code == 0
    assert "shards 0: built again" in done.stdout
    after = tree(built)
    assert {n for n in before if before[n] != after.get(n)} <= {"manifest.json"}


def test_repair_from_a_copy_says_what_it_took(built, tmp_path, tree):
    shutil.copytree(built, tmp_path / "copy")
    harm(built)
    flip(built / "manifest.json")
    done = CliRunner().invoke(
        cli, ["cache", "repair", str(built), "--from", str(tmp_path / "copy")], catch_exceptions=False
    )
    assert done.exit_code == 0
    assert "manifest.json: taken from" in done.stdout
    assert tree(built) == tree(tmp_path / "copy")


def test_a_cache_that_was_not_built_by_the_command_says_what_to_run(damaged):
    (damaged / "examples/00000.parquet").unlink()
    done = CliRunner().invoke(cli, ["cache", "repair", str(damaged)])
    assert isinstance(done.exception, CacheDamageError)
    assert "kd cache build" in str(done.exception)


def test_repair_takes_a_second_copy_from_an_address(tmp_path, kl, tree):
    kd("cache", "push", kl, f"file://{tmp_path / 'there'}")
    kd("cache", "pull", f"file://{tmp_path / 'there'}", tmp_path / "here")
    before = tree(tmp_path / "here")
    (tmp_path / "here" / "examples" / "00000.parquet").write_bytes(b"")
    assert "taken from" in kd("cache", "repair", tmp_path / "here", "--from", f"file://{tmp_path / 'there'}")
    assert tree(tmp_path / "here") == before


def test_the_manifest_holds_no_absolute_path_and_this_machine_remembers_it(built, model_dir, text_file):
    manifest = load_manifest(built)
    assert manifest.provenance["teacher"] == manifest.provenance["options"]["teacher"] == model_dir.name
    assert manifest.provenance["corpus"] == text_file.name
    assert str(model_dir.parent) not in (built / "manifest.json").read_text()
    assert places_of(manifest) == {"teacher": str(model_dir), "spec": str(text_file)}
    manifest.provenance["options"]["teacher"] = "another"
    assert places_of(manifest) == {"spec": str(text_file)}
