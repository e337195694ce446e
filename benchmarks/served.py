"""A served teacher against the same teacher in this process: rows per second of the pass alone, taking turns.

    vllm serve FOLDER --max-logprobs 64 --dtype float32          # on the same machine
    python benchmarks/served.py --teacher FOLDER --url http://localhost:8000/v1 --data TEXT

Each turn scores the same rows into a cache of its own, which is removed. The first turn warms the server up and is not counted.
The largest difference between the log-probabilities of both is printed too: they are of one model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_settings import build_of
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.memory import share_one_heap
from kd.common.settings import make


def turn(out: Path, settings: dict[str, Any]) -> tuple[float, np.ndarray]:
    """Rows per second of the pass, and the log-probabilities `[N, k]`."""
    last = build_of(make(BuildSettings, settings | {"out": str(out), "reuse": False, "logprob_codec": "float32"}))
    reader = CacheReader(out)
    kept = [reader[i].targets.logprobs for i in range(len(reader))]
    assert last.seconds is not None
    seconds = sum(last.seconds[part] for part in ("forward", "head", "select"))
    return reader.manifest.rows / seconds, np.concatenate([k for k in kept if k is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="folder of the model")
    parser.add_argument("--url", required=True, help="server that runs it")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    share_one_heap()
    common = {"teacher": args.teacher, "spec": args.data, "limit": args.limit, "seq_len": args.seq_len}
    common |= {"top_k": args.top_k, "dtype": "float32"}
    kinds = {"transformers": common | {"temperatures": (1.0,)}, "server": common | {"teacher_url": args.url}}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.turns + 1):
            values = {}
            for name, settings in kinds.items():
                rate, values[name] = turn(Path(folder) / f"{name}-{number}", settings)
                if number:
                    rates[name].append(rate)
            apart = float(np.abs(values["server"] - values["transformers"]).max())
    for name, measured in rates.items():
        print(
            f"{name:<13}{statistics.median(measured):8,.0f} rows/s   of {', '.join(f'{rate:,.0f}' for rate in measured)}"
        )
    ratio = statistics.median(a / b for a, b in zip(rates["server"], rates["transformers"], strict=True))
    print(f"server / transformers {ratio:.2f}, {len(values['server']):,} rows, largest difference {apart:.1e} nats")


if __name__ == "__main__":
    main()
