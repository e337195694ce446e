"""The order of examples at scale: time and memory to the first batch, what processes read, and how well an epoch is mixed.

    python benchmarks/order.py                      # a billion examples, 300,000 shards
    python benchmarks/order.py --shards 2000 --examples 64

Nothing is read from a disk: shards are numbers of examples, and lengths are made up (log-normal, at most 512 tokens). Reading is
counted as (process, shard) pairs, relative to the number of shards. Mixing is the variance of the mean of some consecutive examples
relative to a full shuffle, of a value that all examples of a shard share, which is the worst there is. `windows` is the order of
earlier versions.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np

from kd.cache_builder.store.readers.epoch_order import EpochOrder, epoch_order
from kd.student_trainer.batches.batch_plan import plan_batches

LANES = 16


class Cache:
    """As much of a reader as a plan needs."""

    def __init__(self, counts: np.ndarray) -> None:
        self.counts = counts
        self.ends = np.cumsum(counts)

    def epoch_order(self, seed: int, epoch: int) -> EpochOrder:
        return epoch_order(seed, epoch, self.ends - self.counts, self.counts, LANES)

    def shards_of(self, examples: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.ends, examples, side="right")


class Lengths:
    """Made-up lengths that are looked up by a hash of the example's number: a billion of them need no memory."""

    def __init__(self, count: int) -> None:
        rng = np.random.default_rng(0)
        self.count, self.table = count, np.minimum(rng.lognormal(4.5, 0.7, 2**16).astype(np.int64) + 1, 512)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, examples: np.ndarray) -> np.ndarray:
        lengths: np.ndarray = self.table[examples * 40503 % 2**16]
        return lengths


def windows(cache: Cache, seed: int) -> np.ndarray:
    """The order of the first release: windows of 16 shards, each shuffled as a whole."""
    rng = np.random.default_rng(seed)
    shards = rng.permutation(len(cache.counts))
    starts = cache.ends - cache.counts
    parts = [
        rng.permutation(np.concatenate([np.arange(starts[s], cache.ends[s]) for s in shards[first : first + LANES]]))
        for first in range(0, len(shards), LANES)
    ]
    return np.concatenate(parts)


def clock(what: str, started: tuple[float, float]) -> None:
    wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what:<58}{wall:>9.2f} s{cpu:>9.2f} CPU-s{peak:>8.0f} MB")


def first_batches(cache: Cache) -> None:
    """The first micro-batch, one in the middle, and the speed of laying out."""
    lengths, size = Lengths(int(cache.ends[-1])), int(cache.ends[-1])
    print(
        f"{size:,} examples in {len(cache.counts):,} shards, 8 micro-batches to a step; memory is the peak of the process"
    )
    started = time.perf_counter(), time.process_time()
    by_count = plan_batches(cache, lengths, seed=0, batch_size=16, multiple_of=8)
    print(f"{len(by_count):,} micro-batches of 16 examples", end=": ")
    by_count[0]
    clock("first", started)
    started = time.perf_counter(), time.process_time()
    by_count[len(by_count) // 2]
    clock("one in the middle", started)
    started = time.perf_counter(), time.process_time()
    by_tokens = plan_batches(cache, lengths, seed=0, tokens_per_batch=4096, multiple_of=8, count=8 * 10_000)
    by_tokens[0]
    clock("first of 4,096 tokens", started)
    started = time.perf_counter(), time.process_time()
    laid_out = sum(len(batch.examples) for batch in by_tokens)
    clock(f"80,000 micro-batches of 4,096 tokens, {laid_out:,} examples", started)
    print(f"{'':<4}{1e6 * (time.process_time() - started[1]) / laid_out:.2f} us an example")


def reading(cache: Cache) -> None:
    """How much more several processes read than one."""
    lengths = Lengths(int(cache.ends[-1]))
    print(f"\nshards read by all processes together, of {len(cache.counts):,}")
    for processes in (2, 4, 8, 16, 32):
        shares = []
        for cut in ({"batch_size": 16}, {"tokens_per_batch": 4096}):
            plan = plan_batches(cache, lengths, seed=0, multiple_of=processes, **cut)  # type: ignore[arg-type]
            read = np.zeros((processes, len(cache.counts)), dtype=bool)
            for number, batch in enumerate(plan):
                read[number % processes, cache.shards_of(np.array(batch.examples))] = True
            shares.append(read.sum() / len(cache.counts))
        print(f"{processes:>4} processes{shares[0]:>8.3f} by count{shares[1]:>8.3f} by tokens")


def mixing(cache: Cache) -> None:
    value = np.random.default_rng(1).normal(size=len(cache.counts))
    orders = {"lanes": cache.epoch_order(0, 0)[:], "windows": windows(cache, 0)}
    orders["full"] = np.random.default_rng(2).permutation(int(cache.ends[-1]))
    print(f"\nvariance of a mean over consecutive examples, relative to a full shuffle\n{'':<10}", end="")
    sizes = (16, 32, 64, 128, 256, 512, 1024)
    print("".join(f"{n:>9}" for n in sizes))
    spread = np.repeat(value, cache.counts).var()
    for name, order in orders.items():
        values = value[cache.shards_of(order)]
        cells = []
        for n in sizes:
            whole = len(values) // n * n
            cells.append(values[:whole].reshape(-1, n).mean(1).var() * n / spread)
        print(f"{name:<10}" + "".join(f"{c:>9.2f}" for c in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=300_000)
    parser.add_argument("--examples", type=int, default=3400, help="examples of a shard, on average")
    parser.add_argument(
        "--counted-shards", type=int, default=4000, help="shards of the cache that is laid out whole, of 32 examples"
    )
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    first_batches(Cache(rng.integers(args.examples // 2, args.examples * 3 // 2, args.shards)))
    small = Cache(rng.integers(16, 48, args.counted_shards))
    reading(small)
    mixing(small)


if __name__ == "__main__":
    main()
