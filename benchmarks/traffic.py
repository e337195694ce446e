"""Bytes that the student's output layer and its loss read and write per logit, counted and not timed: for a GPU, on paper.

    python benchmarks/traffic.py                            # GPT-2's layer: 50,257 x 768, bfloat16 autocast
    python benchmarks/traffic.py --vocabulary 128256 --width 2048

Torch's kernels and the matrix products are counted as they run: every operation reads its tensors once and writes its result
once, as if a product needed no tile twice. The Triton kernel is counted from its source (`kd.student_trainer.faster`), and so is
Liger-Kernel 0.8.5's fused linear cross-entropy. What the caches of a GPU save is not in it: the second pass over a row may find
it in the L2. `bound` is the time that HBM takes for the bytes, and the products take at the peak, per million logits.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from kd.models.batching.padded_batches import head_rows
from kd.student_trainer.faster import fused_loss
from kd.student_trainer.faster.fused_loss import FusedLoss
from kd.student_trainer.head import ChunkLoss, chunked_head_loss, rows_at_once
from kd.student_trainer.losses import row_kernels
from kd.student_trainer.losses.loss_registry import Objective
from kd.student_trainer.losses.loss_targets import LossTargets, need

HBM_BYTES_PER_SECOND = 4.8e12
"""H200 (NVIDIA's data sheet)."""
BF16_FLOPS = 989e12
"""H200, dense (NVIDIA's data sheet)."""
SPARSE = ("gather", "scatter", "index", "take")
"""Operations that touch as many elements as they have indices."""
NOTHING = ("empty", "new_empty", "detach", "alias")
"""Operations that move no bytes."""


@dataclass
class Bytes:
    """Bytes by what they belong to."""

    products: float = 0.0
    """Matrix products"""
    loss: float = 0.0
    """Everything else"""


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what every operation reads and writes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = Bytes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(NOTHING):
            return result
        moved = float(traffic_of(name, args, kwargs or {}, result))
        if name in ("mm", "addmm", "addmm_", "linear"):
            self.bytes.products += moved
        else:
            self.bytes.loss += moved
        return result


def traffic_of(name: str, args: Any, kwargs: dict[str, Any], result: Any) -> int:
    """Bytes of one operation: each of its tensors read, its results written."""
    inputs = [
        a for group in args for a in (group if isinstance(group, list | tuple) else [group]) if isinstance(a, Tensor)
    ]
    if name.startswith(SPARSE):
        count = max((a.numel() for a in inputs if a.dtype == torch.int64), default=0)
        return 2 * count * inputs[0].element_size() + 8 * count
    results = [r for r in (result if isinstance(result, list | tuple) else [result]) if isinstance(r, Tensor)]
    if name == "copy_" and inputs[0].data_ptr() == inputs[1].data_ptr() and inputs[0].dtype == inputs[1].dtype:
        return 0  # `a[rows] += b` assigns a view to itself
    if name in ("copy_", "fill_", "zero_") or name.startswith("new_") or name.endswith("_like"):
        inputs = inputs[1:]  # the first one is written, or only gives its type
    return sum(size(t) for t in (*inputs, *results))


def size(tensor: Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded one once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride else 1
    return elements * tensor.element_size()


def kernel_bytes(products: Tensor, targets: LossTargets, loss: str) -> int:
    """What the Triton kernel moves: products twice in and once out; and what it needs of the kept ids."""
    moved = 3 * size(products)
    if loss != "ce":
        entries, narrow = need(targets.token_ids).numel(), products.element_size()
        ids, probabilities, scratch, places = 2 * 8, 2 * 4, 3 * 4, 3 * narrow  # read twice; written once, read twice; …
        moved += entries * (ids + probabilities + scratch + places)
    return moved


def liger_bytes(rows: int, vocabulary: int, width: int) -> tuple[Bytes, int]:
    """Of Liger's fused linear cross-entropy, bfloat16 and a float32 weight's gradient, and its rows per chunk.

    Its chunks are as large as the hidden states; the gradient of the weight is read and written once per chunk.
    """
    chunk = 1 << (-(-rows // -(-vocabulary // width)) - 1).bit_length()
    chunks = rows / chunk
    logits, weight, hidden = 2.0 * rows * vocabulary, vocabulary * width, 2.0 * rows * width
    forward = logits + chunks * 2 * weight + hidden
    to_hidden = logits + chunks * 2 * weight + hidden
    to_weight = logits + chunks * 8 * weight + hidden
    return Bytes(forward + to_hidden + to_weight, 3 * logits), chunk


def made_up(rows: int, vocabulary: int, kept: int) -> LossTargets:
    """Targets of a random teacher; what is in them does not matter here."""
    ids = torch.rand(rows, vocabulary).topk(kept, dim=1).indices
    log_p = torch.full((rows, kept), 0.9 / kept).log()
    return LossTargets(ids[:, 0], ids, log_p, torch.full((rows,), 0.1))


def counted(loss: ChunkLoss, rows: int, vocabulary: int, width: int, chunk: int, targets: LossTargets) -> Bytes:
    """Of forward and backward, the copies that autocast keeps of the weight included."""
    hidden, weight = torch.randn(rows, width).requires_grad_(), torch.randn(vocabulary, width).requires_grad_()
    extra = 0

    def kernel(objective: Objective, products: Tensor, bias: Any, transform: Any, part: LossTargets) -> Tensor:
        nonlocal extra
        extra += kernel_bytes(products, part, objective.loss)
        return torch.zeros(3)

    with (
        torch.autocast("cpu", torch.bfloat16),
        patch.object(row_kernels, "TILE_BYTES", 1 << 62),  # one tile, as on a GPU
        patch.object(fused_loss, "triton_gradient_", kernel),
        patch.object(FusedLoss, "_prove", lambda *_: None),
        Counter() as counter,
    ):
        chunked_head_loss(hidden, weight, None, loss, targets, vocabulary_size=vocabulary, chunk=chunk)
    moved: Bytes = counter.bytes
    moved.loss += extra
    return moved


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=50257)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument(
        "--rows", type=int, default=8192, help="of a micro-batch; the bytes of Liger's chunks depend on it"
    )
    parser.add_argument("--kept", type=int, default=64)
    args = parser.parse_args()
    torch.manual_seed(0)
    targets = made_up(args.rows, args.vocabulary, args.kept)
    plain_chunk = head_rows(args.vocabulary, "cuda", training=True)
    narrow = torch.empty(1, dtype=torch.bfloat16, device="cpu")
    cases: dict[str, tuple[Bytes, int]] = {}
    for name, objective in {
        "ce": Objective("ce", "none", 0.0),
        "kl": Objective(),
        "kl T=2 + CE": Objective(alpha=0.5, temperature=2.0),
    }.items():
        fused = FusedLoss(objective, print)
        more = rows_at_once(narrow, None, fused, args.vocabulary) // rows_at_once(
            narrow, None, objective, args.vocabulary
        )
        for kernels, loss, chunk in (("torch", objective, plain_chunk), ("triton", fused, more * plain_chunk)):
            moved = counted(loss, args.rows, args.vocabulary, args.width, chunk, targets)
            cases[f"{name}, {kernels}"] = moved, chunk
    cases["ce, Liger"] = liger_bytes(args.rows, args.vocabulary, args.width)
    show(cases, args.rows * args.vocabulary, args.width)


def show(cases: dict[str, tuple[Bytes, int]], logits: int, width: int) -> None:
    """A line for each case, in bytes per logit."""
    product = 6 * width / BF16_FLOPS * 1e12
    print(f"{'':<22}{'rows a chunk':>13}{'loss':>8}{'products':>10}{'all':>8}{'bound, µs per 10^6':>20}")
    for name, (moved, chunk) in cases.items():
        loss, products = moved.loss / logits, moved.products / logits
        seconds = (loss + products) / HBM_BYTES_PER_SECOND * 1e12
        print(f"{name:<22}{chunk:>13,}{loss:>8.1f}{products:>10.1f}{loss + products:>8.1f}{seconds:>20.1f}")
    print(f"arithmetic of the three products at the peak: {product:.1f} µs per 10^6 logits")


if __name__ == "__main__":
    main()
