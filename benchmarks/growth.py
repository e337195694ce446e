"""How cost grows with k, vocabulary, sequence length, rows, rows per batch, and workers; `peers.py` runs this and draws it.

    python benchmarks/growth.py k            # one line of JSON: x, and per x the CPU microseconds per row of each stage

    build      the whole stage one, from a loaded teacher to committed shards
    read       opening, verifying and decoding the cache
    kl         a training step from the cache, reading included
    plain      the same student's step on transformers' cross-entropy

Teacher and student are one random GPT-2 of width 64 and two layers, so that the vocabulary's share stands out. One size changes
at a time. Of the workers, which are processes with `--shard i/n`, all that each
does is counted (text, fingerprints, loading, building): the busiest one, and all together.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from workload import (
    CachedStudent,
    batches_of,
    build_cache,
    load_model,
    make_model,
    make_texts,
    one_thread,
    train_plain,
)

WIDTH, LAYERS = 64, 2
SHARD_ROWS = 1024
"""Of the workers' cache: eight texts of 128 tokens to a shard, 16 shards, so that four workers have equal parts."""


@dataclass(frozen=True)
class Point:
    """One set of sizes."""

    top_k: int = 64
    vocabulary: int = 8192
    length: int = 128
    """Tokens of every text"""
    batch: int = 512
    """Rows of a batch, of the teacher's pass and of a step"""
    tokens: int = 2048
    """Of all texts"""
    workers: int = 1


AXES: dict[str, tuple[str, tuple[int, ...]]] = {
    "k": ("top_k", (16, 32, 64, 128, 256)),
    "vocabulary": ("vocabulary", (2048, 8192, 32768, 131072)),
    "length": ("length", (64, 128, 256, 512)),
    "rows": ("tokens", (2048, 8192, 32768)),
    "batch": ("batch", (128, 256, 512, 1024, 2048)),
    "workers": ("workers", (1, 2, 4)),
}
"""Name -> field of `Point` and its values."""


def measure(point: Point, work: Path) -> dict[str, float]:
    """CPU microseconds per row of each stage, and bytes per row."""
    import torch

    model, texts = work / f"model-{point.vocabulary}", work / f"texts-{point.length}-{point.tokens}.jsonl"
    if not model.exists():
        make_model(model, point.vocabulary, WIDTH, LAYERS)
    if not texts.exists():
        make_texts(texts, point.tokens // point.length, point.length)
    teacher, out = load_model(model).eval(), work / "cache"
    batches = batches_of(texts, max(1, point.batch // point.length))
    count = min(2, len(batches))
    scored = count * len(batches[0]) * point.length
    plan, steps = build_cache(model, texts, out, batch_tokens=point.batch, top_k=point.top_k, model=teacher)
    rows = plan.manifest.rows
    costs = {"build": cpu(list, steps) / rows, "read": cpu(read_all, out) / rows}
    costs["bytes"] = sum(p.stat().st_size for p in out.rglob("*") if p.is_file()) / rows
    student = CachedStudent(model, out, "kl")
    student.train(1, point.batch)  # allocates the optimizer's state
    costs["kl"] = cpu(student.train, count, point.batch) / scored
    plain = load_model(model).train()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-5)
    train_plain(plain, optimizer, batches[:1])
    costs["plain"] = cpu(train_plain, plain, optimizer, batches[:count]) / scored
    shutil.rmtree(out)
    return costs


def read_all(cache: Path) -> None:
    from kd.cache_builder.store.readers.reader import CacheReader

    reader = CacheReader(cache)
    reader.read(range(len(reader)))


def cpu(work: Callable[..., Any], *arguments: Any) -> float:
    """CPU microseconds of a call, all threads."""
    started = time.process_time()
    work(*arguments)
    return 1e6 * (time.process_time() - started)


def measure_workers(point: Point, work: Path) -> dict[str, float]:
    """CPU microseconds per row of the busiest worker and of all."""
    model, texts = work / "model", work / "texts.jsonl"
    if not model.exists():
        make_model(model, point.vocabulary, WIDTH, LAYERS)
        make_texts(texts, point.tokens // point.length, point.length)
    command = [sys.executable, __file__, "worker", "--work", str(work), "--shard"]
    running = [
        subprocess.Popen([*command, f"{i + 1}/{point.workers}"], stdout=subprocess.PIPE, text=True, env=one_thread())
        for i in range(point.workers)
    ]
    answers = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise SystemExit("a worker failed")
    if not (work / "cache" / "manifest.json").exists():
        raise SystemExit("the workers left the cache incomplete")
    shutil.rmtree(work / "cache")
    spent = [float(answer.splitlines()[-1]) / point.tokens for answer in answers]
    return {"busiest worker": max(spent), "all workers": sum(spent)}


def worker(work: Path, shard: tuple[int, int]) -> float:
    """Build every n-th shard; CPU microseconds."""
    import kd.cache_builder.teacher.teacher_pass  # noqa: F401  # imports are not what grows

    model = load_model(work / "model").eval()

    def run() -> None:
        for _ in build_cache(
            work / "model",
            work / "texts.jsonl",
            work / "cache",
            batch_tokens=512,
            shard=shard,
            shard_rows=SHARD_ROWS,
            model=model,
        )[1]:
            pass

    return cpu(run)


def grow(axis: str, work: Path, *, values: tuple[int, ...] | None = None, turns: int = 2) -> dict[str, Any]:
    """`x` and, per line, the medians over the turns."""
    field, default = AXES[axis]
    x = values or default
    base = Point(tokens=16384, vocabulary=32768) if axis == "workers" else Point()
    points = [replace(base, **{field: value}) for value in x]
    function = measure_workers if axis == "workers" else measure
    if axis != "workers":
        measure(points[0], work)  # what is done once in a process, such as imports
    measured = [[function(point, work) for point in points] for _ in range(turns)]
    lines = {
        name: [statistics.median(turn[i][name] for turn in measured) for i in range(len(x))] for name in measured[0][0]
    }
    return {"x": list(x), "lines": lines}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("axis", choices=(*AXES, "worker"))
    parser.add_argument("--values", help="sizes instead of the axis's own, separated by commas")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.axis == "worker":
        index, count = map(int, args.shard.split("/"))
        print(worker(args.work, (index, count)))
        return
    values = tuple(map(int, args.values.split(","))) if args.values else None
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(grow(args.axis, Path(folder), values=values, turns=args.turns)))


if __name__ == "__main__":
    main()
