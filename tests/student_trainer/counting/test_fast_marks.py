"""Marks that are found many at a time are those that walking along the lengths leaves, and so is the number of micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.cache_builder.store.readers.epoch_order import epoch_order
from kd.student_trainer.batches import epoch_cut
from kd.student_trainer.batches.epoch_cut import CutRule, EpochCut
from kd.student_trainer.counting import fast_marks

LENGTHS = st.sampled_from(["equal", "even", "long tail", "two sizes", "large"])


def lengths_of(kind: str, count: int, sides: int, seed: int) -> np.ndarray:
    """`[count, sides]` tokens, as corpora have them: cut into blocks, documents, lines, or longer than a micro-batch."""
    rng = np.random.default_rng(seed)
    drawn = {
        "equal": np.full((count, sides), 16),
        "even": rng.integers(1, 30, (count, sides)),
        "long tail": np.minimum(rng.lognormal(1.5, 1.2, (count, sides)).astype(int) + 1, 200),
        "two sizes": np.where(rng.random((count, sides)) < 0.03, 3, 16),
        "large": rng.integers(40, 90, (count, sides)),
    }
    return drawn[kind]


def slow_count(sizes: np.ndarray, tokens: int) -> int:
    """The twin of `full_counts` for one place: examples of the micro-batch that begins here; 0 where too few are here."""
    for number in range(2, len(sizes) + 1):
        if number * int(sizes[:number].max(axis=0).sum()) > tokens:
            return number - 1
    return 0


@given(kind=LENGTHS, sides=st.sampled_from([1, 2]), tokens=st.integers(1, 300), seed=st.integers(0, 99))
def test_a_count_is_the_slow_one_or_not_known(kind, sides, tokens, seed) -> None:
    sizes = lengths_of(kind, 40, sides, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast_marks, "CANDIDATES", 7)
        patch.setattr(fast_marks, "LOOKAHEAD", 3)
        counts = fast_marks.full_counts(sizes.astype(np.int32), tokens)
        slow = [slow_count(sizes[i:], tokens) for i in range(len(sizes))]
        assert [fast_marks.first_full_count(sizes[i:], tokens) for i in range(len(sizes))] == slow
    least = tokens // sizes.max(axis=0).sum()
    assert all(a == b or a == 0 < least + 7 <= b for a, b in zip(counts.tolist(), slow, strict=True))


@settings(max_examples=60)
@given(
    kind=LENGTHS,
    sides=st.sampled_from([1, 2]),
    tokens=st.integers(1, 300),
    shares=st.sampled_from([1, 2, 4, 8]),
    part=st.sampled_from([1.0, 0.6]),
    seed=st.integers(0, 99),
)
def test_marks_are_those_of_the_walk(kind, sides, tokens, shares, part, seed) -> None:
    counts = np.random.default_rng(seed).integers(1, 60, 40)
    order = epoch_order(seed, 1, np.cumsum(counts) - counts, counts, 8)
    size = round(part * len(order))
    lengths = lengths_of(kind, len(order), sides, seed)

    def cut() -> EpochCut:
        return EpochCut(order, lengths, CutRule(tokens=tokens), epoch=1, shares=shares, size=size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch_cut, "MARK_EVERY", 3)
        patch.setattr(fast_marks, "PIECE", 64)
        patch.setattr(fast_marks, "SHORTEST", 16)
        patch.setattr(fast_marks, "CANDIDATES", 5)
        patch.setattr(fast_marks, "LOOKAHEAD", 3)
        slow, fast, begun = cut(), cut(), cut()
        walked = list(slow.batches())
        assert (len(fast), fast._marks) == (len(walked), slow._marks)
        for mark in slow._marks[1:-1:2]:  # from a mark that an earlier walk left
            begun.add_mark(mark)
        assert len(begun) == len(walked)
        assert set(begun._marks) <= set(slow._marks) or shares > 1
        start = len(walked) * 2 // 3
        assert list(fast.batches(start)) == list(begun.batches(start)) == walked[start:]


def test_an_error_of_the_lengths_reaches_the_caller() -> None:
    class Damaged:
        def __len__(self) -> int:
            return 100

        def __getitem__(self, examples: np.ndarray) -> np.ndarray:
            raise OSError("no such page")

    counts = np.full(20, 5)
    order = epoch_order(0, 0, np.cumsum(counts) - counts, counts, 4)
    with pytest.raises(OSError, match="no such page"):
        len(EpochCut(order, Damaged(), CutRule(tokens=9), epoch=0))
