"""The same text cut by two tokenizers: which teacher rows and which student tokens cover the same bytes.

A *group* is a run of teacher rows and a run of student tokens that begin and end at the same byte. Walking both
lists of byte ends, a group closes at every end they share, so groups are as short as the two cuts allow; with equal
tokenizers each holds one token of either side. Ends are bytes of the target's UTF-8 text, as the cache stores them:
neither the teacher nor its tokenizer is needed. A row predicts the token it is stored for, and so does the student's
position before that token: no shift is left to get wrong (TRL's GOLD compares one position late by default).

`positions` pairs the t-th row with the t-th token whatever the text, as the ULD paper does (arXiv:2402.12030).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Side:
    """One tokenizer's cut of a target text."""

    byte_end: np.ndarray
    """[n] int64, non-decreasing: byte of the text where each token ends; an EOS token ends where the text does."""
    has_eos: bool = False
    """Whether the last token is EOS."""
    start: int = 0
    """Byte where the first token begins."""

    @property
    def text_tokens(self) -> int:
        """Number of tokens that are text, EOS not counted."""
        return len(self.byte_end) - self.has_eos


@dataclass(frozen=True)
class Alignment:
    """Groups in text order, both sides monotone and without holes between groups."""

    teacher: np.ndarray
    """[G, 2] int64: rows [start, stop) of each group."""
    student: np.ndarray
    """[G, 2] int64: target tokens [start, stop) of each group."""
    bytes_aligned: int
    """Bytes of the text that lie in groups."""

    def __len__(self) -> int:
        return len(self.teacher)

    def shifted(self, teacher: int, student: int) -> Alignment:
        """The same groups after so many more rows and tokens."""
        return Alignment(self.teacher + teacher, self.student + student, self.bytes_aligned)


def one_alignment(parts: Sequence[Alignment]) -> Alignment:
    """Alignments of consecutive texts as one."""
    none = np.zeros((0, 2), dtype=np.int64)
    return Alignment(
        np.concatenate([none, *(part.teacher for part in parts)]),
        np.concatenate([none, *(part.student for part in parts)]),
        sum(part.bytes_aligned for part in parts),
    )


def first_token_pairs(pairs: Alignment) -> Alignment:
    """The first token of both sides of each group."""
    teacher, student = (np.stack([side[:, 0], side[:, 0] + 1], axis=1) for side in (pairs.teacher, pairs.student))
    return Alignment(teacher, student, pairs.bytes_aligned)


def single_token_pairs(pairs: Alignment, student: Side) -> Alignment:
    """The groups that have one token on both sides; `student` gives the bytes of their text."""
    single = (np.diff(pairs.teacher, axis=1) == 1).all(axis=1) & (np.diff(pairs.student, axis=1) == 1).all(axis=1)
    kept = pairs.student[single]
    ends = np.concatenate([[student.start], student.byte_end])
    return Alignment(pairs.teacher[single], kept, int((ends[kept[:, 1]] - ends[kept[:, 0]]).sum()))


def align(teacher: Side, student: Side, *, mode: str = "bytes", eos: bool = True) -> Alignment:
    """Align two cuts of one text; `eos` also pairs the two EOS tokens, where both sides have one.

    Text that is cut short on one side (a window) is aligned as far as it goes.
    """
    text = align_bytes(teacher, student) if mode == "bytes" else align_positions(teacher, student)
    if not (eos and teacher.has_eos and student.has_eos):
        return text
    ends = [np.array([[side.text_tokens, side.text_tokens + 1]]) for side in (teacher, student)]
    return Alignment(
        np.concatenate([text.teacher, ends[0]]), np.concatenate([text.student, ends[1]]), text.bytes_aligned
    )


def align_bytes(teacher: Side, student: Side) -> Alignment:
    """Close a group at every byte where a token of either side ends; tokens without bytes join the group before them.

    A token that takes no bytes at the very beginning (sentencepiece's word mark) joins the first group.
    """
    ends = [side.byte_end[: side.text_tokens] for side in (teacher, student)]
    left, right = (np.union1d([side.start], end) for side, end in zip((teacher, student), ends, strict=True))
    shared = np.intersect1d(left, right)
    if len(shared) < 2:
        empty = np.zeros((0, 2), dtype=np.int64)
        return Alignment(empty, empty, 0)
    cuts = [
        np.where(shared == side.start, 0, np.searchsorted(end, shared, side="right"))
        for side, end in zip((teacher, student), ends, strict=True)
    ]
    groups = [np.stack([c[:-1], c[1:]], axis=1) for c in cuts]
    return Alignment(groups[0], groups[1], int(shared[-1] - shared[0]))


def align_positions(teacher: Side, student: Side) -> Alignment:
    """Pair token by token up to the shorter side; `bytes_aligned` counts the tokens that do cover the same bytes."""
    count = min(teacher.text_tokens, student.text_tokens)
    pairs = np.stack([np.arange(count), np.arange(1, count + 1)], axis=1)
    ends = [side.byte_end[:count] for side in (teacher, student)]
    starts = [np.concatenate([[s.start], e])[:count] for s, e in zip((teacher, student), ends, strict=True)]
    same = (starts[0] == starts[1]) & (ends[0] == ends[1])
    return Alignment(pairs, pairs, int((ends[0] - starts[0])[same].sum()))
