"""Several processes as torchrun starts them, made by forking this one: torch and transformers are imported already."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable

import torch
from tqdm import tqdm

SECONDS = 300
"""Life of a rank: one that waits for a rank that has failed would wait for half an hour."""


def run_ranks(action: Callable[[], object], processes: int = 2) -> None:
    """Run `action` in each of several forks with the environment of its rank. Raises AssertionError with their errors."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes = {}
    for rank in range(processes):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            _rank(action, write, {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_PORT": port})
        os.close(write)
        pipes[pid] = read
    errors = []
    for read in pipes.values():
        with os.fdopen(read, "rb") as pipe:
            errors.append(pipe.read().decode())
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pipes]
    assert codes == [0] * processes, "\n".join(errors)


def _rank(action: Callable[[], object], write: int, ranks: dict[str, int]) -> None:
    """The life of a fork; it never returns."""
    code = 1
    signal.alarm(SECONDS)
    try:
        from accelerate.state import AcceleratorState

        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {name: str(value) for name, value in ranks.items()}
        os.environ["LOCAL_WORLD_SIZE"] = os.environ["WORLD_SIZE"]
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier test was one process
        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        tqdm.set_lock(threading.RLock())  # its own is a semaphore of all forks
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        action()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        code = 0
    except BaseException:
        os.write(write, traceback.format_exc().encode()[-4000:])
    finally:
        os._exit(code)
