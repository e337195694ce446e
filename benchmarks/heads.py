"""The output layer and each loss alone, forward and backward: CPU time relative to plain cross-entropy on whole logits.

    OMP_NUM_THREADS=1 python benchmarks/heads.py                      # kernels
    OMP_NUM_THREADS=1 python benchmarks/heads.py --autograd --chunk 128   # the definitions, by autograd on each chunk
    OMP_NUM_THREADS=1 python benchmarks/heads.py --compile            # the kernels through torch.compile

`plain` is `F.cross_entropy(F.linear(h, w), gold)` and its backward pass; the others are `chunked_head_loss` on the same
hidden states. Targets are made up: k=64 values for losses by row, 16 values and 16 bands for losses over groups, every group
one token. Cases take turns; shown is the least of the turns, with its ratio to the least of `plain`. The first turn of compiled
kernels compiles them (a minute or two each).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.cache_builder.store.targets import band_edges
from kd.student_trainer.head import chunked_head_loss
from kd.student_trainer.losses import row_kernels
from kd.student_trainer.losses.by_group import GroupSettings, GroupTargets
from kd.student_trainer.losses.by_row import LOSSES, LossTargets, Objective


class Compiled:
    """An objective whose kernel goes through torch.compile, all rows of a chunk at once.

    Numbers of the objective are made constants: left to itself, inductor of torch 2.13 takes the ones it has seen before
    for those of the next objective (pytorch issue 194976).
    """

    def __init__(self, objective: Objective) -> None:
        self._kernel = torch.compile(objective.gradient_)

    def gradient_(self, logits: Tensor, targets: LossTargets) -> Tensor:
        with torch._dynamo.config.patch(specialize_float=True):
            return self._kernel(logits, targets)


def made_up(rows: int, vocabulary: int, edges: tuple[int, ...]) -> tuple[LossTargets, LossTargets]:
    """Targets by row and over groups, of random teacher rows."""
    gold = torch.randint(vocabulary, (rows,))
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, rows, 128):
        log_p = (2 * torch.randn(min(128, rows - start), vocabulary)).log_softmax(1)
        values, ids = log_p.sort(1, descending=True)
        masses = [values[:, a:b].logsumexp(1) for a, b in pairwise(edges)]
        parts.append((values[:, :64].clone(), ids[:, :64].clone(), torch.stack(masses, 1)))
    values, ids, bands = (torch.cat(column) for column in zip(*parts, strict=True))
    first, zeros = torch.arange(rows), torch.zeros(rows)
    groups = GroupTargets(
        first, first + 1, gold, zeros, zeros - 1, zeros + 1 / 16, values[:, :16], bands, student_ids=ids[:, :16]
    )
    return LossTargets(gold, ids, values, 1 - values.exp().sum(1)), LossTargets(gold, groups=groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--autograd", action="store_true", help="without the kernels")
    parser.add_argument("--compile", action="store_true", help="the kernels through torch.compile")
    parser.add_argument("--losses", help="comma-separated; default all")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.compile:
        row_kernels.TILE_BYTES = 1 << 62  # the compiler sees to the caches
    if args.autograd:
        LOSSES.update({name: replace(loss, kernels={}) for name, loss in LOSSES.items()})
    hidden = torch.randn(args.rows, args.width, requires_grad=True)
    weight = (0.05 * torch.randn(args.vocabulary, args.width)).requires_grad_()
    edges = tuple(band_edges(16, args.vocabulary, 16))
    by_row, over_groups = made_up(args.rows, args.vocabulary, edges)
    fast, exact = (GroupSettings(edges=edges, ranking=ranking, overlap=0.5) for ranking in ("fast", "exact"))
    objectives = {
        "ce": Objective("ce", "none", 0.0),
        "kl": Objective(),
        "kl T=2, CE": Objective(alpha=0.5, temperature=2.0),
        "jsd": Objective("jsd"),
        "alm": Objective("alm", "none", 0.5),
        "uld fast": Objective("uld", "bands", 0.5, settings=fast),
        "uld exact": Objective("uld", "bands", 0.5, settings=exact),
        "hybrid": Objective("hybrid", "bands", 0.5, settings=exact),
    }

    def plain() -> None:
        F.cross_entropy(F.linear(hidden, weight), by_row.gold_ids).backward()  # type: ignore[no-untyped-call]

    def ours(objective: Objective) -> Callable[[], None]:
        targets = over_groups if objective.groups else by_row
        loss = Compiled(objective) if args.compile else objective

        def step() -> None:
            total, _, _ = chunked_head_loss(
                hidden, weight, None, loss, targets, vocabulary_size=args.vocabulary, chunk=args.chunk
            )
            (total / args.rows).backward()

        return step

    wanted = args.losses.split(",") if args.losses else list(objectives)
    cases = {"plain": plain} | {name: ours(objectives[name]) for name in wanted}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.repeats):
        for name, case in cases.items():
            hidden.grad = weight.grad = None
            started = time.process_time()
            case()
            seconds[name].append(time.process_time() - started)
    for name, runs in seconds.items():
        print(f"{name:<12}{min(runs):8.2f} s{min(runs) / min(seconds['plain']):8.2f}")


if __name__ == "__main__":
    main()
