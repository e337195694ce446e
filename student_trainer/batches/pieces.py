"""Which of the student's tokens a teacher's piece is: vocabularies compared as bytes, so `▁the`, `Ġthe` and ` the` are one.

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
    """Ids `[V_t]` of the student's, -1 where it has none."""

    ids: np.ndarray
    """of every teacher piece"""
    bare: np.ndarray
    """of every teacher piece without its leading space; -1 for those that have none"""
    spaced: np.ndarray
    """of every teacher piece with a space before it"""
    teacher: list[bytes]
    student: list[bytes]

    @property
    def overlap(self) -> float:
        """Share of the teacher's ids that the student has too."""
        return float((self.ids >= 0).mean())

    def at_start(self, teacher_id: int, teacher_end: int, student_id: int, student_end: int) -> np.ndarray:
        """The ids that count at the beginning of a text, seen from its first tokens and the bytes where these end."""
        teacher = _has_mark(self.teacher[teacher_id], teacher_end)
        student = _has_mark(self.student[student_id], student_end)
        return self.ids if teacher == student else self.bare if teacher else self.spaced


def _has_mark(piece: bytes, end: int) -> bool:
    """Does the first piece of a text begin with a space that is not in it?"""
    return piece.startswith(b" ") and end == len(piece) - 1


def shared_pieces(reader: Reader, tokenizer: Tokenizer) -> SharedPieces:
    """Match the vocabularies; a piece that occurs twice on a side is left out, as special tokens are, but for EOS."""
    teacher, student = reader.vocabulary(), token_bytes(tokenizer)
    special = {*tokenizer.all_special_ids}
    places: dict[bytes, int] = {}
    for number, piece in enumerate(student):
        if piece and number not in special:
            places[piece] = -1 if piece in places else number
    counts = Counter(teacher)
    eos = reader.manifest.identity["tokenizer"].get("eos_token_id")

    def matched(pieces: list[bytes]) -> np.ndarray:
        once = [places.get(piece, -1) if counts[own] == 1 else -1 for own, piece in zip(teacher, pieces, strict=True)]
        ids = np.array(once, dtype=np.int64)
        if eos is not None and eos < len(ids):
            ids[eos] = -1 if tokenizer.eos_token_id is None else tokenizer.eos_token_id
        return ids

    bare = [piece[1:] if piece.startswith(b" ") else b"" for piece in teacher]
    return SharedPieces(matched(teacher), matched(bare), matched([b" " + piece for piece in teacher]), teacher, student)
