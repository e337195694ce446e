"""Several builders at once: the same bytes as one, a failure told by its own message, a death by its exit code."""

from __future__ import annotations

import multiprocessing.process
import os
import signal
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from kd.cache_builder.build.builder import BuildProgress
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.build.together import engines, local_engine
from kd.cache_builder.build.together.engines import ENGINES, BuildState, build_together
from kd.cache_builder.build.together.jobs import Job, Lost
from kd.cache_builder.build.together.local_engine import local_jobs
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.writers import claims
from kd.cache_builder.store.writers.claims import all_claims
from kd.common.errors import CacheError, DataError, TeacherError
from kd.models.tokenizer import load_tokenizer


@pytest.mark.parametrize("engine", ENGINES)
def test_two_builders_write_the_bytes_of_one(engine: str, tmp_path: Path, build_request, run_build, tree) -> None:
    if engine == "ray":
        pytest.importorskip("ray", reason="Ray is not installed (pip install ray)")
    plan = plan_build(build_request(tmp_path / "two"))
    steps = list(build_together(plan, workers=2, engine=engine))
    assert [s.rows_done for s in steps] == sorted(s.rows_done for s in steps)
    last = steps[-1]
    assert last.complete
    assert not last.reused
    assert last.shards_done == last.shards_total == len(plan.manifest.shards)
    assert last.rows_done == plan.manifest.rows
    assert last.seconds is not None
    assert last.seconds["forward"] > 0
    run_build(build_request(tmp_path / "one"))
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    *_, again = build_together(plan, workers=2, engine="local")
    assert again.complete
    assert again.reused


