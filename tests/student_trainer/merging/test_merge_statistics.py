"""What is measured before a merge: the thresholds of ties. Fisher and Gram statistics are in `test_merger`."""

from __future__ import annotations

from typing import Any

import numpy as np

from kd.student_trainer.merging.merge_statistics import kth_magnitude
from kd.student_trainer.merging.pool import ModelPool
from kd.student_trainer.merging.stored_weights import StoredPool, skeleton


def test_the_threshold_keeps_a_share_and_one_entry_more(pool: ModelPool, wholes: Any) -> None:
    models, base = wholes
    stored = StoredPool.of(pool, skeleton(pool), with_base=True)
    size = sum(v.size for v in base.values())
    for share in (0.05, 0.2, 0.999):
        threshold = kth_magnitude(stored, 1, share)
        vector = np.concatenate([(models[1][n] - base[n]).ravel() for n in base]).astype(np.float32)
        assert (np.abs(vector) >= threshold).sum() == int(size * share) + 1
    assert kth_magnitude(stored, 1, 1.0) == 0.0
