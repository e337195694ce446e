"""Two cuts of one text: what every alignment of them keeps, a walk written out by hand, and real tokenizers."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kd.models.tokenizer import encode_with_ends, load_tokenizer, token_bytes
from kd.student_trainer.batches.alignment import Alignment, Side, align, first_token_pairs, single_token_pairs


def side(*ends: int, eos: bool = False, start: int = 0) -> Side:
    return Side(np.array(ends, dtype=np.int64), eos, start)


@st.composite
def cuts(draw: st.DrawFn, length: int, *, whole: bool = True) -> Side:
    """Tokens of 0 or more bytes over `length` bytes, maybe from a later byte, maybe cut short, maybe with EOS."""
    start = draw(st.integers(0, 0 if whole else length))
    stop = length if whole else draw(st.integers(start, length))
    inner = draw(st.lists(st.integers(start, stop), max_size=12))
    ends = sorted([*inner, stop] if stop > start else inner)
    eos = stop == length and draw(st.booleans())
    return side(*ends, *([length] if eos else []), eos=eos, start=start)


@st.composite
def pairs(draw: st.DrawFn, whole: bool = True) -> tuple[Side, Side]:
    length = draw(st.integers(0, 12))  # short, so that borders meet
    return draw(cuts(length, whole=whole)), draw(cuts(length, whole=whole))


ANY = st.one_of(pairs(whole=True), pairs(whole=False))


def borders(cut: Side) -> set[int]:
    return {cut.start, *cut.byte_end[: cut.text_tokens].tolist()}


def spans(cut: Side, ranges: np.ndarray) -> list[tuple[int, int]]:
    """The bytes `[begin, end)` of each range of tokens."""
    edges = [cut.start, *cut.byte_end.tolist()]
    return [(edges[first], edges[stop]) for first, stop in ranges.tolist()]


def walk(teacher: Side, student: Side) -> list[tuple[int, int, int, int]]:
    """Two pointers, one byte border at a time: the slow twin of `align`."""
    sides = (teacher, student)
    ends = [s.byte_end[: s.text_tokens].tolist() for s in sides]
    at, place, opened = [0, 0], [teacher.start, student.start], None
    groups = []
    while True:
        while place[0] != place[1]:
            behind = 0 if place[0] < place[1] else 1
            if at[behind] == len(ends[behind]):
                return groups
            place[behind] = ends[behind][at[behind]]
            at[behind] += 1
        here = place[0]
        for i in (0, 1):  # tokens of no bytes belong to what came before them, if anything did
            while here != sides[i].start and at[i] < len(ends[i]) and ends[i][at[i]] == here:
                at[i] += 1
        if opened is not None:
            groups.append((opened[0], at[0], opened[1], at[1]))
        opened = tuple(at)
        for i in (0, 1):
            while place[i] == here:
                if at[i] == len(ends[i]):
                    return groups
                place[i] = ends[i][at[i]]
                at[i] += 1


# Laws


@given(ANY)
def test_both_sides_of_a_group_cover_the_same_bytes(pair: tuple[Side, Side]) -> None:
    found = align(*pair, eos=False)
    teacher, student = (spans(cut, ranges) for cut, ranges in zip(pair, (found.teacher, found.student), strict=True))
    assert teacher == student
    assert found.bytes_aligned == sum(end - begin for begin, end in teacher)
    assert all(end > begin for begin, end in teacher)


@given(ANY)
def test_groups_follow_one_another_without_holes_and_hold_tokens_of_both_sides(pair: tuple[Side, Side]) -> None:
    found = align(*pair, eos=False)
    for ranges in (found.teacher, found.student):
        assert (ranges[1:, 0] == ranges[:-1, 1]).all()
        assert (ranges[:, 1] > ranges[:, 0]).all()


@given(ANY)
def test_every_shared_border_closes_a_group(pair: tuple[Side, Side]) -> None:
    shared = sorted(borders(pair[0]) & borders(pair[1]))
    found = align(*pair, eos=False)
    assert spans(pair[0], found.teacher) == list(pairwise(shared))
    assert len(found) == max(len(shared) - 1, 0)


@given(ANY)
def test_two_pointers_find_the_same_groups(pair: tuple[Side, Side]) -> None:
    found = align(*pair, eos=False)
    assert np.concatenate([found.teacher, found.student], axis=1).tolist() == [list(g) for g in walk(*pair)]


@given(pairs())
def test_whole_texts_align_from_the_first_token_to_the_last(pair: tuple[Side, Side]) -> None:
    found = align(*pair, eos=False)
    size = int(pair[0].byte_end[-1]) if len(pair[0].byte_end) else 0
    assert found.bytes_aligned == size
    if size:
        assert found.teacher[0, 0] == found.student[0, 0] == 0
        assert (found.teacher[-1, 1], found.student[-1, 1]) == (pair[0].text_tokens, pair[1].text_tokens)


@given(ANY)
def test_sides_may_be_swapped(pair: tuple[Side, Side]) -> None:
    one, other = align(*pair), align(*reversed(pair))
    assert np.array_equal(one.teacher, other.student)
    assert np.array_equal(one.student, other.teacher)
    assert one.bytes_aligned == other.bytes_aligned


@given(st.lists(st.integers(1, 5), max_size=12), st.booleans())
def test_equal_cuts_pair_token_with_token(widths: list[int], eos: bool) -> None:
    ends = np.cumsum(widths).tolist()
    cut = side(*ends, *([sum(widths)] if eos else []), eos=eos)
    found = align(cut, cut)
    single = [[i, i + 1] for i in range(len(widths) + eos)]
    assert found.teacher.tolist() == found.student.tolist() == single


# Cases worked by hand


@given(ANY)
def test_first_and_single_tokens_keep_one_token_of_each_side(pair: tuple[Side, Side]) -> None:
    whole = align(*pair)
    first, single = first_token_pairs(whole), single_token_pairs(whole, pair[1])
    assert first.teacher.tolist() == [[start, start + 1] for start, _ in whole.teacher.tolist()]
    assert first.student.tolist() == [[start, start + 1] for start, _ in whole.student.tolist()]
    groups = zip(whole.teacher.tolist(), whole.student.tolist(), strict=True)
    kept = [(a, b) for a, b in groups if a[1] - a[0] == b[1] - b[0] == 1]
    assert list(zip(single.teacher.tolist(), single.student.tolist(), strict=True)) == kept
    assert single.bytes_aligned == sum(end - begin for begin, end in spans(pair[1], single.student))
    if len(kept) == len(whole):
        assert single.bytes_aligned == whole.bytes_aligned


def test_groups_close_where_both_cuts_end() -> None:
    #          |the |quick|est fox|   against |the quick|e|st| fox|
    found = align(side(4, 9, 16), side(9, 10, 12, 16))
    assert found.teacher.tolist() == [[0, 2], [2, 3]]
    assert found.student.tolist() == [[0, 1], [1, 4]]
    assert found.bytes_aligned == 16


def test_a_token_without_bytes_joins_the_first_group_at_the_start_and_the_one_before_it_elsewhere() -> None:
    found = align(side(0, 3, 3, 6), side(3, 6))
    assert found.teacher.tolist() == [[0, 3], [3, 4]]
    assert found.student.tolist() == [[0, 1], [1, 2]]


def test_tokens_that_meet_nowhere_but_at_the_end_are_one_group() -> None:
    found = align(side(1, 3, 5, 6), side(2, 4, 6))
    assert (found.teacher.tolist(), found.student.tolist()) == ([[0, 4]], [[0, 3]])


def test_eos_is_paired_with_eos_only() -> None:
    both = align(side(3, 3, eos=True), side(1, 3, 3, eos=True))
    assert (both.teacher.tolist(), both.student.tolist()) == ([[0, 1], [1, 2]], [[0, 2], [2, 3]])
    assert both.bytes_aligned == 3
    for teacher, student, policy in (
        (side(3, 3, eos=True), side(1, 3), True),
        (side(3), side(1, 3, 3, eos=True), True),
        (side(3, 3, eos=True), side(1, 3, 3, eos=True), False),
    ):
        found = align(teacher, student, eos=policy)
        assert (found.teacher.tolist(), found.student.tolist()) == ([[0, 1]], [[0, 2]])


@pytest.mark.parametrize("mode", ["bytes", "positional"])
def test_an_empty_target_is_its_eos(mode: str) -> None:
    found = align(side(0, eos=True), side(0, eos=True), mode=mode)
    assert (found.teacher.tolist(), found.student.tolist(), found.bytes_aligned) == ([[0, 1]], [[0, 1]], 0)
    nothing = align(side(), side(2), mode=mode)
    assert len(nothing) == nothing.bytes_aligned == 0
    assert nothing.teacher.shape == nothing.student.shape == (0, 2)


def test_a_student_that_begins_later_is_aligned_from_the_first_byte_both_begin_at() -> None:
    found = align(side(2, 4, 6), side(4, 6, start=2))
    assert (found.teacher.tolist(), found.student.tolist(), found.bytes_aligned) == (
        [[1, 2], [2, 3]],
        [[0, 1], [1, 2]],
        4,
    )
    inside = align(side(2, 4, 6), side(4, 6, start=3))  # it begins within a teacher token: from the next border
    assert (inside.teacher.tolist(), inside.student.tolist(), inside.bytes_aligned) == ([[2, 3]], [[1, 2]], 2)


def test_a_text_cut_short_is_aligned_as_far_as_both_go() -> None:
    long, short = side(2, 4, 6, 9, 9, eos=True), side(4, 5)
    assert align(long, short).teacher.tolist() == [[0, 2]]
    assert align(short, long).student.tolist() == [[0, 2]]
    assert align(long, short).bytes_aligned == 4


def test_positions_pair_token_by_token_and_count_the_bytes_that_happen_to_agree() -> None:
    found = align(side(2, 4, 6, 9, 9, eos=True), side(2, 3, 6, 9, eos=True), mode="positional")
    assert found.teacher.tolist() == [[0, 1], [1, 2], [2, 3], [4, 5]]  # the longer side's last text token is left out
    assert found.student.tolist() == [[0, 1], [1, 2], [2, 3], [3, 4]]
    assert found.bytes_aligned == 2


@given(ANY)
def test_positions_go_to_the_end_of_the_shorter_side(pair: tuple[Side, Side]) -> None:
    found = align(*pair, mode="positional", eos=False)
    assert len(found) == min(cut.text_tokens for cut in pair)
    assert np.array_equal(found.teacher, found.student)
    assert 0 <= found.bytes_aligned <= max(cut.byte_end[-1] if len(cut.byte_end) else 0 for cut in pair)


# Real tokenizers

TEXTS = {
    "plain": "The keeper counted the ships.",
    "accents": "Café crème, naïve éclairs — “too much”, 3 €.",
    "scripts": "日本語 is written without spaces; русский with.",
    "right to left": "שלום עולם (hello) مرحبا بالعالم!",
    "emoji": "😀 and 👩‍👩‍👧 and 🏳️‍🌈🦊",
    "newlines": "def f(x):\n\treturn {x}\n\n\nf(1)",
    "double spaces": "two  spaces,   three",
    "leading space": "  indented",
    "leading newline": "\nnext",
    "trailing spaces": "the end  ",
    "trailing newline": "the end.\n",
    "unknown": "\u16a0\u16b1 rare \U00010348 runes",
    "ligatures": "ﬁve ½ ①",
    "combining": "e\u0301 a\u030a",
    "one": "a",
    "space": " ",
}
NAMES = ("t5", "gpt2", "gpt-neox-20b", "smollm2", "stories260K")


@lru_cache
def cut_by(folder: Path, text: str) -> tuple[Side, list[bytes]]:
    """A real tokenizer's cut, and the bytes of its pieces."""
    tokenizer, pieces = loaded(folder)
    ids, ends = encode_with_ends(tokenizer, pieces, text)
    return Side(ends), [pieces[i] for i in ids]


