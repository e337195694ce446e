"""What the C library does with memory, told once; other libraries than glibc lose nothing."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache

LARGEST = 32 * 2**20 - 2**16
"""Just below the largest mapping that glibc learns from: DEFAULT_MMAP_THRESHOLD_MAX, 32 MB on 64-bit machines."""


@cache
def keep_freed_memory() -> None:
    """Have glibc use arrays of a few MB again instead of mapping, and zeroing, fresh pages for each.

    What is freed above a threshold goes back to the system, and the next array of that size faults every page in again,
    which costs as much as decoding into it. The threshold adapts to the largest mapping that was freed so far (mallopt(3),
    M_MMAP_THRESHOLD and M_TRIM_THRESHOLD), so one freed without ever being touched is enough; at most 64 MB of free memory
    are then kept.
    """
    import numpy as np

    np.empty(LARGEST, dtype=np.uint8)


M_ARENA_MAX = -8


def share_one_heap() -> None:
    """Have all threads allocate from one heap, unless MALLOC_ARENA_MAX or GLIBC_TUNABLES is set.

    glibc gives every thread a heap of its own, of pieces of 64 MB: logits and activations of several lanes leave holes that
    nothing else fits into, and two lanes hold 120 to 200 MB more (docs/log.md). To be called before the first thread that
    allocates; later it does nothing.
    """
    if "MALLOC_ARENA_MAX" in os.environ or "GLIBC_TUNABLES" in os.environ:
        return
    with suppress(OSError, AttributeError):  # no C library to ask, or another one
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
