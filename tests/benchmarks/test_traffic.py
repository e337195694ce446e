"""The count of bytes: what an operation reads and writes, and what the fused kernel does in its place."""

from __future__ import annotations

import torch

from kd.student_trainer.faster.fused_loss import FusedLoss
from kd.student_trainer.losses.loss_registry import Objective


def test_operations_are_counted_by_what_they_read_and_write(load_benchmark) -> None:
    traffic = load_benchmark("traffic")
    a, b, ids = torch.ones(8, 16), torch.ones(16, 4), torch.zeros(8, 1, dtype=torch.int64)
    with traffic.Counter() as counter:
        torch.mm(a, b)
    assert counter.bytes == traffic.Bytes(products=4 * (8 * 16 + 16 * 4 + 8 * 4))
    with traffic.Counter() as counter:
        a.exp_()  # read and written
        a[:, :2].copy_(b[:8, :2])
        a.gather(1, ids)
    assert counter.bytes == traffic.Bytes(loss=4 * (2 * 8 * 16 + 2 * 16) + 8 * (2 * 4 + 8))


def test_the_fused_kernel_reads_products_twice_and_writes_them_once(load_benchmark) -> None:
    traffic = load_benchmark("traffic")
    rows, vocabulary, width = 64, 1000, 4
    targets = traffic.made_up(rows, vocabulary, 8)
    assert traffic.kernel_bytes(torch.empty(rows, vocabulary).bfloat16(), targets, "ce") == 6 * rows * vocabulary
    for objective in (Objective("ce", "none", 0.0), Objective()):
        plain, fused = (
            traffic.counted(loss, rows, vocabulary, width, rows, targets)
            for loss in (objective, FusedLoss(objective, print))
        )
        assert 6 * rows * vocabulary < fused.loss < 8 * rows * vocabulary  # width 4: a little is of the weight
        assert plain.loss > 40 * rows * vocabulary
        assert plain.products == fused.products
