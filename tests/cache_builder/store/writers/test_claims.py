"""A shard has one builder; what a dead one held is free, what a live one holds is not, and who that is is said."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from crashing import child

from kd.cache_builder.build.builder import build
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.store.writers import claims
from kd.cache_builder.store.writers.claims import LOCKED, STALE_SECONDS, Claims, all_claims, void_claims
from kd.cache_builder.upkeep.verify import verify
from kd.common.files import process_tag, unfinished
from kd.common.processes import boot_mark
from kd.common.progress import final


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


@pytest.mark.parametrize(("seconds", "held"), [(60, True), (2 * STALE_SECONDS, False), (10**9, False)])
def test_a_claim_from_the_future_holds_no_longer_than_clocks_may_differ(tmp_path, seconds: float, held: bool):
    claim_of(tmp_path, "elsewhere-4026-77-0a1b.0", idle=-seconds)
    assert (Claims(tmp_path).take(0) is not None) == held


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_differs_from_the_file_system_s_makes_no_claim_void(tmp_path, monkeypatch, hours: float):
    claim_of(tmp_path, "elsewhere-4026-77-0a1b.0")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + hours * 3600)
    assert Claims(tmp_path).take(0) == "process 77 on elsewhere"
    void_claims(tmp_path)
    assert [c.void for c in all_claims(tmp_path)] == [None]
    assert [p.name for p in (tmp_path / "commits").iterdir()] == [".00000.claim"]


def test_an_empty_claim_holds_nothing(tmp_path):
    claim_of(tmp_path, "")
    assert [c.void for c in all_claims(tmp_path)] == ["the claim is empty"]
    assert Claims(tmp_path).take(0) is None


def test_what_is_no_claim_is_never_waited_for(tmp_path):
    path = tmp_path / "commits" / ".00000.claim"
    path.parent.mkdir()
    os.mkfifo(path)
    (path.parent / ".notes.claim").write_text("no number")
    (path.parent / ".00002.claim").symlink_to("nowhere")
    voids = {c.shard: c.void for c in all_claims(tmp_path)}
    assert voids == {0: "the claim is a pipe, not a plain file", 2: "the claim is a link that leads nowhere"}
    assert [Claims(tmp_path).take(shard) for shard in voids] == [None, None]


def container_s() -> str:
    """The mark of process 1 in another container of this machine."""
    return f"elsewhere-4026999999-1-{boot_mark()}{123:012x}.0\n{LOCKED}\n"


def test_in_another_container_a_free_lock_says_that_the_builder_has_ended(tmp_path):
    path = claim_of(tmp_path, container_s())
    with path.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert Claims(tmp_path).take(0) == "process 1 on elsewhere"
    assert Claims(tmp_path).take(0) is None


def test_the_lock_of_a_claim_of_another_machine_says_nothing(tmp_path):
    claim_of(tmp_path, container_s().replace(boot_mark(), "00000000"))
    assert Claims(tmp_path).take(0) == "process 1 on elsewhere"


def test_a_later_process_of_the_same_number_is_another(tmp_path):
    here, pid, mark = process_tag().rsplit("-", 2)
    claim_of(tmp_path, f"{here}-{pid}-{mark[:-1]}{(int(mark[-1], 16) + 1) % 16:x}.0")
    assert Claims(tmp_path).take(0) is None


def test_a_full_disk_leaves_no_claim_behind(tmp_path, monkeypatch):
    written = Path.write_text

    def full(path, text, **options):
        written(path, "")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        Claims(tmp_path).take(0)
    assert list((tmp_path / "commits").iterdir()) == []


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
    assert final(verify(tmp_path / "c")) == ()
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


def test_a_builder_that_has_lost_its_claim_publishes_nothing_and_takes_the_shard_again(tmp_path, build_request, tree):
    steps = build(plan_build(build_request(tmp_path / "c")))
    next(steps)  # at shard 0
    path = tmp_path / "c" / "commits" / ".00000.claim"
    path.write_text("elsewhere-4026-77-0a1b.0")
    for step in steps:
        if step.shards_done == 2:
            assert not (tmp_path / "c" / "commits" / "00000.json").exists()
            path.unlink(missing_ok=True)  # its new builder gives up
    assert (step.complete, step.left) == (True, 0)
    assert step.rows_done == step.rows_total
    list(build(plan_build(build_request(tmp_path / "alone"))))
    assert tree(tmp_path / "c") == tree(tmp_path / "alone")


def test_with_wait_the_build_ends_when_the_others_have_ended(tmp_path, build_request, monkeypatch):
    path, looks = claim_of(tmp_path / "c", "elsewhere-4026-77-0a1b.0"), list[float]()

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            path.unlink()

    monkeypatch.setattr(time, "sleep", sleep)
    last = list(build(plan_build(replace(build_request(tmp_path / "c"), wait=True))))[-1]
    assert len(looks) == 3
    assert (last.complete, last.left, last.elsewhere) == (True, 0, {})


def test_builders_that_start_together_and_wait_all_end_with_a_complete_cache(tmp_path, build_request):
    """Without `wait`, all but the last end while shards are left."""

    def wait_for_all() -> None:
        *_, last = build(plan_build(replace(build_request(tmp_path / "c"), wait=True)))
        os._exit(0 if last.complete else 4)

    with ThreadPoolExecutor(4) as pool:
        assert [code for code, _ in pool.map(child, [wait_for_all] * 4)] == [0] * 4
    assert final(verify(tmp_path / "c")) == ()


def test_a_build_goes_around_a_shard_that_a_live_builder_of_another_host_holds(tmp_path, build_request, run_build):
    claim_of(tmp_path / "c", "elsewhere-4026-77-0a1b.0")
    last = run_build(build_request(tmp_path / "c"))[-1]
    assert not last.complete
    assert (last.left, last.elsewhere) == (1, {0: "process 77 on elsewhere"})
    assert last.shards_done == last.shards_total - 1
