"""How fast damage is found: `verify` against hashing the same files, CPU seconds and wall clock, taking turns.

python benchmarks/verify.py CACHE --repeats 5
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from kd.cache_builder.upkeep.verify import verify
from kd.common.files import sha256_of
from kd.common.progress import final


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    files = [p for p in args.cache.rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files)

    def drain(promises: bool) -> None:
        if findings := final(verify(args.cache, promises=promises)):
            raise SystemExit(f"this cache is damaged: {findings[0]}")

    cases: dict[str, Callable[[], object]] = {
        "read": lambda: [p.read_bytes() for p in files],
        "sha256": lambda: [sha256_of(p) for p in files],
        "verify --checksums": lambda: drain(False),
        "verify": lambda: drain(True),
    }
    times_of: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    for turn in range(args.repeats + 1):
        for name, case in cases.items():
            wall, cpu = time.perf_counter(), time.process_time()
            case()
            if turn:  # the first brings the files into memory
                times_of[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    print(f"{size / 1e6:.1f} MB in {len(files)} files")
    for name, times in times_of.items():
        cpu, wall = (min(column) for column in zip(*times, strict=True))
        print(f"{name:<20}{size / 1e6 / cpu:10,.2f} MB per CPU-second{size / 1e6 / wall:10,.2f} MB/s")


if __name__ == "__main__":
    main()
