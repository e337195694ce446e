"""A served teacher against the same teacher in this process: rows per second of the pass alone, taking turns.

    python benchmarks/served.py --vllm ~/venvs/vllm/bin/vllm                                   # all of it, on a CPU
    python benchmarks/served.py --teacher FOLDER --url http://localhost:8000/v1 --data TEXT    # a server that is up already

With --vllm the script writes a Llama of 29 M random parameters, has that vLLM serve it on a CPU with one thread, and stops it.

Each turn scores the same rows into a cache of its own, which is removed. The first turn warms the server up and is not counted.
The largest difference between the log-probabilities of both is printed too: they are of one model.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_settings import build_of
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.memory import share_one_heap
from kd.common.settings import make

ON_A_CPU = {
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
}
START_SECONDS = 600


def write_llama(folder: Path) -> None:
    """A Llama of random weights with peaked predictions, whose head dimension vLLM's CPU attention knows."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from kd.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("demo")
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
    }
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(**size, **ends, vocab_size=len(tokenizer), tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def served(vllm: str, folder: Path, top_k: int, seq_len: int) -> Iterator[str]:
    """The address of a vLLM server that runs the model, while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--dtype", "float32", "--enforce-eager", "--max-logprobs", str(top_k)]
    command = [vllm, "serve", str(folder), *options, "--max-model-len", str(seq_len + 8)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ON_A_CPU
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    url, until = f"http://127.0.0.1:{port}/v1", time.monotonic() + START_SECONDS
    try:
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{url}/models", timeout=2):
                break
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"vLLM did not start:\n{(folder / 'server.log').read_text(errors='replace')[-2000:]}")
            time.sleep(1)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its engine is a process of its own
        process.wait()


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
    parser.add_argument("--vllm", metavar="PATH", help="vLLM's command, to start a server and to stop it")
    parser.add_argument("--teacher", help="folder of the model; with --vllm, a small Llama by default")
    parser.add_argument("--url", help="server that runs it already")
    parser.add_argument("--data", default="demo")
    parser.add_argument("--limit", type=int, default=40)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    if (args.vllm is None) == (args.url is None) or (args.url is not None and args.teacher is None):
        parser.error("give --vllm, or --url with --teacher")
    share_one_heap()
    with tempfile.TemporaryDirectory() as folder:
        if args.url is not None:
            compare(args, args.teacher, args.url, Path(folder))
            return
        teacher = Path(args.teacher or Path(folder) / "llama")
        if args.teacher is None:
            write_llama(teacher)
        with served(args.vllm, teacher, args.top_k, args.seq_len) as url:
            compare(args, str(teacher), url, Path(folder))


def compare(args: argparse.Namespace, teacher: str, url: str, work: Path) -> None:
    """Take turns, and print the rates of both and their ratio."""
    common = {"teacher": teacher, "spec": args.data, "limit": args.limit, "seq_len": args.seq_len}
    common |= {"top_k": args.top_k, "dtype": "float32", "device": "cpu"}
    kinds = {"transformers": common | {"temperatures": (1.0,)}, "server": common | {"teacher_url": url}}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(args.turns + 1):
        values = {}
        for name, settings in kinds.items():
            rate, values[name] = turn(work / f"{name}-{number}", settings)
            if number:
                rates[name].append(rate)
        apart = float(np.abs(values["server"] - values["transformers"]).max())
    for name, measured in rates.items():
        each = ", ".join(f"{rate:,.0f}" for rate in measured)
        print(f"{name:<13}{statistics.median(measured):8,.0f} rows/s   of {each}")
    ratio = statistics.median(a / b for a, b in zip(rates["server"], rates["transformers"], strict=True))
    print(f"server / transformers {ratio:.2f}, {len(values['server']):,} rows, largest difference {apart:.1e} nats")


if __name__ == "__main__":
    main()
