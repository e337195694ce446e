"""A text that is tokenised part by part has the rows, the digest, the counts and the notes of one that is tokenised whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from slow_rows import blocks_of, same_rows
from token_corpora import EMOJI, TEXT

from kd.cache_builder.store.vocabulary import codes_by_count, codes_of_counts
from kd.cache_builder.tokens import part_rows, token_pass
from kd.cache_builder.tokens.token_part import part_path
from kd.cache_builder.tokens.token_pass import COUNTS, IN_MEMORY, Keep, PartWork, tokenise
from kd.cache_builder.tokens.tokenise_workers import processes
from kd.cache_builder.tokens.tokenised_text import StoredRows, TokenisedText
from kd.common.errors import CacheError, DataError
from kd.common.progress import final
from kd.data.conversations.chat_settings import ChatSettings
from kd.data.rows.example import text_digest
from kd.data.sources import load_corpus, stream_text
from kd.data.text_rows import Found, RowMaker
from kd.data.text_stream import Text
from kd.data.tokenizing.block_config import BlockConfig

WIDTH = 10**6


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_pass, "PART_CHARACTERS", 700)


@pytest.fixture(scope="module", params=["documents", "pairs", "conversations"])
def text(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Text:
    """A text of some parts, in which something is left out and something is noticed."""
    rows: list[dict[str, object]] = []
    for n in range(40):
        words = f"{TEXT[n % 30 :]} {EMOJI if n % 3 else '<|endoftext|>'} {n}" if n % 7 else " " * (n % 2)
        if request.param == "documents":
            rows.append({"text": words})
        elif request.param == "pairs":
            rows.append({"prompt": f"say {n}", "target": words})
        else:
            talk = [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": words or "nothing"}]
            rows.append({"messages": [*talk, *talk]})
    file = tmp_path_factory.mktemp("texts") / f"{request.param}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return stream_text(str(file))


def maker_of(text: Text, tokenizer, **blocks) -> RowMaker:
    config = BlockConfig(**{"seq_len": 60, "overlong": "truncate", **blocks}).normalised(text.kind, tokenizer)
    return RowMaker(text.kind, tokenizer, config, ChatSettings(chat_template="plain"), False, text.spec)


def passed(text: Text, maker: RowMaker, keep: Keep, workers: int = 1) -> TokenisedText:
    return final(tokenise(text, maker, WIDTH, keep, processes(workers)))


def test_parts_give_what_the_whole_text_gives(text: Text, tokenizer, tmp_path: Path):
    maker, found = maker_of(text, tokenizer), Found()
    corpus = load_corpus(text.spec)
    rows = list(maker.rows(corpus.examples, found))
    stored = passed(text, maker, Keep(tmp_path / "tokens"))
    assert len(list((tmp_path / "tokens").iterdir())) > 3
    in_memory, counted = passed(text, maker, IN_MEMORY), passed(text, maker, COUNTS)
    for one in (stored, in_memory):
        same_rows(list(one.rows), rows)
        same_rows(one.rows[3:17], rows[3:17])
        same_rows([one.rows[-1]], rows[-1:])
    left_out = corpus.left_out
    left_out.include(found.left_out)
    for one in (stored, in_memory, counted):
        assert one.digest == text_digest(corpus.examples) == corpus.digest
        assert one.left_out.document() == left_out.document()
        assert one.notes == found.notes
        assert (one.examples, len(one.rows)) == (len(corpus.examples), len(rows))
        tokens, scored = (np.concatenate(column) for column in zip(*one.row_lengths(), strict=True))
        np.testing.assert_array_equal(tokens, [len(r.input_ids) for r in rows])
        np.testing.assert_array_equal(scored, [len(r.target_ids) for r in rows])
        size = len(tokenizer) - 5
        codes = codes_by_count(size, (r.input_ids for r in rows))
        np.testing.assert_array_equal(codes_of_counts(size, one.counts), codes)
        assert one.targets == sum(len(r.target_ids) for r in rows)
        assert one.read_only == sum(r.read_only for r in rows)
        assert one.text_bytes == sum(len(r.example.target.encode()) for r in rows)
        together = [r.read_only + len(r.target_ids) for r in rows]
        assert one.longest == max(together)
        sizes = {np.argmax([r.read_only for r in rows]), np.argmax([len(r.target_ids) for r in rows])}
        assert {*one.extremes} == sizes | {np.argmax(together), np.argmin(together)}
        longest = int(np.argmax([len(r.target_ids) for r in rows]))
        assert one.most_targets == (len(rows[longest].target_ids), rows[longest].example.id)


@pytest.mark.parametrize("blocks", [{"bos": False}, {"stride": 7}, {"eos": True}])
def test_blocks_are_those_of_the_slow_twin(tokenizer, tmp_path: Path, blocks):
    parts = [TEXT * 3, EMOJI, "a", "", EMOJI * 9, TEXT]
    (tmp_path / "t.txt").write_text("\n<|endoftext|>\n".join(parts), encoding="utf-8")
    text = stream_text(str(tmp_path / "t.txt"))
    maker = maker_of(text, tokenizer, seq_len=40, **blocks)
    slow = [row for e in load_corpus(text.spec).examples for row in blocks_of(e, tokenizer, maker.blocks)]
    same_rows(list(passed(text, maker, IN_MEMORY).rows), slow)


def test_a_part_that_is_there_is_not_made_again(text: Text, tokenizer, tmp_path: Path, monkeypatch):
    maker, keep = maker_of(text, tokenizer), Keep(tmp_path)
    first = passed(text, maker, keep)
    part_path(tmp_path, 1).unlink()
    data = part_path(tmp_path, 2).read_bytes()
    part_path(tmp_path, 2).write_bytes(data[: len(data) // 2])  # torn, which a rename rules out
    made, work = [], PartWork.__call__
    monkeypatch.setattr(
        PartWork, "__call__", lambda self, number, examples: made.append(number) or work(self, number, examples)
    )
    again = passed(text, maker, keep)
    assert made == [1, 2]
    same_rows(list(again.rows), list(first.rows))
    assert again.digest == first.digest
    passed(text, maker_of(text, tokenizer, seq_len=50), keep)
    assert len(made) > 5
    with pytest.raises(CacheError, match="not there any more"):
        list(first.rows)


def test_a_changed_text_has_another_digest_and_only_its_part_is_made(tokenizer, tmp_path: Path, monkeypatch):
    file = tmp_path / "t.jsonl"
    lines = [json.dumps({"text": f"{TEXT} {n}"}) + "\n" for n in range(30)]
    file.write_text("".join(lines))
    text = stream_text(str(file))
    maker, keep = maker_of(text, tokenizer), Keep(tmp_path / "tokens")
    first = passed(text, maker, keep)
    file.write_text("".join([*lines[:29], lines[29].replace("fog", "fig")]))
    made, work = [], PartWork.__call__
    monkeypatch.setattr(
        PartWork, "__call__", lambda self, number, examples: made.append(number) or work(self, number, examples)
    )
    second = passed(text, maker, keep)
    assert second.digest != first.digest
    assert second.digest == load_corpus(str(file)).digest
    assert made == [len(list((tmp_path / "tokens").iterdir())) - 1]


def test_what_is_too_long_is_counted_over_all_parts(tokenizer, tmp_path: Path):
    file = tmp_path / "t.jsonl"
    file.write_text("".join(json.dumps({"prompt": "p", "target": TEXT * (n % 2 * 3 + 1)}) + "\n" for n in range(20)))
    text = stream_text(str(file))
    with pytest.raises(DataError, match="longer than the limits") as caught:
        passed(text, maker_of(text, tokenizer, seq_len=80, overlong="error"), COUNTS)
    assert str(caught.value.details["found"]).startswith("10 of 20, first t.jsonl:1 (")


def test_a_token_that_the_model_lacks_is_named(tokenizer, tmp_path: Path):
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": f"{TEXT} {n}"}) + "\n" for n in range(9)))
    text = stream_text(str(tmp_path / "t.jsonl"))
    maker = maker_of(text, tokenizer)
    largest = max(int(r.input_ids.max()) for r in passed(text, maker, IN_MEMORY).rows)
    with pytest.raises(DataError, match="a token that the model does not have") as caught:
        final(tokenise(text, maker, largest, COUNTS))
    assert caught.value.details["where"] == "example t.jsonl:0#0"


def test_rows_that_become_columns_a_few_at_a_time_make_the_same_files(
    text: Text, tokenizer, tmp_path: Path, monkeypatch
):
    maker = maker_of(text, tokenizer)
    monkeypatch.setattr(token_pass, "PART_CHARACTERS", 2000)
    for name, rows, tokens in (("few", 1, 90), ("some", 3, 90), ("all", 10**6, 90)):
        monkeypatch.setattr(part_rows, "HELD_ROWS", rows)
        monkeypatch.setattr(part_rows, "BATCH_TOKENS", tokens)
        passed(text, maker, Keep(tmp_path / name))
    files = sorted(path.name for path in (tmp_path / "all").iterdir())
    assert len(files) > 1
    for file in files:
        one, other, whole = ((tmp_path / name / file).read_bytes() for name in ("few", "some", "all"))
        assert one == other == whole


def test_a_long_part_is_written_and_read_in_batches(text: Text, tokenizer, tmp_path: Path, monkeypatch):
    maker = maker_of(text, tokenizer)
    whole = passed(text, maker, IN_MEMORY)
    monkeypatch.setattr(part_rows, "BATCH_TOKENS", 1)
    for kept in (
        passed(text, maker, Keep(tmp_path)),
        passed(text, maker, Keep(tmp_path)),
        passed(text, maker, IN_MEMORY),
    ):
        assert isinstance(kept.rows, StoredRows)
        assert [len(batch) for batch in kept.rows.batches()] == [1] * len(whole.rows)
        same_rows(list(kept.rows), list(whole.rows))
        same_rows(kept.rows[3:9], whole.rows[3:9])
        assert (kept.extremes, kept.most_targets, kept.longest) == (whole.extremes, whole.most_targets, whole.longest)
        assert (kept.digest, kept.targets, kept.text_bytes) == (whole.digest, whole.targets, whole.text_bytes)
        np.testing.assert_array_equal(kept.counts, whole.counts)
    counted = passed(text, maker, COUNTS).row_lengths()
    ours, theirs = (np.concatenate([np.stack(b) for b in t], axis=1) for t in (counted, whole.row_lengths()))
    np.testing.assert_array_equal(ours, theirs)
