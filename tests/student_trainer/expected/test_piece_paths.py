"""The student's tokens as paths of pieces, against the tree written out with dictionaries."""

from __future__ import annotations

import random

import numpy as np
import pytest

from kd.student_trainer.expected.piece_paths import (
    AS_IT_IS,
    WITH_SPACE,
    WITHOUT_SPACE,
    PiecePaths,
    better_cut,
    cut_by_length,
    cut_by_merges,
)

TEACHER = [b"</s>", b" ", b"t", b"h", b"e", b"n", b"c", b"a", b"r", b" t", b"he", b" the", b" ca", b"r", b"nn"]
STUDENT = [b" the", b" then", b" cat", b" car", b" c", b" ", b"t", b"h", b"e", b"n", b"<end>", b"then", b""]


def paths() -> PiecePaths:
    return PiecePaths(TEACHER, STUDENT, cut_by_length(TEACHER), special=[10], ends=(0, 10))


def tokens(found: PiecePaths, start: int, stop: int) -> set[bytes]:
    """The student tokens of a range of places."""
    return {STUDENT[i] for i in range(len(STUDENT)) if start <= found.position[i] < stop}


def after(found: PiecePaths, *pieces: bytes) -> int:
    node = np.array([0])
    for piece in pieces:
        node = found.child(node, np.array([TEACHER.index(piece)]))
    return int(node[0])


def test_merges_follow_the_numbers_of_the_pieces() -> None:
    cut = cut_by_merges([b"a", b"b", b"c", b"bc", b"ab", b"abc"])
    assert cut(b"abca") == (b"abc", b"a")
    assert cut(b"abab") == (b"ab", b"ab")


def test_the_longest_piece_that_fits_is_taken_again_and_again() -> None:
    pieces = [b"a", b"b", b"c", b"bc", b"ab"]
    assert cut_by_length(pieces)(b"abc") == (b"ab", b"c")
    assert cut_by_merges(pieces)(b"abc") == (b"a", b"bc")
    assert cut_by_length(pieces)(b"axc") is cut_by_merges(pieces)(b"axc") is None


@pytest.mark.parametrize("seen", [(b"a", b"bc"), (b"ab", b"c")])
def test_the_way_to_cut_is_that_of_the_teacher_s_rows(seen: tuple[bytes, ...]) -> None:
    assert better_cut([b"a", b"b", b"c", b"bc", b"ab"], [seen, (b"c",)])(b"abc") == seen


def test_a_piece_stands_for_all_tokens_that_begin_with_it() -> None:
    found = paths()
    nodes, pieces = np.zeros(3, dtype=int), np.array([TEACHER.index(p) for p in (b" the", b" ca", b"t")])
    ranges = zip(*found.ranges(nodes, pieces, np.full(3, AS_IT_IS)), strict=True)
    assert [tokens(found, *r) for r in ranges] == [{b" the", b" then"}, {b" cat", b" car"}, {b"t", b"then"}]


def test_further_pieces_narrow_the_set() -> None:
    found = paths()
    node = after(found, b" ca", b"t")
    assert tokens(found, found.starts[node], found.stops[node]) == {b" cat"}
    assert after(found, b" ca", b"n") == after(found, b" ca", b"n", b"t") == -1


def test_a_piece_that_no_token_begins_with_stands_for_the_token_that_begins_it() -> None:
    found = paths()
    nn, pieces = TEACHER.index(b"nn"), np.array([TEACHER.index(b"nn"), TEACHER.index(b"e")])
    starts, stops = found.ranges(np.array([0, after(found, b" ca")]), pieces, np.full(2, AS_IT_IS))
    assert nn == pieces[0]
    assert tokens(found, starts[0], stops[0]) == {b"n"}
    assert tokens(found, starts[1], stops[1]) == {b" c"}  # of ` cae` the student would read ` c` first
    assert found.ranges(np.array([0]), np.array([TEACHER.index(b"a")]), np.array([AS_IT_IS]))[0].tolist() == [-1]


def test_the_ends_of_text_are_one_outcome_and_special_tokens_are_none() -> None:
    found = paths()
    starts, stops = found.ranges(np.array([0]), np.array([0]), np.array([AS_IT_IS]))
    assert (starts[0], stops[0]) == (found.position[10], found.position[10] + 1)
    without = PiecePaths(TEACHER, STUDENT, cut_by_length(TEACHER), special=[10])
    assert without.position[10] >= without.stops[0]


def test_at_the_beginning_of_a_text_one_side_may_put_a_space() -> None:
    found = paths()
    the, then = STUDENT.index(b" the"), STUDENT.index(b"then")
    piece = TEACHER.index(b" the")
    assert found.reading(piece, 3, then, 4) == WITHOUT_SPACE
    assert found.reading(piece, 3, the, 3) == found.reading(piece, 4, the, 4) == AS_IT_IS
    assert found.reading(TEACHER.index(b"he"), 2, the, 3) == WITH_SPACE
    starts, stops = found.ranges(np.array([0, 0]), np.array([piece, 2]), np.array([WITHOUT_SPACE, WITH_SPACE]))
    assert tokens(found, starts[0], stops[0]) == {b"t"}  # `the` is no piece: the longest token that begins it
    assert tokens(found, starts[1], stops[1]) == {b" "}  # ` t` is a piece that no token begins with


@pytest.mark.parametrize("seed", range(5))
def test_the_tokens_of_a_node_are_those_whose_path_leads_to_it(seed: int) -> None:
    rng = random.Random(seed)
    teacher, student = (
        [b"a", b"b", b"c", *sorted({bytes(rng.choices(b"abc", k=rng.randint(2, longest))) for _ in range(40)})]
        for longest in (3, 5)
    )
    cut = cut_by_length(teacher)
    found = PiecePaths(teacher, student, cut)
    assert sorted(found.position) == list(range(len(student)))
    numbers = {piece: number for number, piece in enumerate(teacher)}
    every = [[numbers[p] for p in ((token,) if token in numbers else cut(token) or ())] for token in student]
    for path in every:
        node = np.array([0])
        for depth, piece in enumerate(path, 1):
            node = found.child(node, np.array([piece]))
            below = {
                t for t in range(len(student)) if found.starts[node[0]] <= found.position[t] < found.stops[node[0]]
            }
            assert below == {t for t, other in enumerate(every) if other[:depth] == path[:depth]}
