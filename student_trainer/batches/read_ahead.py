"""Read, verify and decode a cache on threads, so that the training step does not wait for it."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from math import gcd
from typing import Any

from torch.utils.data import Dataset

from kd.cache_builder.store.readers.epoch_order import EpochOrder
from kd.cache_builder.store.readers.reading import CachedExample, Reader

PREFETCHED_BATCHES = 4
"""Batches that are read ahead at most."""
TOUCHED_EXAMPLES = 256
"""Number of first examples whose shards are loaded early: enough to touch nearly every shard of a window of 16."""
TOUCHING_THREADS = 4
"""Threads that load those shards."""


def touched_examples(order: EpochOrder, rank: int = 0, processes: int = 1) -> list[int]:
    """TOUCHED_EXAMPLES of the first examples that a process of a job is going to read.

    Where the number of processes and that of lanes have a divisor in common, other lanes are those of other processes.
    """
    step = gcd(order.lanes, processes)
    return order[rank % step : TOUCHED_EXAMPLES * step : step].tolist()  # type: ignore[no-any-return]


def touch_shards(reader: Reader, examples: Sequence[int]) -> list[threading.Thread]:
    """Have the reader load the shards of these examples on threads, which are returned, while the student is being loaded.

    The first batches touch most shards of their window, and training would wait for all of them. A damaged shard raises its
    error later, when its examples are read. One thread would not get far: for each of a shard's hundred short calls it waits
    until the loading of the student releases the interpreter.
    """

    stop = threading.Event()

    def touch(numbers: Sequence[int]) -> None:
        with suppress(Exception):
            for example in numbers:
                if stop.is_set():
                    return
                reader.locate(example)

    def finish() -> None:
        stop.set()
        for thread in threads:
            thread.join(timeout=5.0)  # as long as a shard takes from a disk, not from a network that does not answer

    atexit.register(finish)
    threads = [
        threading.Thread(target=touch, args=(examples[i::TOUCHING_THREADS],), name="kd-touch", daemon=True)
        for i in range(TOUCHING_THREADS)
    ]
    for thread in threads:
        thread.start()
    return threads


class CachedExamples(Dataset[CachedExample]):
    """The cache as a map-style data set that reads whole batches at once."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, example: int) -> CachedExample:
        return self.reader[example]

    def __getitems__(self, examples: Sequence[int]) -> list[CachedExample]:
        return self.reader.read(examples)


class Prefetcher:
    """Pulls an iterator on a thread, at most `PREFETCHED_BATCHES` ahead; exceptions surface at `next`."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source = source
        self.waited = 0.0
        self._queue: queue.Queue[tuple[str, Any]] = queue.Queue(PREFETCHED_BATCHES)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._pull, name="kd-prefetch", daemon=True)
        self._thread.start()

    def _pull(self) -> None:
        try:
            for item in self.source:
                if not self._put(("item", item)):
                    return
            self._put(("end", None))
        except BaseException as error:
            self._put(("error", error))

    def _put(self, message: tuple[str, Any]) -> bool:
        while not self._stop.is_set():
            try:
                self._queue.put(message, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Any:
        started = time.perf_counter()
        kind, value = self._queue.get()
        self.waited += time.perf_counter() - started
        if kind == "item":
            return value
        self._queue.put((kind, value))  # the next call gets the same answer
        if kind == "error":
            raise value
        raise StopIteration

    def close(self) -> None:
        """Stop the thread and drop what it had read ahead."""
        self._stop.set()
        self._thread.join(timeout=5.0)
