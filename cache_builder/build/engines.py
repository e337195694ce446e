"""Several builders of one cache at once: processes of this machine, or tasks of a Ray cluster.

    for progress in build_together(plan, workers=4): ...      # records as `build` yields them

Every builder makes the same plan and takes the next shard that no other has claimed (`claims`). So a slow builder holds up no
other, and one that dies leaves its shard to the rest. The builders share only the directory; on a cluster it is on a file
system that all machines see under one path. Progress is read from the commits.

On CUDA each builder gets one GPU, in turn, or an equal share of them for a teacher with a device map; on a CPU they share the
processors. Add an engine: a function in `ENGINES`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any

from kd.cache_builder.build.builder import BuildProgress, build
from kd.cache_builder.build.plan import BuildPlan, plan_build
from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.store.records import commits
from kd.common.errors import CacheError, DataError, KdError, unknown_name
from kd.common.extras import needed
from kd.common.memory import share_one_heap
from kd.common.processes import run_as_child
from kd.models.loading import resolve_device

POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """The work of one builder."""

    request: BuildRequest
    threads: int | None
    """Number of torch's threads; None = leave it as it is."""
    gpu: str | None = None
    """The only GPUs it may see, as CUDA_VISIBLE_DEVICES names them; None = leave the variable as it is."""
    folder: str | None = None
    """Folder that relative paths in the request start from; None = the builder's own."""


Answer = BuildProgress | KdError
"""A builder's last record, or the error that stopped it."""
Poll = Callable[[float], "list[Answer] | None"]
"""Waits for at most so many seconds. Returns the answers of all builders when the last has come, None before that."""


def build_together(plan: BuildPlan, *, workers: int, engine: str = "local") -> Iterator[BuildProgress]:
    """Build with several builders; yields progress, and last one record for all of them.

    Raises the first KdError of a builder. What is committed stays, and the same call continues from there.
    """
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    if workers < 1:
        raise DataError("--workers must be at least 1", found=f"--workers {workers}")
    request = replace(plan.request, out=plan.request.out.absolute(), model=None)
    sizes = [rows for _, _, rows in plan.manifest.shards]
    before, started = set(commits.committed(request.out, len(sizes))), time.perf_counter()
    tokens = {i: sum(len(r.target_ids) for r in plan.rows[a:b]) for i, (a, b, _) in enumerate(plan.manifest.shards)}

    def so_far() -> tuple[set[int], BuildProgress]:
        done = set(commits.committed(request.out, len(sizes)))
        rate = sum(tokens[i] for i in done - before) / (time.perf_counter() - started)
        return done, BuildProgress(sum(sizes[i] for i in done), sum(sizes), len(done), len(sizes), rate)

    with ENGINES[engine](jobs(request, workers)) as poll:
        while (answers := poll(POLL_SECONDS)) is None:
            yield so_far()[1]
    errors = [answer for answer in answers if isinstance(answer, KdError)]
    if errors:
        raise errors[0]
    done, last = so_far()
    index, count = request.shard
    left = len(set(range(index - 1, len(sizes), count)) - done)
    yield together(done, last, [answer for answer in answers if isinstance(answer, BuildProgress)], left)


def together(done: set[int], last: BuildProgress, records: Sequence[BuildProgress], left: int = 0) -> BuildProgress:
    """One record for all builders, where these shards are `done` and `left` are not. Their seconds are added."""
    spent = [record.seconds for record in records if record.seconds is not None]
    padding = [record.padding_share for record in records if record.padding_share is not None]
    elsewhere = {i: who for record in records for i, who in record.elsewhere.items() if i not in done}
    return replace(
        last,
        complete=any(record.complete for record in records),
        reused=all(record.reused for record in records),
        copied=sum(record.copied for record in records),
        elsewhere=elsewhere,
        left=left,
        seconds={name: sum(s[name] for s in spent) for name in spent[0]} if spent else None,
        padding_share=sum(padding) / len(padding) if padding else None,
        placed=next((record.placed for record in records if record.placed), {}),
    )


