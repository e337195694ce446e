"""What the teacher expects of the text: a small language whose probabilities are worked out by hand.

Its words come independently of each other: ` the`, ` then`, ` cat`, ` car`. The teacher reads ` the`, `n`, ` ca`, `t`, `r`, and the
student a token a word. So the teacher's rows and the student's targets follow from the words' probabilities.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from kd.cache_builder.store.soft_targets import SoftTargets
from kd.student_trainer.batches.collate import loss_targets
from kd.student_trainer.expected.outcome_rows import Starts, joined_starts, text_rows
from kd.student_trainer.expected.piece_paths import AS_IT_IS, PiecePaths, cut_by_length
from kd.student_trainer.losses.by_text import text_kl

WORDS = {b" the": 0.4, b" then": 0.1, b" cat": 0.3, b" car": 0.2}
TEACHER = [b" the", b"n", b" ca", b"t", b"r", b"?"]
STUDENT = [*WORDS, b"?"]
THE, N, CA, T, R, _ = range(6)
NEXT_WORD = {THE: 0.5, CA: 0.5}
AFTER = {
    THE: {N: 0.2} | {piece: 0.8 * p for piece, p in NEXT_WORD.items()},  # ` then` is a fifth of what begins with ` the`
    CA: {T: 0.6, R: 0.4},
    N: NEXT_WORD,
    T: NEXT_WORD,
    R: NEXT_WORD,
    None: NEXT_WORD,
}
"""Piece before -> the teacher's probabilities."""


def rows_of(pieces: list[int], *, k: int = 3, temperatures: tuple[float, ...] = (1.0,)) -> SoftTargets:
    """The teacher's rows over a text."""
    table = []
    for before, piece in zip([None, *pieces], pieces, strict=False):
        row = sorted(AFTER[before].items(), key=lambda item: -item[1])
        row += [(i, 0.0) for i in range(6) if i not in AFTER[before]]
        table.append((piece, AFTER[before][piece], row[:k]))
    logp = [[math.log(max(p, 1e-30)) for _, p in row] for _, _, row in table]
    return SoftTargets(
        gold_ids=np.array(pieces),
        log_z=np.array([[-row[0] for _ in temperatures] for row in logp], dtype=np.float32),
        temperatures=temperatures,
        gold_logprob=np.log([p for _, p, _ in table]).astype(np.float32),
        gold_rank=np.zeros(len(pieces), dtype=np.int64),
        byte_end=np.cumsum([len(TEACHER[p]) for p in pieces]),
        token_ids=np.array([[i for i, _ in row] for _, _, row in table], dtype=np.int32),
        logprobs=np.array(logp, dtype=np.float32),
    )


def starts_of(pieces: list[list[int]], tokens: list[int]) -> Starts:
    """A position for each word, which covers some pieces."""
    first = np.cumsum([0, *map(len, pieces)])
    count = len(tokens)
    after = np.append(first[1:-1], -1)
    before = np.array([-1, *tokens[:-1]])
    return Starts(np.arange(count), np.array(tokens), first[:-1], first[1:], after, np.full(count, AS_IT_IS), before)


def expected(
    text: list[tuple[int, list[int]]], **rest: Any
) -> tuple[list[dict[frozenset[bytes], float]], dict[str, Any]]:
    """Of every word the probability of each set of tokens, and the arrays."""
    paths = PiecePaths(TEACHER, STUDENT, cut_by_length(TEACHER))
    pieces = [p for _, ps in text for p in ps]
    starts = starts_of([ps for _, ps in text], [token for token, _ in text])
    found = text_rows(paths, rows_of(pieces, **rest), starts, np.array([t for t, _ in text]), 1.0)
    ends = np.cumsum(found["kept"])
    sets = []
    for row, end in enumerate(ends):
        entries = range(end - found["kept"][row], end)
        sets.append(
            {
                frozenset(
                    s
                    for i, s in enumerate(STUDENT)
                    if found["range_starts"][e] <= paths.position[i] < found["range_stops"][e]
                ): math.exp(found["logprobs"][e])
                for e in entries
            }
        )
    return sets, found | {"places": paths.position}


THE_WORD, THEN, CAT, CAR = [THE], [THE, N], [CA, T], [CA, R]


def test_a_word_of_two_pieces_is_told_from_those_that_begin_like_it() -> None:
    sets, _ = expected([(2, CAT), (0, THE_WORD)])
    # float32 carries seven digits of the logarithms
    assert sets[0] == pytest.approx(
        {frozenset({b" cat"}): 0.3, frozenset({b" car"}): 0.2, frozenset({b" the", b" then"}): 0.5}, rel=1e-5
    )


