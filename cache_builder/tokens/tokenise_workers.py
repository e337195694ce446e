"""Processes that tokenise parts of a text, started when there is enough text for them.

A process is a plain child at the other end of a connection: unlike those of `multiprocessing` it does not run the user's script
again, so `kd.build_cache` may be called anywhere in a script. It ends when the connection does, also when this process is killed.
Starting one takes seconds, so the first parts are made here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from queue import SimpleQueue

from kd.cache_builder.tokens.token_pass import Done, Here, PartWork, Pool
from kd.common.errors import CacheError, KdError
from kd.data.rows.example import Example

FIRST = 2
"""Parts that are made here before the first process is started."""
MOST = 16
"""Most processes that are started where nobody names a number: the text is read by one."""


def default_workers() -> int:
    """One process for each processor that this one may use, and at most MOST."""
    return min(len(os.sched_getaffinity(0)), MOST)


def processes(workers: int | None) -> Callable[[PartWork], AbstractContextManager[Pool]]:
    """What makes parts with so many processes; None is `default_workers`, 1 makes them here."""

    @contextmanager
    def pool(work: PartWork) -> Iterator[Pool]:
        number = default_workers() if workers is None else workers
        if number == 1:
            yield Here(work)
            return
        several = Workers(work, number)
        try:
            yield several
        finally:
            several.close()

    return pool


class Workers:
    """Parts are made by child processes, after the first ones."""

    def __init__(self, work: PartWork, number: int) -> None:
        self._work, self._number = work, number
        self._here, self._begun = Here(work), 0
        self._threads: ThreadPoolExecutor | None = None
        self._idle: SimpleQueue[Child] = SimpleQueue()
        self._children: list[Child] = []

    @property
    def ahead(self) -> int:
        """Parts that may be under way: one for each process, and one that waits for it."""
        return 2 * self._number if self._threads is not None else 0

    def submit(self, number: int, examples: list[Example]) -> Future[Done]:
        """Make the part by the next process that is free."""
        self._begun += 1
        if self._begun <= FIRST:
            return self._here.submit(number, examples)
        if self._threads is None:
            self._start()
        assert self._threads is not None
        return self._threads.submit(self._by_child, number, examples)

    def _start(self) -> None:
        self._threads = ThreadPoolExecutor(self._number, thread_name_prefix="kd-tokens")
        for _ in range(self._number):
            child = Child(self._work)
            self._children.append(child)
            self._idle.put(child)

    def _by_child(self, number: int, examples: list[Example]) -> Done:
        child = self._idle.get()
        try:
            return child.make(number, examples)
        finally:
            self._idle.put(child)

    def close(self) -> None:
        """End the processes, whatever they are at."""
        for child in self._children:
            child.close()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)


class Child:
    """One process."""

    def __init__(self, work: PartWork) -> None:
        self._line, theirs = Pipe()
        path = os.pathsep.join(p for p in sys.path if p)
        environment = {**os.environ, "PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", f"from {__name__} import serve; serve({theirs.fileno()})"]
        with theirs:  # a session of its own, so that a key that stops the command does not stop the child first
            self._process = subprocess.Popen(
                command, env=environment, pass_fds=[theirs.fileno()], start_new_session=True, stdin=subprocess.DEVNULL
            )
        self._work: PartWork | None = work

    def make(self, number: int, examples: list[Example]) -> Done:
        """Have a part made. Raises what the process raised; CacheError where it died."""
        try:
            if self._work is not None:
                self._line.send(self._work)
                self._work = None
            self._line.send((number, examples))
            answer: Done | Exception = self._line.recv()
        except (OSError, EOFError) as error:
            raise CacheError(
                "a process that tokenises the text died",
                found=f"exit code {self._process.wait()}",
                try_="the same command again: it continues; fewer --tokenize-workers, if memory was short",
            ) from error
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._line.close()


def serve(line: int) -> None:
    """What a child does: make the parts that come through the connection, until there are no more."""
    connection = Connection(line)
    try:
        work: PartWork = connection.recv()
        while True:
            connection.send(_answer(work, *connection.recv()))
    except (EOFError, OSError, KeyboardInterrupt):  # nobody wants more
        return


def _answer(work: PartWork, number: int, examples: list[Example]) -> Done | Exception:
    try:
        return work(number, examples)
    except (KdError, OSError) as error:  # the disk may be full
        return error
    except Exception as error:
        traceback.print_exc()
        return CacheError("a process that tokenises the text failed", found=f"{type(error).__name__}: {error}")
