"""Several processes tokenise a text into the same parts as one, and their faults are said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from token_corpora import TEXT

from kd.cache_builder.tokens import token_pass, tokenise_workers
from kd.cache_builder.tokens.token_pass import IN_MEMORY, Keep, PartWork, tokenise
from kd.cache_builder.tokens.tokenise_workers import Child, processes
from kd.common.errors import CacheError, DataError
from kd.common.progress import final
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.rows.example import Example
from kd.data.sources import stream_text
from kd.data.text_rows import RowMaker
from kd.data.text_stream import Text
from kd.data.tokenizing.block_config import BlockConfig


@pytest.fixture
def text(tmp_path: Path) -> Text:
    lines = [json.dumps({"prompt": "p", "target": f"{TEXT} {n}"}) + "\n" for n in range(60)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    return stream_text(str(tmp_path / "t.jsonl"))


def maker_of(text: Text, tokenizer, **blocks) -> RowMaker:
    config = BlockConfig(**{"seq_len": 120, **blocks}).normalised(text.kind, tokenizer)
    return RowMaker(text.kind, tokenizer, config, ChatSettings(), False, text.spec)


def test_the_files_of_two_processes_are_those_of_one(text: Text, tokenizer, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(token_pass, "PART_CHARACTERS", 700)
    monkeypatch.setattr(tokenise_workers, "FIRST", 1)
    maker = maker_of(text, tokenizer)
    for name, workers in (("one", 1), ("two", 2)):
        final(tokenise(text, maker, 10**6, Keep(tmp_path / name), processes(workers)))
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert len(files) > 5
    assert {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()} == files


def test_a_process_says_what_is_wrong_with_an_example_and_that_it_died(text: Text, tokenizer):
    maker = maker_of(text, tokenizer, bos=False)
    child = Child(PartWork(maker, maker.digest(), 10**6, IN_MEMORY))
    try:
        assert len(child.make(0, [Example("a", TEXT, "prompt")]).rows or ()) == 1
        with pytest.raises(DataError, match="no context to predict from") as caught:
            child.make(1, [Example("b", TEXT)])
        assert caught.value.details["where"] == "example b"
        assert len(child.make(2, [Example("c", TEXT, "prompt")]).rows or ()) == 1  # it goes on
        child._process.kill()
        with pytest.raises(CacheError, match="a process that tokenises the text died"):
            child.make(3, [Example("d", TEXT, "prompt")])
    finally:
        child.close()
