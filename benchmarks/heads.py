"""The output layer and each loss alone, forward and backward: CPU time relative to plain cross-entropy on whole logits.

    OMP_NUM_THREADS=1 python benchmarks/heads.py              # kernels, and the definitions by autograd on each chunk
    OMP_NUM_THREADS=1 python benchmarks/heads.py --compile    # kernels through torch.compile instead of autograd

`plain` is `F.cross_entropy(F.linear(h, w), gold)` and its backward pass; the others are `chunked_head_loss` on the same hidden
states. Targets are made up: k=64 values and 64 draws for losses by row, 16 values and 16 bands for losses over groups, every
group one token. `kl ragged` has rows of 1 to 64 values, 32.5 on average, `kl certain` the same mean with one value in a third of
the rows, and `kl k=32` has 32 in every row. All cases take turns;
a line shows the least time of the loss with its kernel and its ratio to `plain`, then the same without the kernel, then what the
kernel saves of that. The first turn of compiled kernels compiles them (a minute or two each). The last column is the most memory
that a step with its kernel takes above what is there before it, gradients included, in MB (2^20 bytes): one step in a process of
its own.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from workload import status_mb

from kd.cache_builder.store.targets import band_edges
from kd.student_trainer.head import ChunkLoss, chunked_head_loss
from kd.student_trainer.losses import row_kernels
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.losses.loss_targets import GroupTargets, LossTargets, need


class Autograd:
    """An objective without its kernel: its definition, differentiated on each chunk as training does for losses without one."""

    def __init__(self, objective: Objective) -> None:
        self._objective = objective

    def gradient_(self, logits: Tensor, targets: LossTargets) -> Tensor:
        return self._objective.autograd_gradient_(logits, targets)


class Compiled:
    """An objective whose kernel goes through torch.compile, all rows of a chunk at once.

    Numbers of the objective are made constants: otherwise inductor of torch 2.13 reuses those of the objective it compiled
    first (pytorch issue 194976).
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
    draws = torch.multinomial(values.exp(), 64, replacement=True)
    by_row = LossTargets(gold, ids, values, 1 - values.exp().sum(1), ids.gather(1, draws), torch.ones_like(draws))
    return by_row, LossTargets(gold, groups=groups)


def shorter(targets: LossTargets) -> dict[str, LossTargets]:
    """The same rows with 32 tokens each, with 1 to 64, and with one token in a third of them."""
    ids, values, rows = need(targets.token_ids), need(targets.logprobs), len(targets.gold_ids)

    def of_lengths(kept: Tensor) -> LossTargets:
        inside = torch.arange(64) < kept[:, None]
        mass = 1 - torch.where(inside, values.exp(), 0.0).sum(1)
        return replace(targets, token_ids=ids[inside], logprobs=values[inside], tail_mass=mass, kept=kept)

    first = values[:, :32]
    return {
        "kl k=32": replace(targets, token_ids=ids[:, :32], logprobs=first, tail_mass=1 - first.exp().sum(1)),
        "kl ragged": of_lengths(torch.randint(1, 65, (rows,))),
        "kl certain": of_lengths(torch.where(torch.rand(rows) < 1 / 3, 1, torch.randint(33, 65, (rows,)))),
    }


def outcomes(rows: int, vocabulary: int, count: int = 50) -> LossTargets:
    """`count` sets of student tokens each, most of them single tokens, as `text-kl` compares them."""
    bounds = torch.rand(rows, vocabulary).topk(count, dim=1).indices.sort(dim=1).values
    size = torch.where(torch.rand(rows, count) < 0.8, 1, 2**30)
    stops = torch.minimum(bounds + size, torch.cat([bounds[:, 1:], bounds[:, -1:] + 1], dim=1))
    masses = torch.rand(rows, count + 1).softmax(dim=1)
    return LossTargets(
        torch.randint(vocabulary, (rows,)),
        logprobs=masses[:, :count].log().flatten(),
        tail_mass=masses[:, -1],
        kept=torch.full((rows,), count),
        range_starts=bounds.flatten().int(),
        range_stops=stops.flatten().int(),
        places=torch.randperm(vocabulary),
    )


