"""Lengths of any examples are those that reading all lengths gives, and few groups are in memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kd.cache_builder.store.readers import example_lengths
from kd.cache_builder.store.readers.example_lengths import ExampleLengths, ListedLengths


class Reader:
    """As much of a reader as lengths need; counts the groups that are read."""

    def __init__(self, examples: int, longest: int = 500) -> None:
        rng = np.random.default_rng(0)
        self.rows = rng.integers(1, 9, examples)
        self.tokens = self.rows + rng.integers(0, longest, examples)
        self.reads = 0

    def __len__(self) -> int:
        return len(self.rows)

    def lengths(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        self.reads += 1
        return self.tokens[first:stop], self.rows[first:stop]


@pytest.fixture(autouse=True)
def small_groups(monkeypatch):
    monkeypatch.setattr(example_lengths, "GROUP_EXAMPLES", 10)
    monkeypatch.setattr(example_lengths, "PAGE_EXAMPLES", 30)
    monkeypatch.setattr(example_lengths, "KEPT", 3)


@pytest.mark.parametrize(("examples", "longest"), [(7, 500), (30, 70_000), (95, 500), (95, 70_000)])
def test_looked_up_lengths_are_those_of_all(examples, longest):
    reader: Any = Reader(examples, longest)
    lengths, listed = ExampleLengths(reader), ListedLengths(reader.tokens, reader.rows)
    numbers = np.random.default_rng(1).integers(0, examples, 40)
    for found, expected in zip(lengths.of(numbers), listed.of(numbers), strict=True):
        assert found.dtype == np.int64
        assert found.tolist() == expected.tolist()
    for of_all in (lengths, listed):
        tokens, rows = (np.concatenate(parts) for parts in zip(*of_all.batches(), strict=True))
        assert tokens.tolist() == reader.tokens.tolist()
        assert rows.tolist() == reader.rows.tolist()


def test_no_examples_have_no_lengths():
    reader: Any = Reader(5)
    assert [part.tolist() for part in ExampleLengths(reader).of(np.empty(0, dtype=np.int64))] == [[], []]


def test_groups_of_a_small_cache_are_read_once_and_those_of_a_large_one_when_they_are_needed():
    small: Any = Reader(30)
    large: Any = Reader(95)
    for reader in (small, large):
        lengths = ExampleLengths(reader)
        assert lengths.few == (reader is small)
        for number in (0, 11, 25, 3, 18):
            lengths.of(np.array([number]))
    assert (small.reads, large.reads) == (3, 3)
    lengths.of(np.array([94]))
    lengths.of(np.array([1]))
    assert large.reads == 4
    lengths.of(np.array([25]))  # of the group that was not used for longest, which made room
    assert large.reads == 5
