"""Settings of glibc's memory allocator. With another C library they do nothing."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache

LARGEST = 32 * 2**20 - 2**16
"""Just below the largest mapping that glibc learns from: DEFAULT_MMAP_THRESHOLD_MAX, 32 MB on 64-bit machines."""


@cache
def keep_freed_memory() -> None:
    """Have glibc reuse the memory of arrays of a few MB, instead of mapping and zeroing fresh pages for each array.

    Memory above a threshold goes back to the system when it is freed; the next array of that size then faults in every page
    again, which costs as much as decoding into it. The threshold adapts to the largest mapping that was freed so far
    (mallopt(3), M_MMAP_THRESHOLD and M_TRIM_THRESHOLD). Freeing one large array, which need not be touched, is enough. At most
    64 MB of free memory are then kept.
    """
    import numpy as np

    np.empty(LARGEST, dtype=np.uint8)


M_ARENA_MAX = -8


def share_one_heap() -> None:
    """Have all threads allocate from one heap, unless MALLOC_ARENA_MAX or GLIBC_TUNABLES is set.

    By default, glibc gives every thread a heap of its own, in pieces of 64 MB. Logits and activations of several lanes leave
    gaps in it that nothing else fits into: two lanes hold 120 to 200 MB more (docs/log.md). Call it before the first thread
    that allocates; later it does nothing.
    """
    if "MALLOC_ARENA_MAX" in os.environ or "GLIBC_TUNABLES" in os.environ:
        return
    with suppress(OSError, AttributeError):  # no C library to ask, or another one
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)
