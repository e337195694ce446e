"""Arrays of a few MB, made and freed again and again, are the same pages."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import resource, sys
import numpy as np
from kd.data.memory import keep_freed_memory

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
