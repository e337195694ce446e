"""What is going to be loaded follows from what is going to be read, as far ahead as it was asked for."""

from __future__ import annotations

import itertools

import numpy as np

from kd.cache_builder.store.readers.announced import Announced


def shards_of(examples) -> np.ndarray:
    return np.asarray(examples) // 10


def test_the_next_shards_are_named_and_batches_are_taken_as_they_are_needed() -> None:
    taken = []

    def batches():
        for number in itertools.count():  # a run without end
            taken.append(number)
            yield [10 * number, 10 * number + 1]

    announced = Announced(batches(), shards_of, held=2, ahead=3)
    assert announced.coming() == [0, 1, 2]
    assert len(taken) == 3
    assert not announced.read([0, 1])  # its shard is still to be loaded
    assert announced.coming() == [0, 1, 2]
    assert announced.read([10, 11])
    assert announced.coming() == [1, 2, 3]
    assert announced.read([30, 31])  # one was passed over
    assert announced.coming() == [3, 4, 5]
    assert len(taken) == 6


def test_a_shard_in_memory_is_not_loaded_again() -> None:
    batches = [[0, 11], [1, 12], [20], [2], [30], [0]]
    announced = Announced(batches, shards_of, held=2, ahead=9)
    # of shards 0 and 1, shard 20 // 10 displaces the one that was used longest ago, which [2] asks for
    assert [loads for _, loads in announced._waiting] == [[0, 1], [], [2], [0], [3], []]


def test_batches_that_were_not_announced_and_those_that_come_again_are_known_apart() -> None:
    announced = Announced([[1], [2], [1]], shards_of, held=4, ahead=4)
    assert not announced.read([5])
    announced.read([1])
    announced.read([2])
    announced.read([1])
    assert [name for name, _ in announced._waiting] == [(1,)]
