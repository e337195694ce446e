"""Decoded targets answer at every temperature of the grid; rows are taken and joined without loss; shapes are shown."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.soft_targets import SoftTargets, concatenate, take_rows
from kd.common.errors import CacheError


def worked_by_hand(keep: int = 2) -> SoftTargets:
    """Logits ln(4, 2, 1, 1): p = 1/2 1/4 1/8 1/8; at T=2, weights 2 √2 1 1 over 4+√2."""
    relative = np.log(np.array([[4, 2, 1, 1]]) / 4)
    temperatures = (1.0, 2.0)
    log_z = np.stack([np.log(np.exp(relative / t).sum(1)) for t in temperatures], axis=1).astype(np.float32)
    zeros = np.zeros(1, dtype=np.int64)
    return SoftTargets(
        gold_ids=zeros,
        log_z=log_z,
        temperatures=temperatures,
        gold_logprob=np.zeros(1, np.float32),
        gold_rank=zeros,
        byte_end=zeros,
        logprobs=(relative[:, :keep] - log_z[:, :1]).astype(np.float32),
    )


def test_rows_of_one_length_begin_where_those_of_any_length_do():
    two = concatenate([worked_by_hand(3), worked_by_hand(3)])
    flat = replace(two, logprobs=two.logprobs.reshape(-1), kept=np.array([3, 3]))
    assert two.offsets.tolist() == flat.offsets.tolist() == [0, 3, 6]
    assert two.most_probable.tolist() == flat.most_probable.tolist() == [0, 3]
    assert replace(two, logprobs=None).offsets.tolist() == [0, 0, 0]


def test_logprobs_and_tail_at_each_temperature_are_those_worked_by_hand():
    targets = worked_by_hand()
    root = np.sqrt(2)
    # float32 storage of numbers near 1: 1e-7, twice
    np.testing.assert_allclose(np.exp(targets.logprobs_at(1.0)), [[1 / 2, 1 / 4]], atol=3e-7)
    np.testing.assert_allclose(targets.tail_mass_at(1.0), [1 / 4], atol=3e-7)
    np.testing.assert_allclose(np.exp(targets.logprobs_at(2.0)), [[2 / (4 + root), root / (4 + root)]], atol=3e-7)
    np.testing.assert_allclose(targets.tail_mass_at(2.0), [2 / (4 + root)], atol=3e-7)


def test_a_temperature_off_the_grid_is_refused_with_the_grid():
    with pytest.raises(CacheError, match="does not hold that temperature") as caught:
        worked_by_hand().logprobs_at(3.0)
    assert caught.value.details["expected"] == "one of 1, 2"


def test_targets_without_logprobs_say_so():
    targets = worked_by_hand()
    bare = SoftTargets(**{**targets.__dict__, "logprobs": None})
    with pytest.raises(CacheError, match="no top-k"):
        bare.tail_mass_at(1.0)


def test_rows_taken_apart_and_joined_are_the_same(cache: Path):
    targets = CacheReader(cache)[0].targets
    parts = [take_rows(targets, slice(0, 3)), take_rows(targets, slice(3, len(targets)))]
    assert [len(p) for p in parts] == [3, len(targets) - 3]
    joined = concatenate(parts)
    for name, value in vars(targets).items():
        np.testing.assert_array_equal(getattr(joined, name), value, err_msg=name)


def test_targets_show_the_shape_and_dtype_of_each_array_and_no_numbers():
    targets = worked_by_hand()
    assert repr(targets) == (
        "SoftTargets(rows=1, temperatures=(1.0, 2.0), gold_ids=[1] int64, log_z=[1, 2] float32, gold_logprob=[1] float32, "
        "gold_rank=[1] int64, byte_end=[1] int64, logprobs=[1, 2] float32)"
    )
