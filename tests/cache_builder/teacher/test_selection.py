"""How many logits are larger than one of them, against counting one by one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd.cache_builder.teacher.selection import count_larger
from kd.models.top_k import marks_for


@pytest.mark.parametrize("kept", [None, 10])
@pytest.mark.parametrize("size", [1, 7, 8, 999])
def test_the_larger_logits_are_counted_whether_or_not_the_kept_ones_tell(size: int, kept: int | None):
    rng = np.random.default_rng(size)
    logits = rng.integers(0, 50, (12, size)).astype(np.float32)  # equal ones everywhere
    gold = np.take_along_axis(logits, rng.integers(0, size, (12, 1)), 1)
    largest = None if kept is None else torch.from_numpy(-np.sort(-logits, axis=1)[:, :kept].copy())
    got = count_larger(torch.from_numpy(logits), torch.from_numpy(gold), largest, marks_for(1, size))
    assert got.tolist() == [sum(x > g[0] for x in row) for row, g in zip(logits.tolist(), gold.tolist(), strict=True)]
