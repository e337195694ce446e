"""How much memory and time a merge takes: `python benchmarks/merging.py [--shape gpt2] [--models 7] [--methods ...]`.

Models of a known shape are written to a temporary folder: a base with random weights, and models with small random changes.
Each method merges them in a process of its own. Memory is the resident set, pages of mapped files included, sampled every 5 ms.
`held` is its peak minus what was resident before, in models (bytes of one backbone in float32) and in MB. fisher and regmean
also run the models, on made-up rows. Libraries are loaded before. The bound of the design is two models and one tensor of each
other model.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workload import Memory

METHODS = ("simple-average", "task-arithmetic", "ties", "fisher", "regmean")


def write_models(folder: Path, config: Any, count: int) -> int:
    """A base and `count` models near it, as `AutoModel` folders; returns the bytes of one."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config)
    model.save_pretrained(folder / "base")
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for number in range(count):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(start[name] + 0.01 * torch.randn_like(parameter))
        model.save_pretrained(folder / f"m{number}")
    lines = [f"base: {folder}/base", "models:", *(f"  m{i}: {folder}/m{i}" for i in range(count))]
    (folder / "pool.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return sum(p.numel() * 4 for p in model.parameters())


def merge_once(folder: Path, method: str) -> None:
    """Merge the pool in `folder`, from files to a model in memory."""
    import torch
    import transformers

    from kd.common.progress import final
    from kd.common.settings import make
    from kd.student_trainer.merging.merge_settings import MergeSettings
    from kd.student_trainer.merging.merge_statistics import RowModel
    from kd.student_trainer.merging.merger import prepared_merger
    from kd.student_trainer.merging.pool import PoolModel, read_pool
    from kd.student_trainer.merging.stored_weights import skeleton

    def load_rows(model: PoolModel) -> RowModel:
        whole = transformers.AutoModel.from_pretrained(model.path)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, whole.config.vocab_size, (2, 16), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return RowModel(whole, lambda batch: whole(**batch).last_hidden_state[:, -1, :3], [batch])

    pool = read_pool(folder / "pool.yaml")
    with tempfile.TemporaryDirectory(dir=folder) as statistics:
        settings = make(MergeSettings, {"method": method})
        merger = final(prepared_merger(pool, settings, folder=Path(statistics), load_rows=load_rows))
        merger.apply(skeleton(pool, device="cpu"))


def worker(folder: Path, method: str) -> dict[str, float]:
    """Merge in this process; returns the peak in bytes and the seconds."""
    import torch

    torch.set_num_threads(1)
    merge_once(folder / "small", method)  # libraries are loaded and warm
    memory, started = Memory(), time.perf_counter()
    merge_once(folder, method)
    seconds = time.perf_counter() - started
    return {"held": memory.stop() * 2**20, "seconds": seconds}


def measure_shape(config: Any, count: int, methods: tuple[str, ...]) -> dict[str, Any]:
    """Every method on `count` models of one shape, each in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        small = type(config)(**config.to_dict() | {"n_embd": 64, "n_layer": 1, "n_head": 1, "vocab_size": 500})
        write_models(Path(name) / "small", small, count)
        size = write_models(Path(name), config, count)
        rows = {}
        for method in methods:
            done = subprocess.run(
                [sys.executable, __file__, "--worker", name, method], capture_output=True, text=True, check=True
            )
            rows[method] = json.loads(done.stdout.splitlines()[-1])
    return {"bytes": size, "models": count, "methods": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="gpt2-mini")
    parser.add_argument("--models", type=int, default=7)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--worker", nargs=2)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(worker(Path(options.worker[0]), options.worker[1])))
        return
    from kd.models.shapes import SHAPES

    measured = measure_shape(SHAPES[options.shape](), options.models, tuple(options.methods.split(",")))
    print(f"{options.models} models of {options.shape}, {measured['bytes'] / 1e6:,.0f} MB each\n")
    print("| method | held, models | held, MB | seconds |\n|---|---|---|---|")
    for method, row in measured["methods"].items():
        print(f"| {method} | {row['held'] / measured['bytes']:.2f} | {row['held'] / 1e6:,.0f} | {row['seconds']:.1f} |")


if __name__ == "__main__":
    main()
