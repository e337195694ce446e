"""The tokens of all examples of a large cache, looked up many at a time in the order of an epoch.

`ExampleLengths` decodes a group of lengths, and compares its file with the digest, again whenever the group has left memory: for
a large cache about once a shard. Here each file is decoded once. The sizes lie in a temporary file without a name (in TMPDIR), 2
bytes for each example and side, and next to nothing of it is in memory.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.store.records.manifest_checks import PAGE_EXAMPLES
from kd.common.disk.disk_errors import clear_write_errors

GROUP = 2**12
"""Examples that are read at once: about as many as a shard has."""

READERS = 4
"""Threads that read files of lengths, at most: each holds about 30 MB meanwhile."""


class SizesOnDisk:
    """`[E, sides]` tokens of examples, in a file of which GROUP consecutive ones are read at a time."""

    def __init__(self, file: int, count: int, sides: int, dtype: np.dtype[Any]) -> None:
        self._file, self._sides, self._dtype, self._groups = file, sides, dtype, -(-count // GROUP)

    def __getitem__(self, examples: np.ndarray) -> np.ndarray:
        """`[n, sides]` tokens of the examples `[n]`."""
        groups = examples // GROUP
        wanted = np.zeros(self._groups, dtype=bool)
        wanted[groups] = True
        numbers = np.flatnonzero(wanted).tolist()
        sizes = np.zeros((len(numbers), GROUP, self._sides), dtype=self._dtype)
        for group, number in zip(sizes, numbers, strict=True):
            os.preadv(self._file, [group], number * group.nbytes)
        of_examples: np.ndarray = sizes[(np.cumsum(wanted) - 1)[groups], examples % GROUP]
        return of_examples


@contextmanager
def sizes_on_disk(
    read: Callable[[int, int], np.ndarray], count: int, longest: Sequence[int | None], threads: int
) -> Iterator[SizesOnDisk]:
    """The sizes of `count` examples. Raises WriteError where there is no room for them.

    read      gives the sizes `[n, sides]` of the examples `[first, stop)`; called on threads
    longest   most tokens on each side; None = not known
    """
    short = all(most is not None and most < 1 << 16 for most in longest)
    dtype = np.dtype(np.uint16 if short else np.uint32)
    width = len(longest) * dtype.itemsize
    with tempfile.TemporaryFile() as file:

        def write(first: int) -> None:
            sizes = np.ascontiguousarray(read(first, min(first + PAGE_EXAMPLES, count)), dtype=dtype)
            data, start = sizes.tobytes(), first * width
            while data:
                written = os.pwrite(file.fileno(), data, start)
                data, start = data[written:], start + written

        advice = f"TMPDIR=DIR with {count * width / 1e9:.1f} GB, or --max-steps"
        with (
            clear_write_errors(Path(tempfile.gettempdir()), advice),
            ThreadPoolExecutor(min(threads, READERS), "kd-sizes") as pool,
        ):
            for _ in pool.map(write, range(0, count, PAGE_EXAMPLES)):
                pass
        yield SizesOnDisk(file.fileno(), count, len(longest), dtype)
