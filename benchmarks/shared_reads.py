"""How often the shards of a cache are loaded when several processes share an epoch: `python benchmarks/shared_reads.py CACHE`.

Every process is a reader of its own, which reads its micro-batches of the plan to the last one, as ranks of a training do. What is
counted is each time that a reader opens and verifies a shard's files; `repeated` are those of shards that it had loaded before.
`kd cache build --shard-rows 128` makes a cache of some hundred shards of 6,000 lines.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.cache_builder.store import shard_store
from kd.cache_builder.store.cache_files import CacheFiles
from kd.cache_builder.store.readers.example_lengths import ExampleLengths
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.student_trainer.batches.batch_plan import plan_batches
from kd.student_trainer.batches.example_sizes import ExampleSizes


def loads(cache: Path, processes: int, **rule: Any) -> Counter[tuple[int, int]]:
    """(process, shard) -> how often it was loaded."""
    counted, current, read_shard = Counter[tuple[int, int]](), 0, shard_store.read_shard

    def counting(
        files: CacheFiles, manifest: CacheManifest, index: int, names: Sequence[str] | None = None
    ) -> shard_store.Shard:
        counted[current, index] += 1
        return read_shard(files, manifest, index, names)

    shard_store.read_shard = counting
    try:
        for current in range(processes):
            reader = CacheReader(cache)
            plan = plan_batches(reader, ExampleSizes(ExampleLengths(reader)), seed=0, multiple_of=processes, **rule)
            for number, batch in enumerate(plan):
                if number % processes == current:
                    reader.read(batch.examples)
    finally:
        shard_store.read_shard = read_shard
    return counted


def main() -> None:
    """Count for several numbers of processes, with batches by count and by tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--processes", type=int, action="append")
    args = parser.parse_args()
    shards = len(CacheReader(args.cache).manifest.shards)
    for processes in args.processes or (1, 8):
        for rule in ({"batch_size": 4}, {"tokens_per_batch": 64}):
            counted = loads(args.cache, processes, **rule)
            repeated = sum(times - 1 for times in counted.values())
            share = counted.total() / shards
            print(
                f"{processes} processes, {rule}: {counted.total()} loads of {shards} shards, {share:.3f}, {repeated} repeated"
            )


if __name__ == "__main__":
    main()