def jobs(request: BuildRequest, workers: int) -> list[Job]:
    """One job per builder: a GPU each where the teacher runs on a GPU, else an equal share of the processors.

    A teacher with a device map gets an equal share of the GPUs. Raises DataError where there are fewer than builders.
    """
    device = resolve_device(request.teacher.device)
    if device == "cuda":
        import torch

        names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = names if names[0] else [str(number) for number in range(torch.cuda.device_count())]
        if request.teacher.placement.spread:
            return [Job(request, None, ",".join(share)) for share in _shares(gpus, workers)]
        return [Job(request, None, gpus[number % len(gpus)]) for number in range(workers)]
    if device.startswith("cuda"):  # the user has named one GPU: all builders use it
        return [Job(request, None) for _ in range(workers)]
    return [Job(request, max(1, len(os.sched_getaffinity(0)) // workers)) for _ in range(workers)]


def _shares(gpus: Sequence[str], workers: int) -> list[Sequence[str]]:
    """The GPUs in equal parts, one for each builder."""
    each = len(gpus) // workers
    if not each:
        raise DataError(
            "builders whose teacher has a device map need GPUs of their own",
            found=f"--workers {workers} with {len(gpus)} GPUs",
            try_=f"--workers {len(gpus)}, or fewer",
        )
    return [gpus[number * each : (number + 1) * each] for number in range(workers)]


def work(job: Job) -> Answer:
    """Build until every shard is committed or claimed by another builder."""
    share_one_heap()
    if job.folder is not None and Path(job.folder).is_dir():
        os.chdir(job.folder)
    if job.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = job.gpu  # before CUDA is initialised
    if job.threads is not None:
        import torch

        torch.set_num_threads(job.threads)
    try:
        *_, last = build(plan_build(job.request))
    except KdError as error:
        return error
    return last


@contextmanager
def local(todo: Sequence[Job]) -> Iterator[Poll]:
    """Run builders as processes of this machine."""
    context = multiprocessing.get_context("spawn")  # a forked one could not use CUDA, nor torch's threads
    running: dict[Connection, Any] = {}
    answers: list[Answer] = []
    for _ in todo:
        ours, theirs = context.Pipe()
        in_main = threading.current_thread() is threading.main_thread()
        arguments = (in_main, __name__, answer_job.__name__, theirs)
        process = context.Process(target=run_as_child, args=arguments, name="kd-builder", daemon=True)
        process.start()
        theirs.close()
        running[ours] = process

    def poll(seconds: float) -> list[Answer] | None:
        for connection in wait(list(running), seconds):
            assert isinstance(connection, Connection)
            process = running.pop(connection)
            try:
                answer: Answer = connection.recv()
            except (EOFError, ConnectionResetError):
                process.join()
                answer = CacheError(
                    "a builder died",
                    found=f"exit code {process.exitcode}",
                    try_="the same command again: it continues; fewer --workers, if memory was short",
                )
            answers.append(answer)
            if isinstance(answer, KdError):
                return answers
        return None if running else answers

    try:
        for connection, job in zip(list(running), todo, strict=True):  # all of them have started and import meanwhile
            with suppress(BrokenPipeError, ConnectionResetError):  # it has died already, which `poll` will notice
                connection.send(job)
        yield poll
    finally:
        for process in running.values():
            process.terminate()
        for process in running.values():
            process.join()


def answer_job(connection: Connection) -> None:
    """Do the job that comes through the connection, and send the answer. On SIGTERM this ends without a staging folder."""

    def interrupt(_: int, __: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the clean-up short
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        job = connection.recv()
        import transformers

        transformers.utils.logging.disable_progress_bar()  # the parent shows the progress of all
        transformers.utils.logging.set_verbosity_error()
        connection.send(work(job))
    except (KeyboardInterrupt, EOFError):  # stopped, or the parent died before it had sent a job
        pass
    finally:
        connection.close()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to clean up


@contextmanager
def on_ray(todo: Sequence[Job]) -> Iterator[Poll]:
    """Run builders as tasks of the Ray cluster that RAY_ADDRESS names, or of a cluster on this machine that ends with the build."""
    with needed("ray", "--engine ray"):
        import ray
    begun_here = not ray.is_initialized()
    if begun_here:
        ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    needs: dict[str, Any] = {
        "max_retries": 0,
        "num_cpus": todo[0].threads or 1,
        "num_gpus": 0 if todo[0].gpu is None else len(todo[0].gpu.split(",")),
    }
    task = ray.remote(work).options(**needs)
    # Ray itself gives each task its GPUs
    left = [task.remote(replace(job, gpu=None, folder=os.getcwd())) for job in todo]
    answers: list[Answer] = []

    def poll(seconds: float) -> list[Answer] | None:
        nonlocal left
        done, left = ray.wait(left, timeout=seconds)
        for reference in done:
            try:
                answers.append(ray.get(reference))
            except ray.exceptions.RayError as error:
                answers.append(
                    CacheError(
                        "a builder died",
                        found=str(error).strip().splitlines()[-1],
                        try_="the same command again: it continues",
                    )
                )
            if isinstance(answers[-1], KdError):
                return answers
        return None if left else answers

    try:
        yield poll
    finally:
        for reference in left:
            ray.cancel(reference)
        if begun_here:
            ray.shutdown()


ENGINES: dict[str, Callable[[Sequence[Job]], AbstractContextManager[Poll]]] = {"local": local, "ray": on_ray}
