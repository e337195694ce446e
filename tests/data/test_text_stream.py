"""A text that is read one example after another is the text that is read whole."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import pytest

from kd.common.errors import DataError
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.sources import load_corpus, stream_text
from kd.data.text_stream import TextStream, in_memory

PIECES = ["a", " b ", "\n", "<|endoftext|>", "  <|endoftext|>\t", "c\n\nd", "é"]


def documents_at_once(text: str, prefix: str) -> list[tuple[str, str]]:
    """Ids and texts of a `.txt` file, by one search over all of it: the slow twin."""
    parts = re.split(r"(?m)^[ \t]*<\|endoftext\|>[ \t]*$\n?|<\|endoftext\|>", text)
    texts = [part.strip("\n") for part in parts if part.strip()]
    return [(prefix if len(texts) == 1 else f"{prefix}:{n}", one) for n, one in enumerate(texts)]


@pytest.mark.parametrize("seed", range(40))
def test_documents_between_marks_are_those_of_one_search(tmp_path: Path, seed: int):
    import random

    text = "".join(random.Random(seed).choices(PIECES, k=12))
    (tmp_path / "t.txt").write_text(text)
    wanted = documents_at_once(text, "t.txt")
    if not wanted:
        with pytest.raises(DataError, match="no text found"):
            load_corpus(str(tmp_path / "t.txt"))
        return
    assert [(e.id, e.target) for e in load_corpus(str(tmp_path / "t.txt")).examples] == wanted


def lines(folder: Path) -> Path:
    rows = [{"text": f"text {n}" if n % 3 else " ", "id": f"x{n}"} for n in range(12)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_stream_is_read_again_from_the_beginning_and_can_be_sent(tmp_path: Path):
    stream = stream_text(str(lines(tmp_path)), limit=5)
    assert isinstance(stream, TextStream)
    corpus = load_corpus(str(tmp_path), limit=5)
    for text in (stream, stream, pickle.loads(pickle.dumps(stream))):
        left_out = LeftOut()
        assert tuple(text.reading(left_out)) == corpus.examples
        assert left_out == corpus.left_out
    assert corpus.left_out.counts == {"without_text": 4, "beyond_limit": 3}
    assert corpus.left_out.first == {"without_text": "a.jsonl:0", "beyond_limit": "a.jsonl:8"}
    assert in_memory(corpus) is corpus


def test_an_endless_stream_ends_at_its_limit():
    def read(left_out: LeftOut):
        for number in range(3):
            yield Example(str(number), "text")
        pytest.fail("read beyond the limit")

    stream = TextStream("s", "train", "documents", {}, read, limit=3, endless=True)
    assert [e.id for e in stream.reading(LeftOut())] == ["0", "1", "2"]


def test_an_id_that_a_column_gives_twice_is_an_error(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}\n')
    with pytest.raises(DataError, match="two examples have the same id") as caught:
        load_corpus(str(tmp_path), columns={"id": "id"})
    assert caught.value.details["found"] == "x"


def test_files_of_two_kinds_are_refused_before_anything_is_read(tmp_path: Path):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.jsonl").write_text('{"prompt": "a", "target": "b"}\n')
    with pytest.raises(DataError, match="mix texts of several kinds"):
        stream_text(str(tmp_path))


def test_a_mixture_is_in_memory():
    assert not isinstance(stream_text("mini"), TextStream)
