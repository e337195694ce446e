"""The same top-64 rows through kd, mosaicml-streaming and `datasets` streaming: epochs of shuffled batches of 16 examples.

    python benchmarks/reader_peers.py --peers-python ~/venvs/peers/bin/python     # it has mosaicml-streaming and datasets

    kd          `CacheReader` and `Collator` for --loss kl: digests compared, decoded, the exact tail; 8 bits a log-probability
    streaming   MDS shards, uncompressed, shuffled by its default (py1e): uint16 ids, float16 log-probabilities, nothing compared
    streaming8  the same with 8 bits a log-probability between a row's first and last, as kd stores them
    mds-zstd    streaming8, compressed with zstd; its first epoch decompresses every shard into a folder of this disk
    parquet     the arrays of `streaming` as columns of lists, zstd, in shuffled files with a buffer of 1,000 examples; without
                workers alone, because a forked worker of it does not end

In the process of the loop (0 workers), and with one and two workers of a `DataLoader`. Both epochs open everything anew, so that no
rows are in memory already; in the first, libraries are loaded that are imported late. CPU time is that of the process and its
workers, after the imports; `cold` files are dropped from the page cache before. Every reading is a process of its own; they take
turns. Rows are the made-up ones of `bench.py --only read`. The last lines say what no reader of the cache can go below: its files
read, compared with their digests, and decompressed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

BATCH, TOP_K = 16, 64
READERS = ("kd", "streaming", "streaming8", "mds-zstd", "parquet")
WORKERS = (0, 1, 2)


def cpu_seconds() -> float:
    """CPU time of this process, of its children that have ended, and of those that live."""
    ended = sum(
        u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )
    ticks = 0
    for children in Path("/proc/self/task").glob("*/children"):
        for child_id in children.read_text().split():
            fields = Path(f"/proc/{child_id}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ended + ticks / os.sysconf("SC_CLK_TCK")


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def forget(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def write_kd(work: Path, rows: int) -> None:
    """The cache, and its rows as plain arrays for the others."""
    from bench import make_model, make_read_cache

    from kd.cache_builder.store.readers.reader import CacheReader

    make_model(work / "model", "small")
    make_read_cache(work, rows)
    (work / "read").rename(work / "kd")
    reader = CacheReader(work / "kd")
    targets = [e.targets for e in reader.read(range(len(reader)))]
    np.savez(
        work / "rows.npz",
        lengths=np.array([len(t) for t in targets]),
        gold=np.concatenate([t.gold_ids for t in targets]).astype(np.uint16),
        ids=np.concatenate([t.token_ids for t in targets if t.token_ids is not None]).astype(np.uint16),
        logprobs=np.concatenate([t.logprobs for t in targets if t.logprobs is not None]).astype(np.float16),
    )


def examples_of(work: Path) -> list[dict[str, np.ndarray]]:
    with np.load(work / "rows.npz") as arrays:
        cuts = np.cumsum(arrays["lengths"])[:-1]
        columns = {name: np.split(arrays[name], cuts) for name in ("gold", "ids", "logprobs")}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def write_mds(work: Path, name: str, *, bits: int, compression: str | None = None) -> None:
    streaming: Any = importlib.import_module("streaming")

    columns = {"gold": "ndarray:uint16", "ids": "ndarray:uint16", "logprobs": "ndarray:float16"}
    if bits == 8:
        columns |= {"logprobs": "ndarray:uint8", "ends": "ndarray:float16"}
    with streaming.MDSWriter(out=str(work / name), columns=columns, compression=compression) as out:
        for example in examples_of(work):
            out.write(example if bits == 16 else in_bytes(example))


def in_bytes(example: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The example with its log-probabilities in 8 bits between the first and the last of each row."""
    values = example["logprobs"].reshape(-1, TOP_K).astype(np.float32)
    ends = values[:, [0, -1]]
    steps = (ends[:, :1] - values) / np.maximum(ends[:, :1] - ends[:, 1:], 1e-9) * 255
    return example | {"logprobs": np.rint(steps).astype(np.uint8), "ends": ends.astype(np.float16)}


