"""Arrays of a few MB, made and freed again and again, are the same pages, and threads share a heap."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from kd.common.memory import keep_freed_memory

if sys.argv[1] == "kept":
    keep_freed_memory()
[np.ones(750_000, dtype=np.float32) for _ in range(8)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    [np.ones(750_000, dtype=np.float32) for _ in range(8)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_arrays_of_a_few_megabytes_are_mapped_once():
    def faults(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    # 24 MB in pages of 4 kB: mapped before, and again in every turn where the end of the heap goes back to the system
    kept, otherwise = faults("kept"), faults("otherwise")
    assert otherwise > 50 * 1000
    assert kept < 1000


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
