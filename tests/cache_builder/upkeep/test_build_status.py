"""The status of a build: counts from commits and claims, a speed that is that of the work, and an end that follows from it."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from kd.cache_builder.store.records.commits import commit_path
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.store.writers import claims
from kd.cache_builder.store.writers.claims import Claims, claim_path
from kd.cache_builder.upkeep.build_status import BuildStatus, build_status
from kd.cli import cli
from kd.commands.cache_builders import span, status_lines
from kd.common.errors import CacheError


@pytest.fixture(scope="module")
def half_built(tmp_path_factory, build_request, run_build) -> Path:
    """A build of five shards, of which the first, third and fifth are committed."""
    out = tmp_path_factory.mktemp("half") / "c"
    run_build(build_request(out, shard=(1, 2)))
    return out


@pytest.fixture
def half(half_built: Path, tmp_path: Path) -> Path:
    shutil.copytree(half_built, tmp_path / "c")
    return tmp_path / "c"


def committed_at(root: Path, *ages: float) -> None:
    for index, age in zip((0, 2, 4), ages, strict=True):
        os.utime(commit_path(root, index), (time.time() - age,) * 2)


def test_a_build_that_nobody_continues_is_stopped(half: Path) -> None:
    status = build_status(half)
    assert (status.state, status.shards, status.shards_total, status.holders) == ("stopped", 3, 5, ())
    assert status.rows < status.rows_total
    assert status.rows_per_second is None
    assert status.seconds_left is None
    assert status.bytes_expected is not None
    assert status.bytes_expected > status.bytes


def test_a_finished_cache_says_so_also_where_nothing_may_be_written(half: Path, build_request, run_build) -> None:
    run_build(build_request(half))
    (half / "commits").chmod(0o500)
    status = build_status(half)
    assert (status.state, status.rows, status.shards) == ("finished", status.rows_total, 5)
    assert status.holders == ()
    assert status.last_commit_seconds is not None


def test_who_holds_what_is_said_with_rows_and_times(half: Path, monkeypatch) -> None:
    monkeypatch.setattr(claims, "TOUCH_SECONDS", 0.0)
    mine = Claims(half)
    assert mine.take(1) is None
    mine.touch(1, 40)
    claim_path(half / "commits", 3).write_text("")
    status = build_status(half)
    assert status.state == "running"
    one, other = status.holders
    assert (one.shard, one.rows, one.void) == (1, 40, None)
    assert f"process {os.getpid()}" in one.builder
    assert one.held_seconds is not None
    assert one.held_seconds < 60
    assert (other.shard, other.rows, other.void) == (3, 0, "the claim is empty")
    assert status.rows_under_way == 40
    mine.release_all()


def test_the_speed_is_that_of_the_last_commits(half: Path) -> None:
    mine = Claims(half)
    assert mine.take(1) is None
    committed_at(half, 120.0, 80.0, 40.0)
    status = build_status(half)
    assert status.measured_seconds == pytest.approx(120, abs=10)
    rows = status.rows - load_manifest(half).shards[0][2]  # the first commit begins the time
    assert status.rows_per_second == pytest.approx(rows / 120, rel=0.15)
    assert status.seconds_left == pytest.approx((status.rows_total - status.rows) / status.rows_per_second)
    committed_at(half, 7200.0, 7100.0, 40.0)  # a night lies between: it is no part of the work
    status = build_status(half)
    assert status.rows_per_second is None
    mine.release_all()


def test_before_there_are_commits_the_speed_is_that_of_the_shards_under_way(half: Path, monkeypatch) -> None:
    monkeypatch.setattr(claims, "TOUCH_SECONDS", 0.0)
    committed_at(half, 7200.0, 7200.0, 7200.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 100)
    mine = Claims(half)
    assert mine.take(1) is None
    monkeypatch.undo()
    monkeypatch.setattr(claims, "TOUCH_SECONDS", 0.0)
    mine.touch(1, 50)
    status = build_status(half)
    assert status.rows_per_second == pytest.approx(0.5, rel=0.1)
    assert status.measured_seconds == pytest.approx(100, abs=10)
    mine.release_all()


def test_a_folder_without_a_build_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="not a cache"):
        build_status(tmp_path)


def test_people_and_programs_are_told_the_same(half: Path) -> None:
    done = CliRunner().invoke(cli, ["cache", "status", str(half)])
    assert done.exit_code == 0, done.output
    assert "stopped: no builder holds a shard. The same kd cache build command continues" in done.stdout
    assert "3 of 5" in done.stdout
    document = CliRunner().invoke(cli, ["cache", "status", str(half), "--json", "--watch", "1"])  # nothing to watch
    assert '"state": "stopped"' in document.stdout


def test_a_running_build_in_lines(half: Path) -> None:
    from datetime import datetime

    status = replace(
        build_status(half), state="running", rows_per_second=2.0, measured_seconds=90.0, seconds_left=7380.0
    )
    text = "\n".join(status_lines(half, status, datetime(2030, 1, 1, 12, 0)))
    assert "2 rows/s over the last 1 min 30 s" in text
    assert "2030-01-01 14:03, in 2 h 3 min" in text
    unknown: BuildStatus = replace(status, rows_per_second=None, seconds_left=None)
    assert "\n".join(status_lines(half, unknown, datetime.now())).count("not known yet") == 2


def test_spans_have_two_units() -> None:
    assert [span(s) for s in (0.4, 59, 60, 3661, 90061)] == ["0 s", "59 s", "1 min 0 s", "1 h 1 min", "1 d 1 h"]