def test_the_row_after_a_word_says_whether_it_goes_on() -> None:
    sets, _ = expected([(0, THE_WORD), (3, CAR)])
    assert sets[0] == pytest.approx(
        {frozenset({b" the"}): 0.4, frozenset({b" then"}): 0.1, frozenset({b" cat", b" car"}): 0.5}, rel=1e-5
    )


def test_at_the_end_of_the_rows_the_token_stands_for_what_it_begins_with() -> None:
    sets, _ = expected([(3, CAR), (0, THE_WORD)])
    assert sets[1] == pytest.approx({frozenset({b" the"}): 0.5, frozenset({b" cat", b" car"}): 0.5}, rel=1e-5)


def test_what_the_word_before_rules_out_is_no_outcome() -> None:
    sets, found = expected([(0, THE_WORD), (2, CAT)])
    # after ` the` the teacher expects `n` a fifth of the time; the student would have read ` then`
    assert sets[1] == pytest.approx(
        {frozenset({b" cat"}): 0.3, frozenset({b" car"}): 0.2, frozenset({b" the", b" then"}): 0.5}, rel=1e-5
    )
    assert found["tail_mass"][1] < 1e-6


@pytest.mark.parametrize("k", [1, 2, 3])
def test_masses_and_the_rest_are_one(k: int) -> None:
    sets, found = expected([(0, THE_WORD), (2, CAT), (1, THEN), (3, CAR)], k=k)
    for row, rest in zip(sets, found["tail_mass"], strict=True):
        assert sum(row.values()) + rest == pytest.approx(1.0, abs=1e-6)
    assert (found["tail_mass"] > 0.1).any() == (k < 3)  # rows that keep less leave the others to the rest


def test_a_student_that_speaks_the_language_is_at_zero() -> None:
    text = [(0, THE_WORD), (2, CAT), (1, THEN), (3, CAR), (0, THE_WORD), (1, THEN)]
    _, found = expected(text)
    logits = torch.tensor([[*WORDS.values(), 1e-30]], dtype=torch.float64).log().repeat(len(text), 1)
    batch = {name: torch.from_numpy(np.asarray(value)) for name, value in found.items()}
    targets = loss_targets(batch | {"gold_ids": torch.tensor([token for token, _ in text])})
    # probabilities are stored as float32: 1e-7 of the mass lies where the student gives 1e-30
    assert text_kl(logits, targets).abs().max() < 1e-5


def test_where_no_piece_begins_the_target_is_the_token_of_the_text() -> None:
    paths = PiecePaths(TEACHER, STUDENT, cut_by_length(TEACHER))
    starts = starts_of([CAT], [2])
    found = text_rows(paths, rows_of(CAT), starts, np.array([2, 4, 4]), 1.0)
    assert found["kept"].tolist() == [3, 1, 1]
    assert found["range_starts"][3:].tolist() == [paths.position[4]] * 2
    assert found["logprobs"][3:].tolist() == found["tail_mass"][1:].tolist() == [0.0, 0.0]


def test_examples_follow_one_another() -> None:
    paths = PiecePaths(TEACHER, STUDENT, cut_by_length(TEACHER))
    one, other = starts_of([CAT], [2]), starts_of([THEN], [1])
    both = joined_starts(
        [
            one,
            Starts(
                other.position + 1,
                other.token,
                other.first + 2,
                other.stop + 2,
                other.after,
                other.reading,
                other.before,
            ),
        ]
    )
    found = text_rows(paths, rows_of([*CAT, *THEN]), both, np.array([2, 1]), 1.0)
    assert found["kept"].tolist() == [3, 3]


def test_a_piece_that_is_longer_than_the_student_s_tokens_stands_for_the_first_of_them() -> None:
    paths = PiecePaths([b"abc", b"ab", b"x"], [b"a", b"b", b"c", b"x"], cut_by_length([b"abc", b"ab", b"x"]))
    rows = SoftTargets(
        gold_ids=np.array([2]),
        log_z=np.zeros((1, 1), dtype=np.float32),
        temperatures=(1.0,),
        gold_logprob=np.log([0.25]).astype(np.float32),
        gold_rank=np.array([2]),
        byte_end=np.array([1]),
        token_ids=np.array([[0, 1, 2]], dtype=np.int32),
        logprobs=np.log([[0.5, 0.25, 0.25]]).astype(np.float32),
    )
    starts = Starts(*(np.array([v]) for v in (0, 3, 0, 1, -1, AS_IT_IS, -1)))
    found = text_rows(paths, rows, starts, np.array([3]), 1.0)
    masses = dict(zip(found["range_starts"].tolist(), np.exp(found["logprobs"]).tolist(), strict=True))
    assert masses == pytest.approx({int(paths.position[0]): 0.75, int(paths.position[3]): 0.25}, rel=1e-6)
