"""Builders as processes of this machine: a GPU each where the teacher runs on one, else a share of the processors."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any

from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.build.together.jobs import Answer, Job, Lost, work
from kd.common.errors import DataError
from kd.common.processes import run_as_child
from kd.models.model_request import resolve_device


@contextmanager
def local(request: BuildRequest, workers: int) -> Iterator[Processes]:
    """Run builders as processes of this machine. Those that still run at the end are stopped."""
    crew = Processes(local_jobs(request, workers))
    try:
        yield crew
    finally:
        crew.stop()


class Processes:
    """Builders that are processes of this machine."""

    may_queue = False

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self._context = multiprocessing.get_context("spawn")  # a forked one could not use CUDA, nor torch's threads
        self._running: dict[Connection, tuple[Any, Job]] = {}
        self._unsent: list[Connection] = []
        """Builders that have not been given their job: they start and import meanwhile."""

    def start(self, job: Job) -> None:
        """As `Crew.start`."""
        ours, theirs = self._context.Pipe()
        in_main = threading.current_thread() is threading.main_thread()
        arguments = (in_main, __name__, answer_job.__name__, theirs)
        process = self._context.Process(target=run_as_child, args=arguments, name="kd-builder", daemon=True)
        process.start()
        theirs.close()
        self._running[ours] = process, job
        self._unsent.append(ours)

    def poll(self, seconds: float) -> list[tuple[Job, Answer]]:
        """As `Crew.poll`."""
        while self._unsent:  # all of them have been started
            new = self._unsent.pop()
            with suppress(BrokenPipeError, ConnectionResetError):  # it has died already, which is noticed below
                new.send(self._running[new][1])
        ended: list[tuple[Job, Answer]] = []
        for connection in wait(list(self._running), seconds):
            assert isinstance(connection, Connection)
            process, job = self._running.pop(connection)
            try:
                answer: Answer = connection.recv()
            except (EOFError, ConnectionResetError):
                process.join()
                answer = Lost(exit_in_words(process.exitcode))
            connection.close()
            ended.append((job, answer))
        return ended

    def stop(self) -> None:
        """Stop the builders that still run, and wait until they have ended."""
        for process, _ in self._running.values():
            process.terminate()
        for process, _ in self._running.values():
            process.join()


def exit_in_words(code: int) -> str:
    """What the exit code of a builder without an answer says: negative numbers are signals."""
    if code == 0:
        return "it was told to stop (SIGTERM)"
    if code > 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in {*signal.Signals} else f"signal {-code}"
    return f"exit code {code} ({name}{', as when memory runs out' if -code == signal.SIGKILL else ''})"


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


def local_jobs(request: BuildRequest, workers: int) -> list[Job]:
    """One job per builder: a GPU each where the teacher runs on a GPU, else an equal share of the processors.

    A teacher with a device map gets an equal share of the GPUs. Raises DataError where there are fewer than builders.
    """
    numbers, device = range(workers), resolve_device(request.teacher.device)
    if device == "cuda":
        import torch

        names = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        gpus = names if names[0] else [str(number) for number in range(torch.cuda.device_count())]
        if request.teacher.placement.spread:
            shares = _shares(gpus, workers)
            return [Job(request, None, ",".join(shares[number]), number=number + 1) for number in numbers]
        return [Job(request, None, gpus[number % len(gpus)], number=number + 1) for number in numbers]
    if device.startswith("cuda"):  # the user has named one GPU: all builders use it
        return [Job(request, None, number=number + 1) for number in numbers]
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    return [Job(request, threads, number=number + 1) for number in numbers]


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