def objectives(edges: tuple[int, ...]) -> dict[str, Objective]:
    """The cases by name."""
    fast, exact = (GroupSettings(edges=edges, ranking=ranking, overlap=0.5) for ranking in ("fast", "exact"))
    return {
        "ce": Objective("ce", "none", 0.0),
        "kl": Objective(),
        "kl k=32": Objective(),
        "kl ragged": Objective(),
        "kl certain": Objective(),
        "kl T=2 + CE": Objective(alpha=0.5, temperature=2.0),
        "kl renorm": Objective(tail="renorm"),
        "kl sampled": Objective(tail="sampled"),
        "reverse-kl": Objective("reverse-kl"),
        "jsd": Objective("jsd"),
        "text-kl": Objective("text-kl", "none", 0.5),
        "alm": Objective("alm", "none", 0.5),
        "uld fast": Objective("uld", "bands", 0.5, settings=fast),
        "uld exact": Objective("uld", "bands", 0.5, settings=exact),
        "hybrid": Objective("hybrid", "bands", 0.5, settings=exact),
    }


def peak_mb(step: Callable[[], None]) -> float:
    """MB that a step takes at most, in a copy of this process that ends with it."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory counts as none
            Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what is there now
            before = status_mb("VmRSS")
            step()
            os.write(writing, f"{status_mb('VmHWM') - before:.1f}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return float(pipe.read())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--chunk", type=int, default=119, help="rows at once; what training takes on a CPU by default")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="the kernels through torch.compile, not autograd")
    parser.add_argument("--losses", help="names of cases, separated by commas; default all")
    args = parser.parse_args()
    torch.manual_seed(0)
    if args.compile:
        row_kernels.TILE_BYTES = 1 << 62  # the compiler sees to the caches
    hidden = torch.randn(args.rows, args.width, requires_grad=True)
    weight = (0.05 * torch.randn(args.vocabulary, args.width)).requires_grad_()
    edges = tuple(band_edges(16, args.vocabulary, 16))
    by_row, over_groups = made_up(args.rows, args.vocabulary, edges)
    few = shorter(by_row) | {"text-kl": outcomes(args.rows, args.vocabulary)}
    cases_by_name = objectives(edges)
    names = [name.strip() for name in args.losses.split(",")] if args.losses else list(cases_by_name)

    def plain() -> None:
        F.cross_entropy(F.linear(hidden, weight), by_row.gold_ids).backward()  # type: ignore[no-untyped-call]

    def head(loss: ChunkLoss, targets: LossTargets) -> Callable[[], None]:

        def step() -> None:
            total, _, _ = chunked_head_loss(
                hidden, weight, None, loss, targets, vocabulary_size=args.vocabulary, chunk=args.chunk
            )
            (total / args.rows).backward()

        return step

    other = Compiled if args.compile else Autograd
    cases = {("plain", False): plain}
    for name in names:
        objective = cases_by_name[name]
        targets = few.get(name, over_groups if objective.groups else by_row)
        for with_kernel, loss in ((True, objective), (False, other(objective))):
            cases[name, with_kernel] = head(loss, targets)
    seconds: dict[tuple[str, bool], float] = dict.fromkeys(cases, float("inf"))
    for _ in range(args.repeats):
        for key, case in cases.items():
            hidden.grad = weight.grad = None
            started = time.process_time()
            case()
            seconds[key] = min(seconds[key], time.process_time() - started)
    hidden.grad = weight.grad = None
    base = seconds["plain", False]
    print(f"{'plain':<12}{base:8.2f} s    1.00{peak_mb(plain):36.0f} MB")
    for name in names:
        kernel, without = seconds[name, True], seconds[name, False]
        ratios = f"{kernel:8.2f} s{kernel / base:8.2f}{without:10.2f} s{without / base:8.2f}"
        print(f"{name:<12}{ratios}{1 - kernel / without:10.0%}{peak_mb(cases[name, True]):8.0f} MB")


if __name__ == "__main__":
    main()
