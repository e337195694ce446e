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

from kd.cache_builder.build import engines
from kd.cache_builder.build.builder import BuildProgress
from kd.cache_builder.build.engines import ENGINES, build_together, jobs
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.store.records import commits
from kd.common.errors import CacheError, DataError, TeacherError
from kd.common.files import unfinished
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


def test_a_builder_that_dies_is_told_and_the_others_are_stopped(tmp_path: Path, build_request, monkeypatch) -> None:
    request = build_request(tmp_path / "c")
    processes: list[int] = []
    original = multiprocessing.get_context("spawn").Process.start

    def start(process) -> None:
        original(process)
        processes.append(process.pid)
        if len(processes) == 2:
            os.kill(processes[0], signal.SIGKILL)

    monkeypatch.setattr(multiprocessing.get_context("spawn").Process, "start", start)
    with pytest.raises(CacheError, match="a builder died") as caught:
        list(build_together(plan_build(request), workers=2))
    assert caught.value.details["found"] == "exit code -9"
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    monkeypatch.undo()
    *_, last = build_together(plan_build(request), workers=2)
    assert last.complete
    assert not [path for path in (tmp_path / "c").iterdir() if unfinished(path.name)]


def test_progress_follows_the_commits(tmp_path: Path, build_request, run_build, monkeypatch) -> None:
    request = build_request(tmp_path / "c")
    plan = plan_build(request)

    @contextmanager
    def by_hand(todo):
        """An engine whose one builder does a third of the shards between two looks."""
        parts = iter([(1, 3), (2, 3), (3, 3)])
        answers: list = []

        def poll(seconds: float):
            part = next(parts, None)
            if part is None:
                return answers[-1:]
            answers.append(run_build(replace(todo[0].request, shard=part))[-1])
            return None

        yield poll

    monkeypatch.setitem(ENGINES, "by hand", by_hand)
    steps = list(build_together(plan, workers=1, engine="by hand"))
    done = [0, *(step.shards_done for step in steps)]
    assert done == sorted(done)
    assert done[-1] == len(plan.manifest.shards) == len(commits.committed(tmp_path / "c", len(plan.manifest.shards)))
    assert len(set(done)) == 4
    assert steps[-1].tokens_per_second > 0


def test_shards_that_others_hold_are_named_until_they_are_done() -> None:
    record = BuildProgress(0, 10, 0, 3, 0.0, elsewhere={0: "process 7 on here", 1: "process 8 on here"})
    last = engines.together({0, 2}, BuildProgress(6, 10, 2, 3, 5.0), [record, record])
    assert last.elsewhere == {1: "process 8 on here"}
    assert not last.complete


def test_builders_share_the_processors(build_request, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [job.threads for job in jobs(build_request(tmp_path / "c"), 3)] == [2, 2, 2]
    assert [job.threads for job in jobs(build_request(tmp_path / "c"), 20)] == [1] * 20


def test_each_builder_has_one_of_the_gpus_that_are_to_be_seen(build_request, tmp_path: Path, monkeypatch) -> None:
    request = build_request(tmp_path / "c")

    def gpus(device: str, workers: int) -> list[str | None]:
        teacher = replace(request.teacher, device=device)
        return [job.gpu for job in jobs(replace(request, teacher=teacher), workers)]

    monkeypatch.setattr(engines, "resolve_device", lambda device: device)
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
