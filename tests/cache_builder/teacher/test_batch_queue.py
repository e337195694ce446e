"""Batches of a shard, and smaller ones when memory runs out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.cache_builder.teacher.batch_queue import SMALLEST_CHUNK, Batch, BatchQueue
from kd.models.batching.padded_batches import batches_by_length, padded_tokens

SIZES = [40, 12, 30, 8, 25, 3, 60, 17]


def drained(queue: BatchQueue) -> list[list[int]]:
    numbers = []
    while queue:
        numbers.append(queue.take().numbers)
    return numbers


def test_batches_come_longest_first_as_length_and_budget_say():
    assert drained(BatchQueue(SIZES, 64, 16)) == batches_by_length(SIZES, 64)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=20), st.integers(1, 200), st.integers(0, 4))
def test_cutting_loses_no_row_and_halves_what_did_not_fit(sizes: list[int], budget: int, cuts: int):
    queue = BatchQueue(sizes, budget, 256)
    done: list[int] = []
    for _ in range(cuts):
        if not queue:
            break
        batch = queue.take()
        tokens = padded_tokens([sizes[i] for i in batch.numbers])
        if len(batch.numbers) == 1:
            done += batch.numbers
            continue
        assert queue.cut(batch)
        following = queue.take()
        alone = len(following.numbers) == 1
        assert alone or padded_tokens([sizes[i] for i in following.numbers]) <= tokens // 2
        queue.put_back(following)
    assert sorted(done + [i for numbers in drained(queue) for i in numbers]) == list(range(len(sizes)))


def test_a_single_row_gets_smaller_chunks_until_there_is_nothing_left_to_halve():
    queue, chunks = BatchQueue([50], 64, 128), []
    batch = queue.take()
    while queue.cut(batch):
        chunks.append(queue.head_chunk)
        assert queue.take() == batch
    assert chunks == [64, 32, 16]
    assert chunks[-1] == SMALLEST_CHUNK
    assert not queue


def test_a_batch_that_was_put_back_is_next():
    queue = BatchQueue(SIZES, 64, 16)
    first = queue.take()
    queue.put_back(Batch(first.numbers, ties_need_a_sync=True))
    again = queue.take()
    assert (again.numbers, again.ties_need_a_sync) == (first.numbers, True)


@pytest.mark.parametrize("both", [(5, 9), (9, 5)])
def test_two_sides_of_a_model_are_counted(both: tuple[int, int]):
    queue = BatchQueue([both] * 4, 30, 16)
    assert [len(numbers) for numbers in drained(queue)] == [2, 2]