def write_parquet(work: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (work / "parquet").mkdir()
    examples = examples_of(work)
    for number, first in enumerate(range(0, len(examples), 32)):
        part = examples[first : first + 32]
        table = pa.table({name: [e[name].ravel() for e in part] for name in part[0]})
        pq.write_table(table, work / "parquet" / f"{number:05d}.parquet", compression="zstd")


def loader_kd(work: Path, workers: int) -> Any:
    from torch.utils.data import DataLoader

    from kd.cache_builder.store.readers.reader import CacheReader
    from kd.student_trainer.batches.batch_plan import PlannedBatches, plan_batches
    from kd.student_trainer.batches.collate import Collator
    from kd.student_trainer.batches.compatibility import needed_arrays
    from kd.student_trainer.batches.read_ahead import CachedExamples
    from kd.student_trainer.losses.loss_registry import Objective

    reader = CacheReader(work / "kd")
    reader.keep(needed_arrays(Objective(), reader.manifest))
    plan = plan_batches(
        reader, np.ones(len(reader), dtype=np.int64), seed=0, batch_size=BATCH, multiple_of=max(workers, 1)
    )
    return DataLoader(
        CachedExamples(reader),
        batch_sampler=PlannedBatches(plan),
        collate_fn=Collator(Objective()),
        num_workers=workers,
    )


def stacked(examples: Any) -> dict[str, Any]:
    """Examples of NumPy arrays as the tensors that a loss takes."""
    import torch

    logprobs = np.concatenate([e["logprobs"].reshape(-1, TOP_K) for e in examples]).astype(np.float32)
    if "ends" in examples[0]:
        ends = np.concatenate([e["ends"].reshape(-1, 2) for e in examples]).astype(np.float32)
        logprobs *= (ends[:, 1:] - ends[:, :1]) / 255
        logprobs += ends[:, :1]
    return {
        "gold_ids": torch.from_numpy(np.concatenate([e["gold"].reshape(-1) for e in examples]).astype(np.int64)),
        "token_ids": torch.from_numpy(np.concatenate([e["ids"].reshape(-1, TOP_K) for e in examples]).astype(np.int32)),
        "logprobs": torch.from_numpy(logprobs),
    }


def loader_mds(work: Path, name: str, workers: int) -> Any:
    from torch.utils.data import DataLoader

    streaming: Any = importlib.import_module("streaming")
    places = {"local": str(work / name)}
    if name == "mds-zstd":  # decompressed files do not lie beside the others
        places = {"remote": str(work / name), "local": str(work / "mds-plain")}
    data = streaming.StreamingDataset(**places, shuffle=True, batch_size=BATCH)
    return DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=stacked)


def loader_parquet(work: Path, workers: int) -> Any:
    from datasets import load_dataset
    from torch.utils.data import DataLoader

    files = sorted(map(str, (work / "parquet").glob("*.parquet")))
    data = load_dataset("parquet", data_files=files, split="train", streaming=True)
    data = data.shuffle(seed=0, buffer_size=1000).with_format("numpy")
    return DataLoader(data, batch_size=BATCH, num_workers=workers, collate_fn=stacked)


LOADERS: dict[str, Callable[[Path, int], Any]] = {
    "kd": loader_kd,
    **{name: partial(lambda name, work, workers: loader_mds(work, name, workers), name) for name in READERS[1:4]},
    "parquet": loader_parquet,
}
WRITERS: dict[str, Callable[[Path, int], None]] = {
    "kd": write_kd,
    "streaming": lambda work, _: write_mds(work, "streaming", bits=16),
    "streaming8": lambda work, _: write_mds(work, "streaming8", bits=8),
    "mds-zstd": lambda work, _: write_mds(work, "mds-zstd", bits=8, compression="zstd"),
    "parquet": lambda work, _: write_parquet(work),
}


def read(name: str, work: Path, workers: int) -> dict[str, float]:
    """Two epochs: rows, and of each CPU and wall-clock seconds; of the first, seconds to its first batch."""
    import torch

    torch.set_num_threads(1)
    importlib.import_module({"kd": "kd.student_trainer.prepare", "parquet": "datasets"}.get(name, "streaming"))
    figures: dict[str, float] = {"bytes": bytes_of(work / name)}
    shutil.rmtree(work / "mds-plain", ignore_errors=True)
    for epoch in ("first", "further"):
        started, cpu, rows = time.perf_counter(), cpu_seconds(), 0
        loader = LOADERS[name](work, workers)
        for batch in loader:
            if epoch == "first" and not rows:
                figures["first_batch"] = time.perf_counter() - started
            rows += len(batch["gold_ids"])
        figures |= {
            "rows": rows,
            f"{epoch}_cpu": cpu_seconds() - cpu,
            f"{epoch}_seconds": time.perf_counter() - started,
        }
    return figures


