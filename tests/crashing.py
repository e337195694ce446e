"""Run something in a forked child that dies, or whose disk fails, at the n-th operation that writes under a folder."""

from __future__ import annotations

import errno
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kd.common.errors import KdError

WRITES = {"os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir"}


def child(action: Callable[[], object]) -> tuple[int, str]:
    """Run `action` in a fork: its exit code (minus the signal that killed it), and the error it ended with."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
            tqdm.set_lock(
                threading.RLock()
            )  # its own is a semaphore of all forks: one that dies holding it stops the rest
            action()
            code = 0
        except KdError as error:
            os.write(write, str(error).encode()[:4000])
            code = error.exit_code
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException as error:
            os.write(write, repr(error).encode()[:4000])
        finally:
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        text = pipe.read().decode()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def watch(root: Path, act: Callable[[int], None]) -> None:
    """From now on in this process, call `act(n)` before the n-th operation that writes under `root`."""
    prefix, numbers = str(root), count()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if (event in WRITES or (event == "open" and int(arguments[2]) & (os.O_WRONLY | os.O_RDWR))) and str(
            arguments[0]
        ).startswith(prefix):
            act(next(numbers))

    sys.addaudithook(hook)


def dies_at(number: int) -> Callable[[int], None]:
    """SIGKILL, which nothing can handle."""

    def act(n: int) -> None:
        if n == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return act


def fails_at(number: int) -> Callable[[int], None]:
    """The disk's answer to one operation."""

    def act(n: int) -> None:
        if n == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return act


def stops_at(number: int) -> Callable[[int], None]:
    """SIGSTOP: the process sleeps until somebody sends SIGCONT."""

    def act(n: int) -> None:
        if n == number:
            os.kill(os.getpid(), signal.SIGSTOP)

    return act


def sleeper(root: Path, action: Callable[[], object], number: int) -> int | None:
    """A fork that runs `action` and sleeps before its operation `number` under `root`; None where it has ended before that."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            torch.set_num_threads(1)
            watch(root, stops_at(number))
            action()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, os.WUNTRACED)
    return pid if os.WIFSTOPPED(status) else None


def woken(pid: int) -> int:
    """Wake a sleeper up; its exit code."""
    os.kill(pid, signal.SIGCONT)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at_moment(action: Callable[[], object], seconds: float) -> bool:
    """Run `action` in a fork and kill it after so many seconds. Returns whether it was still at work."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)
            tqdm.set_lock(threading.RLock())
            action()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def operations(action: Callable[[], object], root: Path) -> int:
    """How many operations `action` does under `root` when nothing stops it."""
    read, write = os.pipe()

    def counted() -> None:
        watch(root, lambda n: (os.write(write, b"."), None)[1])
        action()

    assert child(counted) == (0, "")
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        return len(pipe.read())


def some_of(total: int, few: int | None) -> list[int]:
    """`few` numbers below `total`, the same every time; None = all."""
    return list(range(total)) if few is None else sorted(random.Random(0).sample(range(total), min(few, total)))
