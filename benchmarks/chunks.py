"""How many rows of the output layer to compute at once, and what selecting from them costs.

    python benchmarks/chunks.py --width 256 --vocabulary 50257 --rows 2048

Teacher side: output layer, then top-k, normalisers, gold rank, per chunk size; against log_softmax and top-k on the full
tensor. Head: the output layer alone, as a teacher's pass takes it, and by `torch.mm` into a reused buffer. Select: what follows
on 256 rows, per rows worked through at once. Top-k: by threshold and by `torch.topk`. Student side: `chunked_head_loss` with KL,
forward and backward. Microseconds of CPU time per row, median of `--repeats` turns; with OMP_NUM_THREADS=1 other work on the
machine hardly shows in them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.models.heads import LanguageModelHead
from kd.models.top_k import top_k_by_threshold, top_k_by_topk
from kd.student_trainer.head import chunked_head_loss
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_targets import LossTargets

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
                    sparsify(output.logits(hidden[part]), gold[part])

        return run

    def head(size: int, by: Callable[[torch.Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, args.rows, size):
                by(hidden[start : start + size])

        return run

    def select(rows: int) -> Callable[[], None]:
        blocks = Sparsifier(TargetConfig(), args.vocabulary, block_rows=rows)

        def run() -> None:
            for _ in range(args.rows // 256):
                blocks(logits, gold[:256])

        return run

    def top_k(by: Callable[..., object]) -> Callable[[], None]:
        def run() -> None:
            for r in range(0, 256, 16):
                for _ in range(args.rows // 256):
                    by(logits[r : r + 16], 64)

        return run

    def reused(rows: torch.Tensor) -> torch.Tensor:
        return torch.mm(rows, weight.T, out=buffer[: len(rows)])

    buffer, logits = torch.empty(max(SIZES), args.vocabulary), hidden[:256] @ weight.T
    output = LanguageModelHead(None, weight, None)

    def full() -> None:
        with torch.inference_mode():
            (hidden @ weight.T).log_softmax(1).topk(64)

    def student(size: int) -> Callable[[], None]:
        def run() -> None:
            h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            total, _, _ = chunked_head_loss(
                h, w, None, Objective(), targets, vocabulary_size=args.vocabulary, chunk=size
            )
            total.backward()  # type: ignore[no-untyped-call]

        return run

    sides: dict[str, dict[str, Callable[[], None]]] = {
        "teacher": {**{str(s): teacher(s) for s in SIZES}, "full log_softmax + top-k": full},
        "head": {f"{s} {name}": head(s, by) for s in SIZES for name, by in (("taken", output.logits), ("mm", reused))},
        "select": {str(rows): select(rows) for rows in (2, 4, 8, 16, 32, 128)},
        "top-k": {by.__name__: top_k(by) for by in (top_k_by_threshold, top_k_by_topk)},
        "student": {str(s): student(s) for s in SIZES},
    }
    for side, cases in sides.items():
        times: dict[str, list[float]] = {name: [] for name in cases}
        for _ in range(args.repeats):
            for name, run in cases.items():
                started = time.process_time()
                run()
                times[name].append(time.process_time() - started)
        middle = {name: statistics.median(values) for name, values in times.items()}
        print(side + ": " + ", ".join(f"{name} {value / args.rows * 1e6:.0f}" for name, value in middle.items()))


if __name__ == "__main__":
    main()
