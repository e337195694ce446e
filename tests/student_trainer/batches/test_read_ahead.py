"""What is read ahead is what would have been read, and errors surface where they would have."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kd.cache_builder.store import shard_store
from kd.cache_builder.store.readers.epoch_order import epoch_order
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import CacheDamageError
from kd.student_trainer.batches.read_ahead import (
    PREFETCHED_BATCHES,
    TOUCHED_EXAMPLES,
    TOUCHING_THREADS,
    Prefetcher,
    touch_shards,
    touched_examples,
)


def test_touched_shards_are_in_memory_when_they_are_read(kl_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, loads = CacheReader(kl_cache), list[int]()
    read_shard: Callable = shard_store.read_shard

    def counted(root, manifest, index, names=None):
        loads.append(index)
        return read_shard(root, manifest, index, names)

    monkeypatch.setattr(shard_store, "read_shard", counted)
    order = reader.epoch_order(0, 0)
    for thread in touch_shards(reader, order.tolist()):
        thread.join()
    assert sorted(loads) == list(range(len(reader.manifest.shards)))  # fewer than a window holds
    reader.read(order.tolist())
    assert len(loads) == len(reader.manifest.shards)


def test_a_shard_that_cannot_be_touched_is_told_when_it_is_read(
    kl_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = CacheReader(kl_cache)

    def damaged(*_: object, **__: object) -> None:
        raise CacheDamageError("a file of the cache was changed")

    monkeypatch.setattr(shard_store, "read_shard", damaged)
    for thread in touch_shards(reader, range(len(reader))):
        thread.join()
    with pytest.raises(CacheDamageError):
        reader.read([0])


ENDS = """
import sys, time
from kd.cache_builder.store import shard_store
from kd.cache_builder.store.readers.reader import CacheReader
from kd.student_trainer.batches.read_ahead import touch_shards

read = shard_store.read_shard

def slow(root, manifest, index, names=None):
    print("begun", flush=True)
    time.sleep(1.0)
    found = read(root, manifest, index, names)
    print("whole", flush=True)
    return found

shard_store.read_shard = slow
reader = CacheReader(sys.argv[1])
touch_shards(reader, list(range(len(reader))) * 3)
time.sleep(0.3)
raise SystemExit(7)
"""


def test_a_program_that_ends_lets_threads_finish_the_shard_they_are_at_and_no_more(kl_cache: Path) -> None:
    done = subprocess.run([sys.executable, "-c", ENDS, str(kl_cache)], capture_output=True, text=True, check=False)
    assert done.returncode == 7, done.stderr
    assert done.stdout.count("begun") == done.stdout.count("whole") > 0
    assert done.stdout.count("begun") <= TOUCHING_THREADS


def test_a_prefetcher_yields_the_source_s_items_in_order() -> None:
    prefetcher = Prefetcher(iter(range(50)))
    assert list(prefetcher) == list(range(50))
    with pytest.raises(StopIteration):  # asked again, the same answer
        next(prefetcher)


def test_a_prefetcher_reads_ahead_but_not_without_bound() -> None:
    taken: list[int] = []

    def source() -> Iterator[int]:
        for i in range(1000):
            taken.append(i)
            yield i

    prefetcher = Prefetcher(source())
    deadline = time.monotonic() + 5
    while len(taken) < PREFETCHED_BATCHES + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(taken) == PREFETCHED_BATCHES + 1  # a full queue, and one in hand
    prefetcher.close()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_an_exception_of_the_source_surfaces_after_the_items_before_it(kind: type[BaseException]) -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise kind("the disk is gone")

    prefetcher = Prefetcher(source())
    assert [next(prefetcher), next(prefetcher)] == [1, 2]
    for _ in range(2):
        with pytest.raises(kind, match="the disk is gone"):
            next(prefetcher)


def test_closing_a_prefetcher_stops_its_thread_while_items_are_left() -> None:
    prefetcher = Prefetcher(iter(range(10**9)))
    next(prefetcher)
    prefetcher.close()
    assert not [t for t in threading.enumerate() if t is prefetcher._thread]


def test_time_spent_waiting_for_the_source_is_counted() -> None:
    def slow() -> Iterator[int]:
        time.sleep(0.1)
        yield 1

    prefetcher = Prefetcher(slow())
    next(prefetcher)
    assert 0.05 < prefetcher.waited < 5.0  # 0.1 s, on a machine that may be busy


def test_processes_load_the_first_shards_of_their_own_lanes_alone() -> None:
    counts = np.full(40, 1000)
    order = epoch_order(0, 0, np.cumsum(counts) - counts, counts, 16)
    shards = [len({e // 1000 for e in touched_examples(order, rank, 8)}) for rank in range(8)]
    assert max(shards) <= 4  # two lanes, each in one shard or at the end of one
    assert len({e // 1000 for e in touched_examples(order)}) >= 14  # one process reads all lanes
    whole = order.tolist()
    for processes in (1, 2, 3, 8, 12):
        step = {1: 1, 2: 2, 3: 1, 8: 8, 12: 4}[processes]
        for rank in range(processes):
            assert touched_examples(order, rank, processes) == whole[rank % step :: step][:TOUCHED_EXAMPLES]
