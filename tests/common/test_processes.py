"""Equal marks mean one process; a lock ends with its holder; a child ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kd.common import processes
from kd.common.processes import boot_mark, is_alive, lock_of, mark_of, own_mark

linux = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="there is no /proc")


def ended() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@linux
def test_a_process_has_one_mark_and_another_has_another():
    assert own_mark() == mark_of(os.getpid()) == own_mark()
    assert mark_of(os.getppid()) != own_mark()
    assert own_mark().startswith(boot_mark())
    assert mark_of(ended()) is None


def test_a_process_is_alive_by_number_and_mark():
    parent = os.getppid()
    assert is_alive(os.getpid(), own_mark())
    assert is_alive(parent, mark_of(parent) or "")
    assert not is_alive(os.getpid(), "0" * len(own_mark()))
    assert not is_alive(ended(), own_mark())


@linux
def test_a_later_process_of_the_same_number_is_not_alive():
    parent = os.getppid()
    assert not is_alive(parent, f"{boot_mark()}{1:012x}")
    assert is_alive(parent, "0a1b2c3d"), "marks of the first releases say less, and count"


def test_where_proc_counts_for_others_marks_are_not_compared(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "readlink", lambda path: "1")
    assert mark_of(os.getppid()) is None
    assert is_alive(os.getppid(), f"{boot_mark()}{1:012x}")


def test_a_lock_is_free_when_its_holder_has_ended(tmp_path: Path):
    (tmp_path / "f").write_text("")
    code = f"import sys; sys.path.insert(0, {str(Path(processes.__file__).parents[2])!r})\n"
    code += "from pathlib import Path; from kd.common.processes import lock_of; import time\n"
    code += f"assert lock_of(Path({str(tmp_path / 'f')!r})) is not None; print('locked', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    assert lock_of(tmp_path / "f") is None
    process.kill()
    process.communicate()
    process.wait()
    handle = lock_of(tmp_path / "f")
    assert handle is not None
    os.close(handle)


PARENT = """
import multiprocessing, os, sys, time
def work(kernel):
    from kd.common.processes import end_with_parent
    end_with_parent(kernel=kernel)
    print(os.getpid(), flush=True)
    while True:
        time.sleep(0.1)
if __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=work, args=(sys.argv[1] == "kernel",))
    process.start()
    process.join()
"""


@pytest.mark.parametrize("how", ["kernel", "pipe"])
def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path, how: str):
    (tmp_path / "parent.py").write_text(PARENT)
    process = subprocess.Popen([sys.executable, tmp_path / "parent.py", how], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    assert is_alive(child, mark_of(child) or "")
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 20
    while running(child):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)


def running(pid: int) -> bool:
    """Whether a process still runs; a zombie that nobody has waited for does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def test_a_process_that_multiprocessing_has_not_started_is_left_alone():
    processes.end_with_parent(kernel=True)
    assert signal.getsignal(signal.SIGTERM) is not None
