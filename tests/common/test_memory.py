"""Freed arrays of a few MB stay with the process, and threads share a heap."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FREED = """
import ctypes, sys
import numpy as np
from kd.common.memory import keep_freed_memory

class Mallinfo(ctypes.Structure):  # of glibc, malloc.h
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):
    [np.ones(750_000, dtype=np.float32) for _ in range(8)]
libc = ctypes.CDLL(None)
libc.mallinfo2.restype = Mallinfo
print(libc.mallinfo2().fordblks)  # free bytes that the process keeps
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_the_memory_of_freed_arrays_stays_with_the_process() -> None:
    def free(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", FREED, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    arrays = 8 * 750_000 * 4
    assert free("kept") >= arrays
    assert free("otherwise") < arrays / 2


HEAPS = """
import ctypes, sys, tempfile, threading
from kd.common.memory import share_one_heap

if sys.argv[1] == "shared":
    share_one_heap()
barrier = threading.Barrier(4)

def work():
    blocks = [ctypes.create_string_buffer(20_000) for _ in range(10)]
    barrier.wait()

threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
with tempfile.NamedTemporaryFile() as file:
    stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
    libc.malloc_info(0, stream)
    libc.fclose(stream)
    print(file.read().count(b"<heap nr="))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
@pytest.mark.parametrize(
    ("how", "setting", "one"),
    [("shared", {}, True), ("otherwise", {}, False), ("shared", {"MALLOC_ARENA_MAX": "3"}, False)],
)
def test_all_threads_allocate_from_one_heap_unless_the_user_says_otherwise(how, setting, one):
    names = ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES")
    environment = {n: v for n, v in os.environ.items() if n not in names} | setting
    done = subprocess.run(
        [sys.executable, "-c", HEAPS, how], env=environment, capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) == 1) is one
