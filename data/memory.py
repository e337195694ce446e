"""What the C library does with freed memory, told once."""

from __future__ import annotations

from functools import cache

import numpy as np

LARGEST = 32 * 2**20 - 2**16
"""Just below the largest mapping that glibc learns from: DEFAULT_MMAP_THRESHOLD_MAX, 32 MB on 64-bit machines."""


@cache
def keep_freed_memory() -> None:
    """Have glibc use arrays of a few MB again instead of mapping, and zeroing, fresh pages for each.

    What is freed above a threshold goes back to the system, and the next array of that size faults every page in again,
    which costs as much as decoding into it. The threshold adapts to the largest mapping that was freed so far (mallopt(3),
    M_MMAP_THRESHOLD and M_TRIM_THRESHOLD), so one freed without ever being touched is enough; at most 64 MB of free memory
    are then kept. Other C libraries lose nothing.
    """
    np.empty(LARGEST, dtype=np.uint8)