def least(work: Path) -> dict[str, float]:
    """CPU seconds of kd's cache for what no reader of it can leave out: reading, digests, decompression."""
    from kd.cache_builder.store.cache_files import LocalFiles
    from kd.cache_builder.store.chunks import decode_shard
    from kd.cache_builder.store.readers.reader import CacheReader
    from kd.cache_builder.store.records.commits import read_commit, shard_files
    from kd.student_trainer.batches.compatibility import needed_arrays
    from kd.student_trainer.losses.loss_registry import Objective

    root, times = work / "kd", dict.fromkeys(("rows", "read", "digests", "decompress"), 0.0)
    manifest, files = CacheReader(root).manifest, LocalFiles(root)
    needed = needed_arrays(Objective(), manifest)
    for _ in range(2):  # the first time, libraries are loaded
        times = dict.fromkeys(times, 0.0) | {"rows": manifest.rows}
        for index, (_, _, rows) in enumerate(manifest.shards):
            record, paths = read_commit(root, manifest, index), shard_files(manifest.arrays, index)
            for spec in manifest.arrays:
                if spec.name in needed:
                    begun = time.process_time()
                    (root / paths[spec.name]).read_bytes()
                    was_read = time.process_time()
                    data = files.verified_bytes(paths[spec.name], record.files[paths[spec.name]])
                    verified = time.process_time()
                    decode_shard(data, spec, manifest.layout, rows)
                    times["read"] += was_read - begun
                    times["digests"] += verified - was_read - (was_read - begun)
                    times["decompress"] += time.process_time() - verified
    return times


def child(python: str, *arguments: str) -> Any:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run([python, __file__, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr[-1500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def case(name: str, work: Path, what: str, rows: int) -> dict[str, float]:
    if what == "write":
        WRITERS[name](work, rows)
        return {}
    return least(work) if what == "least" else read(name, work, int(what))


def show(results: dict[tuple[str, str, int], list[dict[str, float]]]) -> None:
    head = f"{'files':<6}{'reader':<12}{'workers':>8}{'rows/CPU-s':>12}{'first epoch':>13}{'rows/s':>11}"
    print(f"{head}{'first batch, s':>16}{'bytes/row':>11}")
    for (files, name, workers), turns in results.items():
        by_cpu, at_first, by_clock = (
            statistics.median(t["rows"] / t[key] for t in turns)
            for key in ("further_cpu", "first_cpu", "further_seconds")
        )
        batch, size = statistics.median(t["first_batch"] for t in turns), turns[0]["bytes"] / turns[0]["rows"]
        print(
            f"{files:<6}{name:<12}{workers:>8}{by_cpu:>12,.0f}{at_first:>13,.0f}{by_clock:>11,.0f}{batch:>16.2f}{size:>11.1f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers-python", metavar="PATH", help="interpreter that has mosaicml-streaming and datasets")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--rows", type=int, default=830_000, help="about so many rows; what two workers need to share shards"
    )
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(case(args.case[0], Path(args.case[1]), args.case[2], args.rows)))
        return
    pythons = {name: sys.executable if name == "kd" else args.peers_python for name in READERS}
    names = [name for name, python in pythons.items() if python]
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            child(pythons[name], "--case", name, work, "write", "--rows", str(args.rows))
        results: dict[tuple[str, str, int], list[dict[str, float]]] = {}
        for turn in range(args.repeats):
            for workers, files, name in product(WORKERS, ("cold", "warm"), names):
                if workers and name == "parquet":  # pyarrow's threads do not survive the fork: it waits for ever
                    continue
                if files == "cold":
                    forget(Path(work) / name)
                figures = child(pythons[name], "--case", name, work, str(workers))
                results.setdefault((files, name, workers), []).append(figures)
                print(turn, files, workers, name, figures, file=sys.stderr)
        show(results)
        bound = child(sys.executable, "--case", "kd", work, "least")
        spent = sum(bound[key] for key in ("read", "digests", "decompress"))
        parts = ", ".join(f"{key} {bound[key] / spent:.0%}" for key in ("read", "digests", "decompress"))
        print(f"kd's files alone: {bound['rows'] / spent:,.0f} rows/CPU-s ({parts})")


if __name__ == "__main__":
    main()
