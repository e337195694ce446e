"""Pieces that teacher and student share: vocabularies are compared as bytes, so `▁the`, `Ġthe` and ` the` are one.

A sentencepiece tokenizer puts a mark before the text that is not in it: at the beginning of a text its `▁the` stands for
`the`. Where one side does so and the other does not, the first piece is looked up without, or with, the space.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from kd.cache_builder.store.readers.reading import Reader
from kd.models.tokenizer import Tokenizer, token_bytes


@dataclass(frozen=True)
class SharedPieces:
    """The student's id of every teacher piece, `[V_t]` each; -1 where it has none."""

    ids: np.ndarray
    """Id of the piece as it is."""
    bare: np.ndarray
    """Id of the piece without its leading space; -1 for pieces that have none."""
    spaced: np.ndarray
    """Id of the piece with a space before it."""
    teacher: list[bytes]
    """Bytes of the teacher's pieces."""
    student: list[bytes]
    """Bytes of the student's pieces."""

    @property
    def overlap(self) -> float:
        """Share of the teacher's ids that the student has too."""
        return float((self.ids >= 0).mean())

    def at_start(self, teacher_id: int, teacher_end: int, student_id: int, student_end: int) -> np.ndarray:
        """The ids to use at the beginning of a text, given its first tokens and the bytes where these end."""
        teacher = _has_mark(self.teacher[teacher_id], teacher_end)
        student = _has_mark(self.student[student_id], student_end)
        return self.ids if teacher == student else self.bare if teacher else self.spaced


def _has_mark(piece: bytes, end: int) -> bool:
    """Whether the first piece of a text begins with a space that the text does not have."""
    return piece.startswith(b" ") and end == len(piece) - 1


def shared_pieces(reader: Reader, tokenizer: Tokenizer, size: int | None = None) -> SharedPieces:
    """Match the vocabularies; a piece that occurs twice on a side is left out, as special tokens are, but for EOS.

    size  number of the tokenizer's ids that the student has; None = all
    """
    teacher, student = reader.vocabulary(), token_bytes(tokenizer)[:size]
    special = {*tokenizer.all_special_ids}
    numbers: dict[bytes, int] = {}
    for number, piece in enumerate(student):
        if piece and number not in special:
            numbers[piece] = -1 if piece in numbers else number
    counts = Counter(teacher)
    eos = reader.manifest.identity["tokenizer"].get("eos_token_id")

    def matched(pieces: list[bytes]) -> np.ndarray:
        once = [
            numbers.get(piece, -1) if counts[original] == 1 else -1
            for original, piece in zip(teacher, pieces, strict=True)
        ]
        ids = np.array(once, dtype=np.int64)
        if eos is not None and eos < len(ids):
            ids[eos] = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        return ids

    bare = [piece[1:] if piece.startswith(b" ") else b"" for piece in teacher]
    return SharedPieces(matched(teacher), matched(bare), matched([b" " + piece for piece in teacher]), teacher, student)