def test_a_builder_s_error_is_told_as_it_is(tmp_path: Path, build_request, model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    model.transformer.wpe.weight.data[20] = float("nan")
    model.save_pretrained(tmp_path / "teacher")
    load_tokenizer(str(model_dir)).save_pretrained(tmp_path / "teacher")
    plan = plan_build(build_request(tmp_path / "c", model=tmp_path / "teacher"))
    with pytest.raises(TeacherError, match="not finite"):
        list(build_together(plan, workers=2))
    assert not (tmp_path / "c" / "manifest.json").exists()


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look at builders that are killed without a pause."""
    monkeypatch.setattr(engines, "POLL_SECONDS", 0.05)


def kill_holder(out: Path, killed: list[int], steps) -> BuildProgress:
    """Drive a build, and kill with SIGKILL the builder of the first claim that is seen."""
    records = []
    for record in steps:
        records.append(record)
        for claim in all_claims(out):
            pid = int(claim.builder.split()[1])
            if not killed and claim.void is None:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
    return records[-1]


def test_a_builder_killed_in_a_shard_is_started_again_and_the_bytes_are_those_of_one(
    tmp_path: Path, build_request, run_build, tree, small_steps
) -> None:
    out, killed, said = tmp_path / "c", list[int](), list[str]()
    steps = build_together(plan_build(build_request(out)), workers=2, say=said.append)
    last = kill_holder(out, killed, steps)
    assert len(killed) == 1
    assert (last.complete, last.left, last.restarted) == (True, 0, 1)
    assert "at shard" in said[0]
    assert "SIGKILL" in said[0]
    assert "Another takes its place (start 1 of at most 3)" in said[0]
    run_build(build_request(tmp_path / "one"))
    assert tree(out) == tree(tmp_path / "one")


def test_builders_that_die_every_time_end_the_build_with_what_they_died_of(
    tmp_path: Path, build_request, monkeypatch, small_steps
) -> None:
    request = build_request(tmp_path / "c")
    processes: list[int] = []
    original = multiprocessing.get_context("spawn").Process.start

    def start(process) -> None:
        original(process)
        processes.append(process.pid)
        os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", start)
    with pytest.raises(CacheError, match="the builders were lost") as caught:
        list(build_together(plan_build(request), workers=2, restarts=1))
    assert len(processes) == 4
    assert str(caught.value.details["found"]).count("exit code -9 (SIGKILL, as when memory runs out)") == 4
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


class ByHand:
    """A crew of one builder, which does a third of the shards between two looks and answers `after` the third look."""

    may_queue = False

    def __init__(self, request, run_build, parts: int = 3) -> None:
        self.jobs = [Job(request, None)]
        self.run_build, self.parts, self.started = run_build, iter(range(1, parts + 1)), list[Job]()

    def start(self, job: Job) -> None:
        self.started.append(job)

    def poll(self, seconds: float) -> list:
        part = next(self.parts, None)
        if part is None:
            *_, last = self.run_build(self.jobs[0].request)
            return [(self.started[-1], last)]
        self.run_build(replace(self.jobs[0].request, shard=(part, 3)))
        return []


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch):
    """`by_hand(crew)` makes the engine "by hand" of it."""

    def engine_of(crew) -> str:
        monkeypatch.setitem(ENGINES, "by hand", contextmanager(lambda request, workers: iter([crew])))
        return "by hand"

    return engine_of


def test_progress_follows_the_commits(tmp_path: Path, build_request, run_build, by_hand) -> None:
    request = build_request(tmp_path / "c")
    plan = plan_build(request)
    steps = list(build_together(plan, workers=1, engine=by_hand(ByHand(request, run_build))))
    done = [0, *(step.shards_done for step in steps)]
    assert done == sorted(done)
    assert done[-1] == len(plan.manifest.shards) == len(commits.committed(tmp_path / "c", len(plan.manifest.shards)))
    assert len(set(done)) == 4
    assert steps[-1].tokens_per_second > 0


def test_progress_counts_the_rows_of_shards_that_builders_are_at(tmp_path: Path, build_request, monkeypatch) -> None:
    monkeypatch.setattr(claims, "TOUCH_SECONDS", 0.0)
    plan = plan_build(build_request(tmp_path / "c"))
    sizes = [rows for _, _, rows in plan.manifest.shards]
    state = BuildState(plan.request, sizes)
    mine = claims.Claims(tmp_path / "c")
    assert mine.take(1) is None
    mine.touch(1, 50)
    assert (state.progress().rows_done, state.progress().shards_done) == (50, 0)
    assert BuildState(replace(plan.request, shard=(1, 2)), sizes).progress().rows_done == 0  # another part's
    mine.release_all()
    assert state.progress().rows_done == 0


def test_the_others_do_the_work_of_a_builder_that_is_not_started_again(
    tmp_path: Path, build_request, run_build, by_hand
) -> None:
    """Its claim, here of another machine that still seems to live, is removed at once."""
    request, said = build_request(tmp_path / "c"), list[str]()

    class Crew(ByHand):
        def poll(self, seconds: float) -> list:
            if len(self.started) > 2:
                *_, last = self.run_build(self.started[-1].request)
                return [(self.started[-1], last)]
            one, two = self.started
            theirs = claims.Claims(request.out, two.request.builder)
            theirs.tag = "elsewhere-4026-77-0a1b.0"
            assert theirs.take(1) is None
            *_, last = self.run_build(one.request)
            assert (last.left, set(last.elsewhere)) == (1, {1})
            return [(one, last), (two, Lost("its node is gone"))]

    crew = Crew(request, run_build)
    crew.jobs = [Job(request, None, number=1), Job(request, None, number=2)]
    *_, last = build_together(plan_build(request), workers=2, engine=by_hand(crew), restarts=0, say=said.append)
    assert (last.complete, last.left, last.restarted, len(crew.started)) == (True, 0, 0, 3)
    assert said == ["builder 2 was lost at shard 1: its node is gone. The others do its work"]


def test_what_builders_elsewhere_hold_is_left_to_them(tmp_path: Path, build_request, run_build, by_hand) -> None:
    request = build_request(tmp_path / "c")
    theirs = claims.Claims(request.out)
    theirs.tag = "elsewhere-4026-77-0a1b.0"
    assert theirs.take(1) is None
    *_, last = build_together(plan_build(request), workers=1, engine=by_hand(ByHand(request, run_build, parts=0)))
    assert (last.complete, last.left, set(last.elsewhere)) == (False, 1, {1})


def test_a_builder_killed_between_the_last_commit_and_the_manifest_is_replaced(
    tmp_path: Path, build_request, run_build, by_hand
) -> None:
    request = build_request(tmp_path / "c")

    class Crew(ByHand):
        def poll(self, seconds: float) -> list:
            if len(self.started) == 2:  # one ends early, the other is lost after the last commit
                *_, last = self.run_build(replace(request, shard=(1, 2)))
                building = (request.out / "building.json").read_bytes()
                self.run_build(replace(request, shard=(2, 2)))
                (request.out / "manifest.json").unlink()
                (request.out / "building.json").write_bytes(building)
                return [(self.started[0], last), (self.started[1], Lost("killed"))]
            *_, last = self.run_build(request)
            return [(self.started[-1], last)]

    crew = Crew(request, run_build)
    crew.jobs = [Job(request, None, number=1), Job(request, None, number=2)]
    *_, last = build_together(plan_build(request), workers=2, engine=by_hand(crew), restarts=0)
    assert (last.complete, last.left, len(crew.started)) == (True, 0, 3)
    assert (request.out / "manifest.json").exists()


def test_shards_that_others_hold_are_named_until_they_are_done(tmp_path: Path, build_request, run_build) -> None:
    plan = plan_build(build_request(tmp_path / "c"))
    run_build(replace(plan.request, shard=(1, 2)))
    state = BuildState(plan.request, [rows for _, _, rows in plan.manifest.shards])
    record = BuildProgress(0, 10, 0, 3, 0.0, elsewhere={0: "process 7 on here", 1: "process 8 on here"})
    last = engines.together(state, [record, record])
    assert last.elsewhere == {1: "process 8 on here"}
    assert not last.complete


def test_builders_share_the_processors(build_request, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [job.threads for job in local_jobs(build_request(tmp_path / "c"), 3)] == [2, 2, 2]
    assert [job.threads for job in local_jobs(build_request(tmp_path / "c"), 20)] == [1] * 20


def test_each_builder_has_one_of_the_gpus_that_are_to_be_seen(build_request, tmp_path: Path, monkeypatch) -> None:
    request = build_request(tmp_path / "c")

    def gpus(device: str, workers: int) -> list[str | None]:
        teacher = replace(request.teacher, device=device)
        return [job.gpu for job in local_jobs(replace(request, teacher=teacher), workers)]

    monkeypatch.setattr(local_engine, "resolve_device", lambda device: device)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus("cuda", 3) == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-8932f937")  # those of a neighbour stay his
    assert gpus("cuda", 3) == ["5", "GPU-8932f937", "5"]
    assert gpus("cuda:1", 2) == [None, None]


@pytest.mark.parametrize(
    ("options", "words"), [({"workers": 0}, "at least 1"), ({"workers": 2, "engine": "rays"}, "unknown engine")]
)
def test_what_cannot_be_done_is_refused_before_a_process_starts(
    options, words: str, tmp_path: Path, build_request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", lambda process: pytest.fail("a process started"))
    with pytest.raises(DataError, match=words):
        list(build_together(plan_build(build_request(tmp_path / "c")), **options))
    assert not (tmp_path / "c").exists()


def test_without_an_address_ray_starts_a_cluster_of_its_own(build_request, tmp_path: Path, monkeypatch) -> None:
    """Left to itself, Ray joins a cluster of which it finds a trace on the disk, and waits for minutes where that has ended."""
    ray = pytest.importorskip("ray")
    addresses = []

    def init(address=None, **_) -> None:
        addresses.append(address)
        raise CacheError("that is enough")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(CacheError, match="enough"):
        list(build_together(plan_build(build_request(tmp_path / "c")), workers=1, engine="ray"))
    assert addresses == ["local"]
