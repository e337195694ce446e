"""How many rows of the output layer to compute at once, and what selecting from them costs.

    python benchmarks/chunks.py --width 256 --vocabulary 50257 --rows 2048

Teacher side: output layer, then top-k, normalisers, gold rank, per chunk size; against log_softmax and top-k on the
full tensor. Student side: `chunked_head_loss` with KL, forward and backward. Ratios to the fastest of each side,
median of `--repeats` turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from kd.cache_builder.sparsify import Sparsifier
from kd.cache_builder.targets import TargetConfig
from kd.student_trainer.head import chunked_head_loss
from kd.student_trainer.losses import LossTargets, Objective

SIZES = (32, 64, 128, 256, 512, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.manual_seed(0)
    hidden = torch.randn(args.rows, args.width)
    weight = torch.randn(args.vocabulary, args.width) * 0.05
    gold = torch.randint(args.vocabulary, (args.rows,))
    sparsify = Sparsifier(TargetConfig(), args.vocabulary)
    chunk = sparsify(hidden @ weight.T, gold)
    assert chunk.relative is not None
    log_p = (chunk.relative - chunk.log_z[:, :1]).clone()
    targets = LossTargets(gold, chunk.token_ids, log_p, 1 - log_p.exp().sum(1))

    def teacher(size: int) -> Callable[[], None]:
        def run() -> None:
            with torch.inference_mode():
                for start in range(0, args.rows, size):
                    part = slice(start, start + size)
                    sparsify(hidden[part] @ weight.T, gold[part])

        return run

    def full() -> None:
        with torch.inference_mode():
            (hidden @ weight.T).log_softmax(1).topk(64)

    def student(size: int) -> Callable[[], None]:
        def run() -> None:
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            chunked_head_loss(h, w, None, Objective(), targets, vocabulary_size=args.vocabulary, chunk=size)[
                0
            ].backward()

        return run

    sides = {
        "teacher": {**{str(s): teacher(s) for s in SIZES}, "full log_softmax + top-k": full},
        "student": {str(s): student(s) for s in SIZES},
    }
    for side, cases in sides.items():
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(args.repeats):
            for name, run in cases.items():
                started = time.perf_counter()
                run()
                times[name].append(time.perf_counter() - started)
        middle = {name: statistics.median(values) for name, values in times.items()}
        best = min(middle.values())
        print(side + ": " + ", ".join(f"{name} {value / best:.2f}" for name, value in middle.items()))


if __name__ == "__main__":
    main()
