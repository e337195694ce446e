"""Targets are cut into ranges of rows without cutting a group in two."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kd.student_trainer.losses.by_group import alm, hybrid, uld
from kd.student_trainer.losses.loss_settings import GroupSettings
from kd.student_trainer.losses.loss_targets import GroupTargets, LossTargets, need

V = 24


def logits_of(seed: int, rows: int) -> Tensor:
    return 3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def groups_of(ranges: list[tuple[int, int]], seed: int = 1) -> GroupTargets:
    """One group for each of the student's ranges of rows; every probability of the teacher's is kept."""
    log_p, ids = logits_of(seed, len(ranges)).log_softmax(dim=1).sort(dim=1, descending=True)
    first, stop = (torch.tensor(side) for side in zip(*ranges, strict=True))
    log_scale = torch.zeros(len(ranges), dtype=torch.float64)
    chunk = -torch.linspace(0.1, 5.0, len(ranges), dtype=torch.float64)
    weight = torch.linspace(0.1, 1.0, len(ranges), dtype=torch.float64)
    gold = torch.arange(max(stop for _, stop in ranges)) % 7
    return GroupTargets(first, stop, gold, log_scale, chunk, weight, log_p, student_ids=ids)


def many_groups(seed: int) -> GroupTargets:
    """Groups of 1 to 3 rows with gaps between them, as prompts leave, and rows after the last."""
    rng = np.random.default_rng(seed)
    borders = np.cumsum(rng.integers(0, 4, 40) + (np.arange(40) % 2))
    ranges = [(int(a), int(b)) for a, b in zip(borders[::2], borders[1::2], strict=True) if b > a]
    return replace(groups_of(ranges, seed), gold_ids=torch.from_numpy(rng.integers(0, V, int(borders[-1]) + 3)))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_every_row_is_in_one_piece_and_no_group_in_two(size: int, seed: int) -> None:
    groups = many_groups(seed)
    rows, targets = len(groups.gold_ids), LossTargets(groups.gold_ids, groups=groups)
    pieces = targets.pieces(size)
    assert [r for piece in pieces for r in range(piece.start, piece.stop)] == list(range(rows))
    assert sum(len(need(targets[piece].groups)) for piece in pieces) == len(groups)
    longest = int((groups.stop - groups.first).max())
    assert max(piece.stop - piece.start for piece in pieces) <= max(size, longest)
    student, settings = logits_of(9, rows), GroupSettings(overlap=0.5)
    for loss in (uld, hybrid, alm):
        whole = loss(student, groups, settings)
        parts = [loss(student[piece], need(targets[piece].groups), settings) for piece in pieces]
        assert torch.allclose(torch.cat(parts), whole, rtol=0, atol=1e-12)  # float64: sums of 24 terms below 2


@pytest.mark.parametrize("size", [1, 3, 7, 8])
def test_rows_without_groups_are_cut_at_every_size(size: int) -> None:
    targets = LossTargets(torch.arange(7))
    pieces = targets.pieces(size)
    assert torch.equal(torch.cat([targets[piece].gold_ids for piece in pieces]), targets.gold_ids)
    assert {piece.stop - piece.start for piece in pieces[:-1]} <= {size}


def test_a_range_of_rows_keeps_the_groups_that_lie_in_it_as_a_whole() -> None:
    groups = groups_of([(0, 2), (2, 5), (6, 7), (7, 9)])
    part = need(LossTargets(groups.gold_ids, groups=groups)[1:8].groups)
    assert (part.first.tolist(), part.stop.tolist()) == ([1, 5], [4, 6])
    assert torch.equal(part.weight, groups.weight[1:3])
    assert torch.equal(part.gold_ids, groups.gold_ids[1:8])
    assert part.bounds.tolist() == [[1, 5], [4, 6]]


def test_a_field_that_the_cache_left_out_is_refused() -> None:
    assert need(0) == 0
    with pytest.raises(ValueError, match="no such field"):
        need(None)
