"""A shard has one builder; what a dead one held is free, what a live one holds is not, and who that is is said."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.store.writers import claims
from kd.cache_builder.store.writers.claims import STALE_SECONDS, Claims, void_claims
from kd.cache_builder.upkeep.verify import verify
from kd.common.files import process_tag, unfinished


def claim_of(root: Path, tag: str, idle: float = 0.0) -> Path:
    path = root / "commits" / ".00000.claim"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(tag)
    os.utime(path, (time.time() - idle,) * 2)
    return path


@pytest.fixture
def dead() -> str:
    """The mark of a process of this host that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    host, _, _ = process_tag().rsplit("-", 2)
    return f"{host}-{process.pid}-0a1b.0"


def test_of_two_builders_one_has_the_shard(tmp_path):
    one, two = Claims(tmp_path), Claims(tmp_path)
    assert one.take(0) is None
    assert f"process {os.getpid()}" in str(two.take(0))
    assert two.take(1) is None
    one.release(0)
    assert two.take(0) is None
    two.release_all()
    assert list((tmp_path / "commits").iterdir()) == []


def test_a_dead_process_s_claim_is_taken_over(tmp_path, dead):
    claim_of(tmp_path, dead)
    assert Claims(tmp_path).take(0) is None


def test_another_host_s_claim_holds_until_nobody_touched_it_for_long(tmp_path):
    path = claim_of(tmp_path, "elsewhere-4026-77-0a1b.0", idle=STALE_SECONDS / 2)
    assert "process 77 on elsewhere" in str(Claims(tmp_path).take(0))
    os.utime(path, (time.time() - 2 * STALE_SECONDS,) * 2)
    assert Claims(tmp_path).take(0) is None


def test_a_builder_that_works_keeps_its_claim_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "TOUCH_SECONDS", 0.0)
    mine = Claims(tmp_path)
    mine.take(0)
    path = tmp_path / "commits" / ".00000.claim"
    os.utime(path, (1.0, 1.0))
    mine.touch()
    assert path.stat().st_mtime > 1.0
    path.unlink()
    mine.touch()
    mine.release(0)


def test_what_was_taken_over_is_not_removed_by_who_lost_it(tmp_path):
    slow, fast = Claims(tmp_path), Claims(tmp_path)
    slow.take(0)
    path = tmp_path / "commits" / ".00000.claim"
    os.utime(path, (1.0, 1.0))
    assert fast.take(0) is None
    slow.release_all()
    assert path.read_text().splitlines()[0] == fast.tag


def test_claims_that_nobody_holds_are_tidied_up_and_are_no_damage(tmp_path, dead, build_request, run_build):
    run_build(build_request(tmp_path / "c"))
    path = claim_of(tmp_path / "c", dead)
    assert unfinished(path.name)
    assert list(verify(tmp_path / "c"))[-1].findings == ()
    void_claims(tmp_path / "c")
    assert not path.exists()


def test_builders_side_by_side_share_the_work(tmp_path, build_request, tree):
    plans = [plan_build(build_request(tmp_path / "c")) for _ in range(2)]
    running = [build(plan) for plan in plans]
    last: list[Any] = [None, None]
    for _ in range(200):
        for number, steps in enumerate(running):
            last[number] = next(steps, last[number])
    list(build(plan_build(build_request(tmp_path / "alone"))))
    assert any(step.complete for step in last)
    assert tree(tmp_path / "c") == tree(tmp_path / "alone")


def test_a_build_goes_around_a_shard_that_a_live_builder_of_another_host_holds(tmp_path, build_request, run_build):
    claim_of(tmp_path / "c", "elsewhere-4026-77-0a1b.0")
    last = run_build(build_request(tmp_path / "c"))[-1]
    assert not last.complete
    assert last.elsewhere == {0: "process 77 on elsewhere"}
    assert last.shards_done == last.shards_total - 1
