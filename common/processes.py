"""Processes: who is who, who still lives, and children that end with their parent.

A process id says little by itself: ids are used again, and two containers count alike. `mark_of` adds the boot of the machine and
the time at which the process started, so that equal marks mean the same process. Where process ids cannot be compared (another
container on the same machine), a file lock can: the kernel frees it when its holder ends, in whichever way.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import secrets
import signal
import sys
import threading
from functools import cache
from importlib import import_module
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path

_RANDOM = secrets.token_hex(4)
"""Tells this process from an earlier one with the same id, on systems without /proc."""
GRACE_SECONDS = 30.0
"""Time in which a child whose parent died may finish the shard it is writing. Then it is ended."""
PR_SET_PDEATHSIG = 1


@cache
def boot_mark() -> str:
    """Eight hex digits for this boot of this machine, the same in all its containers; empty where it is not known."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()[:8]
    except OSError:  # not Linux
        return ""


def mark_of(pid: int) -> str | None:
    """Boot and start time of a process, in hex. None where there is no such process, or it cannot be seen."""
    own_pid = os.getpid()
    try:
        if os.readlink("/proc/self") != str(own_pid) and pid != own_pid:
            return None  # this /proc counts the processes of another namespace
        name = "self" if pid == own_pid else str(pid)
        status = Path(f"/proc/{name}/stat").read_text(encoding="utf-8", errors="replace")
        started = int(status.rpartition(")")[2].split()[19])  # field 22, in ticks; the name before it may hold anything
    except (OSError, ValueError, IndexError):
        return None
    return f"{boot_mark()}{started:012x}" if boot_mark() else None


def own_mark() -> str:
    """The mark of this process."""
    return mark_of(os.getpid()) or _RANDOM


def is_alive(pid: int, mark: str) -> bool:
    """Whether the process of this id and mark still runs on this system."""
    if pid == os.getpid():
        return mark == own_mark()
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    current = mark_of(pid)
    return current is None or len(current) != len(mark) or current == mark


def lock_of(path: Path) -> int | None:
    """Lock a file until the returned descriptor is closed or this process ends. None where it is locked, or cannot be."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)  # a pipe must not hold us up
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def is_free(path: Path) -> bool:
    """Whether a file is there and nobody has it locked."""
    handle = lock_of(path)
    if handle is None:
        return False
    os.close(handle)
    return True


def run_as_child(kernel: bool, module: str, function: str, connection: Connection) -> None:
    """Main function of a child of `multiprocessing`: `function(connection)` of a module, ended when the parent dies.

    The watch begins before the module is imported, which may take seconds. So nothing that needs the module may be an argument:
    the parent sends it through the connection.
    """
    end_with_parent(kernel=kernel)
    getattr(import_module(module), function)(connection)


def end_with_parent(*, kernel: bool) -> None:
    """From now on, end this child of `multiprocessing` when its parent has died: SIGTERM first, the end after `GRACE_SECONDS`.

    kernel   also let Linux send the SIGTERM. It does so when the thread ends that started the child, so this is for
             children of a parent's main thread.
    """
    parent = parent_process()
    if parent is None:
        return
    if kernel and sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    def watch() -> None:
        wait([parent.sentinel])  # also returns where the parent died before this line
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(GRACE_SECONDS)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="kd-parent", daemon=True).start()