@lru_cache
def loaded(folder: Path):
    tokenizer = load_tokenizer(str(folder))
    return tokenizer, token_bytes(tokenizer)


def folder_of(shared: Path, name: str) -> Path:
    return shared / ("weights" if name == "stories260K" else "tokenizers") / name


def composed(piece: bytes) -> bytes:
    """As GPT-NeoX's normaliser writes it; a part of a character stays as it is."""
    try:
        return unicodedata.normalize("NFC", piece.decode()).encode()
    except UnicodeDecodeError:
        return piece


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize(("first", "second"), list(combinations(NAMES, 2)))
def test_real_tokenizers_align_over_the_whole_text(shared: Path, first: str, second: str, text: str) -> None:
    cut = [cut_by(folder_of(shared, name), text) for name in (first, second)]
    data = text.encode()
    found: Alignment = align(cut[0][0], cut[1][0])
    assert found.bytes_aligned == len(data)
    places = spans(cut[0][0], found.teacher)
    assert places == spans(cut[1][0], found.student)
    assert b"".join(data[begin:end] for begin, end in places) == data
    for (_, pieces), ranges, name in zip(cut, (found.teacher, found.student), (first, second), strict=True):
        if name == "t5":
            continue  # it spells text its own way: see the next test
        spelled = [b"".join(pieces[i:j]) for i, j in ranges.tolist()]
        if name == "stories260K" and not text.startswith(" "):
            spelled[0] = spelled[0].removeprefix(b" ")  # sentencepiece's mark of the beginning
        assert [composed(s) for s in spelled] == [composed(data[begin:end]) for begin, end in places]


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("other", ["gpt2", "stories260K"])
def test_t5_s_pieces_and_the_bytes_of_their_groups_say_the_same(shared: Path, other: str, text: str) -> None:
    """But for white space and what T5 does not know: those it drops or writes in another way."""
    cut, pieces = cut_by(folder_of(shared, "t5"), text)
    student, _ = cut_by(folder_of(shared, other), text)
    found = align(cut, student)
    data = text.encode()
    for (begin, end), (i, j) in zip(spans(cut, found.teacher), found.teacher.tolist(), strict=True):
        said, there = b"".join(pieces[i:j]), data[begin:end]
        if said.isascii() and there.isascii() and b"<unk>" not in said:
            assert said.split() == there.split()
