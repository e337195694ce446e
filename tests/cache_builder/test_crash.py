"""Whatever stops a build, wherever it stops it: what is left is resumed to the bytes of an unbroken build.

Every build runs in a forked child. An audit hook counts what the child does to the cache's directory (open for writing,
rename, link, remove, make a folder); at the n-th of these it dies, or the operation fails. That reaches every
place between staging, publishing, committing and tidying up; SIGKILL at random moments reaches those between.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from crashing import child, dies_at, fails_at, killed_at_moment, operations, some_of, watch

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.upkeep.verify import verify
from kd.common.progress import final


def run(request: BuildRequest) -> None:
    for _ in build(plan_build(request)):
        pass


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, build_request, tree) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("unbroken") / "c"
    assert child(lambda: run(build_request(out))) == (0, "")
    return tree(out)


@pytest.fixture
def resumes(build_request, tree, unbroken):
    """Asserts that what is left is sound, and that the same command ends with the unbroken bytes and nothing else."""

    def check(out: Path) -> None:
        if any((out / name).exists() for name in ("manifest.json", "building.json")):
            assert final(verify(out)) == ()
        assert child(lambda: run(build_request(out))) == (0, "")
        found = tree(out)
        assert sorted(n for n in found.keys() | unbroken.keys() if found.get(n) != unbroken.get(n)) == []

    return check


def kill_at_operations(tmp_path: Path, build_request, resumes, few: int | None) -> int:
    total = operations(lambda: run(build_request(tmp_path / "counted")), tmp_path / "counted")
    assert total > 60  # staging, publishing and committing five shards of ten files
    for number in some_of(total, few):
        out = tmp_path / f"k{number}"

        def doomed(out: Path = out, number: int = number) -> None:
            watch(out, dies_at(number))
            run(build_request(out))

        assert child(doomed)[0] == -signal.SIGKILL, number
        resumes(out)
        shutil.rmtree(out)
    return total


def kill_at_moments(tmp_path: Path, build_request, resumes, wanted: int) -> None:
    """SIGKILL at random moments of builds, and of what continues them, until it has hit `wanted` times."""
    started = time.monotonic()
    assert child(lambda: run(build_request(tmp_path / "timed"))) == (0, "")
    length = time.monotonic() - started
    dice, hits = random.Random(0), 0
    for number in range(20 * wanted):
        out = tmp_path / f"m{number}"
        for _ in range(4):
            hits += killed_at_moment(partial(run, build_request(out)), dice.uniform(0.0, length))
            if (out / "manifest.json").exists():
                break
        resumes(out)
        shutil.rmtree(out)
        if hits >= wanted:
            return
    raise AssertionError(f"only {hits} of {20 * wanted} kills hit a build of {length:.2f} s")


def test_a_build_killed_before_any_of_its_operations_resumes_to_the_same_bytes(tmp_path, build_request, resumes):
    kill_at_operations(tmp_path, build_request, resumes, few=6)


def test_a_build_killed_at_random_moments_again_and_again_resumes_to_the_same_bytes(tmp_path, build_request, resumes):
    kill_at_moments(tmp_path, build_request, resumes, wanted=3)


@pytest.mark.slow
def test_killed_everywhere(tmp_path, build_request, resumes):
    """Every operation of a build in turn, then a hundred random moments."""
    assert kill_at_operations(tmp_path, build_request, resumes, few=None) >= 100
    kill_at_moments(tmp_path, build_request, resumes, wanted=100)


def fail_at_operations(tmp_path: Path, build_request, resumes, few: int | None) -> None:
    total = operations(lambda: run(build_request(tmp_path / "counted")), tmp_path / "counted")
    for number in some_of(total, few):
        out = tmp_path / f"e{number}"

        def failing(out: Path = out, number: int = number) -> None:
            watch(out, fails_at(number))
            run(build_request(out))

        code, text = child(failing)
        assert (code, text) == (0, "") or (code == 1 and "cannot write the cache" in text), (number, code, text)
        assert "it continues" in text or code == 0
        resumes(out)
        shutil.rmtree(out)


def test_an_input_output_error_at_any_operation_is_a_clear_error_and_loses_nothing(tmp_path, build_request, resumes):
    fail_at_operations(tmp_path, build_request, resumes, few=8)


@pytest.mark.slow
def test_an_input_output_error_everywhere(tmp_path, build_request, resumes):
    fail_at_operations(tmp_path, build_request, resumes, few=None)


@pytest.mark.parametrize("kilobytes", [16, 60, 100, 140])
def test_a_full_disk_is_a_clear_error_and_loses_nothing(mounted, tmp_path, build_request, resumes, kilobytes: int):
    out = mounted(f"size={kilobytes}k") / "c"
    code, text = child(lambda: run(build_request(out)))
    assert code == 1, text
    assert "the disk is full" in text
    assert "it continues" in text
    shutil.copytree(out, tmp_path / "larger")
    resumes(tmp_path / "larger")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not write")
def test_a_directory_one_may_not_write_is_a_clear_error(tmp_path, build_request):
    def somebody() -> None:
        os.setuid(65534)
        for _ in build(plan):
            pass

    plan = plan_build(build_request(tmp_path / "locked" / "c"))
    code, text = child(somebody)
    assert code == 1, text
    assert "cannot write the cache" in text
    assert "Permission denied" in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_build_cleanly(tmp_path, model_dir, text_file, number: signal.Signals):
    """Exit code 130, nothing staged or claimed is left, and the same command finishes."""
    out = tmp_path / "c"
    command = [
        "kd",
        "cache",
        "build",
        "--teacher",
        str(model_dir),
        "--data",
        str(text_file),
        "--seq-len",
        "32",
        "--top-k",
        "8",
        "--shard-rows",
        "128",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]

    def cli(interrupted: bool) -> Callable[[], None]:
        def action() -> None:
            from kd.cli import main

            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born ignoring it
            if interrupted:
                watch(out, lambda n: os.kill(os.getpid(), number) if n == 40 else None)
            sys.argv = command
            main()

        return action

    assert child(cli(interrupted=True))[0] == 130
    assert list(out.glob(".staging*")) == list((out / "commits").glob(".*")) == []
    assert not (out / "manifest.json").exists()
    assert child(cli(interrupted=False))[0] == 0
    assert final(verify(out)) == ()
