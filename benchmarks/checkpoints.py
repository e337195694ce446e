"""What digests and syncing cost a run: CPU and wall-clock seconds per checkpoint, beside writing it and beside the whole run.

    python benchmarks/checkpoints.py [--student random:gpt2-mini] [--steps 8] [--every 2]

Writing is what transformers' Trainer does; sealing reads every file once more, forces it to disk and writes `digests.json`.
Wall-clock time is mostly the disk's: without sealing, the kernel would write the same bytes some seconds later.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kd.common.settings import make
from kd.student_trainer import trainer
from kd.student_trainer.configuration.train_config import TrainConfig
from kd.student_trainer.training import train


class Meter:
    """Calls of a function, and the seconds that they took."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls, self.wall, self.cpu = function, 0, 0.0, 0.0

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        """The function's own answer."""
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return self.function(*arguments, **more)
        finally:
            self.calls += 1
            self.wall += time.perf_counter() - wall
            self.cpu += time.process_time() - cpu


def measured(cache: str, student: str, out: Path, *, steps: int, every: int) -> dict[str, float | str]:
    """Seconds per checkpoint of writing and of sealing, and the share of sealing in the CPU time of the whole run."""
    module: Any = trainer  # its functions are replaced by measured ones for the time of the run
    ours = module.DistillationTrainer
    before = ours._sealed_checkpoint, module.seal_checkpoint
    write, seal = map(Meter, before)
    values = {
        "cache": cache,
        "student": student,
        "out": str(out),
        "device": "cpu",
        "max_steps": steps,
        "save_every": every,
    }

    def whole(self: Any, *arguments: Any) -> Any:
        return write(self, *arguments)

    ours._sealed_checkpoint, module.seal_checkpoint = whole, seal
    try:
        run = Meter(lambda: train(make(TrainConfig, values | {"batch_size": 8})))
        run()
    finally:
        ours._sealed_checkpoint, module.seal_checkpoint = before
    size = sum(p.stat().st_size for p in (out / f"checkpoint-{steps}").iterdir())
    return {
        "student": student,
        "checkpoints": seal.calls,
        "checkpoint_mb": size / 1e6,
        "write_cpu": (write.cpu - seal.cpu) / seal.calls,
        "seal_cpu": seal.cpu / seal.calls,
        "write_wall": (write.wall - seal.wall) / seal.calls,
        "seal_wall": seal.wall / seal.calls,
        "run_cpu_ratio": run.cpu / (run.cpu - seal.cpu),
        "run_wall_ratio": run.wall / (run.wall - seal.wall),
    }


def main() -> None:
    """Build a small cache, train from it, and print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="random:gpt2-mini")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--every", type=int, default=2)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["KD_HOME"] = str(Path(folder) / "home")
        from kd.cache_builder.build.build_settings import BuildSettings
        from kd.cache_builder.build.builder import build
        from kd.cache_builder.build.from_settings import request_of
        from kd.cache_builder.build.plan import plan_build

        cache = Path(folder) / "cache"
        values = {"teacher": "demo", "spec": "demo", "limit": 30, "out": cache, "device": "cpu"}
        for _ in build(plan_build(request_of(make(BuildSettings, values)))):
            pass
        figures = measured(str(cache), given.student, Path(folder) / "run", steps=given.steps, every=given.every)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
