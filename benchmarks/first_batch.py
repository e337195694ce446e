"""How soon a training over a huge cache makes its first step, from the start and in mid-epoch: `kd.train`, nothing left out.

    kd cache build --teacher demo --data lines.jsonl --seq-len 64 --shard-rows 32768 --top-k 8 --out small
    python benchmarks/forged_cache.py small giant --shards 240000 --files
    python benchmarks/first_batch.py small giant                     # 16 examples a micro-batch, a whole epoch
    python benchmarks/first_batch.py small giant --tokens 4096       # the steps are counted first
    python benchmarks/first_batch.py small giant --tokens 4096 --steps 100000

Each run is a process of its own, which trains the embedded student until its first line of the log and then stops with a
checkpoint. Seconds are those from the call to that line, so the first step is in them and imports are not. Memory is the peak of
the process, and what it had before the call. The run that is resumed begins in the middle of the epoch: the checkpoint is that of
the first run under another number of steps, because nobody can train a billion examples first.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def run(args: argparse.Namespace) -> None:
    """Train until the first line of the log, and print what that took."""
    import torch  # imports are not counted

    from kd.student_trainer.run_folder import StepRecord
    from kd.student_trainer.training import train

    torch.set_num_threads(1)
    stop, first = threading.Event(), list[tuple[float, float, StepRecord]]()

    @contextmanager
    def stoppable() -> Iterator[threading.Event]:
        yield stop

    def on_step(record: StepRecord) -> None:
        if not first:
            first.append((time.perf_counter() - started, time.process_time() - spent, record))
        stop.set()

    rule: dict[str, Any] = {"tokens_per_batch": args.tokens} if args.tokens else {"batch_size": 16}
    if args.steps:
        rule["max_steps"] = args.steps
    before, started, spent = peak_mb(), time.perf_counter(), time.process_time()
    rule |= {"cache": str(args.caches[0]), "student": "demo", "out": str(args.out), "loss": "kl", "log_every": 1}
    with suppress(KeyboardInterrupt):
        train(resume=args.resume, on_step=on_step, stoppable=stoppable(), **rule)
    seconds, cpu, record = first[0]
    figures = {"step": record.step, "of": record.steps_total, "seconds": seconds, "cpu_seconds": cpu}
    print(json.dumps(figures | {"before_mb": before, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """The peak of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def move_checkpoint(out: Path, tokens: int | None) -> None:
    """Give the checkpoint of a run the number of steps of the middle of its epoch, as if they had been trained."""
    from kd.common.disk.digests import DIGESTS, write_digests
    from kd.student_trainer.run_folder import METRICS
    from kd.student_trainer.saving.checkpoints import BATCHES, checkpoints_of

    (checkpoint,) = checkpoints_of(out)
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    middle = state["max_steps"] // 2
    (checkpoint / "trainer_state.json").write_text(json.dumps(state | {"global_step": middle}))
    lines = [json.loads(line) | {"step": middle} for line in (checkpoint / METRICS).read_text().splitlines()][-1:]
    (checkpoint / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if tokens is not None:
        known = json.loads((checkpoint / BATCHES).read_text())
        known["mark"] = [middle, [middle * 40]]
        (checkpoint / BATCHES).write_text(json.dumps(known))
    (checkpoint / DIGESTS).unlink()
    write_digests(checkpoint)
    checkpoint.rename(out / f"checkpoint-{middle}")


def main() -> None:
    """Run each cache from the start and from its middle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("caches", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("first-batch"))
    parser.add_argument("--tokens", type=int, help="Tokens of a micro-batch, instead of 16 examples.")
    parser.add_argument("--steps", type=int, help="Steps of the run, instead of an epoch.")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        run(args)
        return
    given = {"--tokens": args.tokens, "--steps": args.steps}
    rule = [word for name, value in given.items() if value for word in (name, str(value))]
    for cache in args.caches:
        shutil.rmtree(args.out, ignore_errors=True)
        for resume in ([], ["--resume"]):
            command = [sys.executable, __file__, str(cache), "--out", str(args.out), "--one", *resume, *rule]
            figures = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
            print(cache, "resumed" if resume else "fresh", figures, flush=True)
            if not resume:
                move_checkpoint(args.out, args.tokens)
    shutil.rmtree(args.out)


if __name__ == "__main__":
    main()
