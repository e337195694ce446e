"""Pieces of two vocabularies as bytes, and at the beginning of a text, where one side puts a mark that is not in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kd.cache_builder.store.readers.reader import CacheReader
from kd.models.tokenizer import load_tokenizer, token_bytes
from kd.student_trainer.batches import pieces
from kd.student_trainer.batches.alignment import Side, align
from kd.student_trainer.batches.collate import Collator
from kd.student_trainer.batches.pieces import SharedPieces, shared_pieces
from kd.student_trainer.batches.student_text import StudentText
from kd.student_trainer.losses.loss_registry import Objective


def test_pieces_are_shared_by_their_bytes_whatever_their_spelling(
    t5_dir: Path, tokenizer_dir: Path, tmp_path: Path, build_request, run_build
) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "The fox", "target": "went home."}\n')
    run_build(build_request(tmp_path / "c", model=t5_dir, text=tmp_path / "pairs.jsonl", layout=None))
    reader, student = CacheReader(tmp_path / "c"), load_tokenizer(str(tokenizer_dir))
    teacher_pieces, student_pieces = reader.vocabulary(), token_bytes(student)
    pieces = shared_pieces(reader, student)
    ids = pieces.ids
    assert 0 < pieces.overlap < 1
    assert ids[1] == student.eos_token_id  # </s> and <|endoftext|> both end a text
    found = [(teacher_pieces[t], student_pieces[s]) for t, s in enumerate(ids) if s >= 0 and t != 1]
    assert all(a == b for a, b in found)
    assert any(a.startswith(b" ") for a, _ in found)  # spelled with ▁ on one side and Ġ on the other
    assert len({s for s in ids if s >= 0}) == (ids >= 0).sum()


def test_shared_pieces_are_those_that_both_sides_have_once(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = [b"</s>", b" the", b"x", b"x", b"fox", b"<s>", b"twice"]
    student = [b"fox", b" the", b"x", b"<end>", b"<s>", b"twice", b"twice", b""]
    monkeypatch.setattr(pieces, "token_bytes", lambda _: student)
    reader: Any = SimpleNamespace(
        vocabulary=lambda: teacher, manifest=SimpleNamespace(identity={"tokenizer": {"eos_token_id": 0}})
    )
    tokenizer = SimpleNamespace(all_special_ids=[3, 4], eos_token_id=3)
    found = pieces.shared_pieces(reader, tokenizer)
    assert found.ids.tolist() == [3, 1, -1, -1, 0, -1, -1]
    assert found.overlap == pytest.approx(3 / 7)
    found = pieces.shared_pieces(reader, SimpleNamespace(all_special_ids=[], eos_token_id=None))
    assert found.ids[0] == -1


def made_up(teacher: list[bytes], student: list[bytes]) -> SharedPieces:
    places = {piece: i for i, piece in enumerate(student)}
    match = lambda pieces: np.array([places.get(p, -1) for p in pieces])  # noqa: E731
    bare = [p[1:] if p.startswith(b" ") else b"?" for p in teacher]
    return SharedPieces(match(teacher), match(bare), match([b" " + p for p in teacher]), teacher, student)


@pytest.mark.parametrize(
    ("teacher", "student", "meaning"),
    [
        ((b" the", 3), (b"the", 3), "bare"),  # sentencepiece to byte-level
        ((b"the", 3), (b" the", 3), "spaced"),  # and back
        ((b" the", 3), (b" the", 3), "ids"),  # both put the mark
        ((b"the", 3), (b"the", 3), "ids"),  # neither does
        ((b" the", 4), (b" the", 4), "ids"),  # the text begins with a space
        ((b" ", 0), (b"the", 3), "bare"),  # a mark alone, before a piece that has none
    ],
)
def test_the_first_piece_is_matched_with_the_mark_its_side_puts(teacher, student, meaning: str) -> None:
    found = made_up([teacher[0], b" fox", b"fox"], [student[0], b" fox", b"fox"])
    got = found.at_start(0, teacher[1], 0, student[1])
    assert got is getattr(found, meaning)
    if meaning == "bare":
        assert got[1] == 2
    if meaning == "spaced":
        assert got[2] == 1


def test_a_t5_teachers_first_row_names_what_a_byte_level_student_predicts(
    t5_dir: Path, tokenizer_dir: Path, tmp_path: Path, build_request, run_build
) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "The fox", "target": "the fox went to the house"}\n' * 3)
    run_build(
        build_request(
            tmp_path / "c", model=t5_dir, text=tmp_path / "pairs.jsonl", layout=None, profile="full", top_k=64
        )
    )
    reader, tokenizer = CacheReader(tmp_path / "c"), load_tokenizer(str(tokenizer_dir))
    matches = shared_pieces(reader, tokenizer)
    text = StudentText(reader, tokenizer, window=64, separator="\n")
    example = reader[0]
    assert matches.teacher[example.targets.gold_ids[0]].startswith(b" ")
    assert not matches.student[text[0].target_ids[0]].startswith(b" ")
    batch = Collator(Objective("hybrid", "bands", 0.5), text, pieces=matches)([example])
    named = batch["group_student_ids"].numpy()
    kept = example.targets.token_ids
    assert kept is not None
    rows = align(Side(example.targets.byte_end, reader_has_eos := text.teacher_has_eos[0]), text[0].side).teacher[:, 0]
    assert reader_has_eos
    assert len(rows) == len(named) > 2
    for group, row in enumerate(rows):
        strip = int(row == 0)
        pairs = [
            (matches.teacher[t], matches.student[s])
            for t, s in zip(kept[row], named[group], strict=True)
            if s >= 0 and t != 1
        ]
        assert all(a[strip:] == b for a, b in pairs), (group, pairs)
        assert group > 0 or pairs
