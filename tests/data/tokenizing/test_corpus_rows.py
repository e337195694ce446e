"""A corpus as token rows: what is too short or too long is counted, cut or refused."""

from __future__ import annotations

import numpy as np
import pytest
from token_corpora import TEXT, documents, pairs, rows_of

from kd.common.errors import DataError
from kd.data.corpus import Corpus
from kd.data.left_out import LeftOut
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.corpus_rows import tokenize_corpus
from kd.models.tokenizer import encode_with_ends, token_bytes


def test_a_document_of_one_token_is_left_out_and_counted(tokenizer):
    left_out = LeftOut()
    corpus = documents("a", TEXT, "b")
    rows = list(tokenize_corpus(corpus, tokenizer, BlockConfig(bos=False), left_out))
    assert {row.example.id.partition("#")[0] for row in rows} == {"d1"}
    assert left_out.document() == {"too_short": {"count": 2, "first": "d0"}}
    assert len(rows_of(corpus, tokenizer, bos=True)) == len(rows) + 2


def test_a_text_of_documents_of_one_token_is_refused(tokenizer):
    with pytest.raises(DataError, match="no document has a token to score"):
        rows_of(documents("a", "b"), tokenizer, bos=False)


def long_pairs() -> Corpus:
    return pairs(("Q", "A"), (TEXT * 3, "short"), ("Q", TEXT), (TEXT * 3, TEXT))


def test_a_pair_that_does_not_fit_names_itself_and_its_lengths(tokenizer):
    pieces = token_bytes(tokenizer)
    tokens = [len(encode_with_ends(tokenizer, pieces, text)[0]) + 1 for text in (TEXT + "\n", TEXT)]
    assert len(rows_of(pairs((TEXT, TEXT)), tokenizer, seq_len=sum(tokens))) == 1
    with pytest.raises(DataError, match="longer than the limits") as caught:
        rows_of(pairs(("Q", "A"), (TEXT, TEXT)), tokenizer, seq_len=sum(tokens) - 1)
    assert f"1 of 2, first p1 ({tokens[0]} context and {tokens[1]} target tokens)" in str(caught.value)
    assert "--overlong" in str(caught.value)


def test_pairs_that_are_too_long_are_dropped_and_counted(tokenizer):
    left_out = LeftOut()
    config = BlockConfig(seq_len=40, overlong="drop")
    rows = list(tokenize_corpus(long_pairs(), tokenizer, config, left_out))
    assert [r.example.id for r in rows] == ["p0"]
    assert left_out.document() == {"too_long": {"count": 3, "first": "p1"}}


@pytest.mark.parametrize("seq_len", [2, 7, 40])
@pytest.mark.parametrize("target_len", [None, 1, 5])
def test_truncated_pairs_fit_and_keep_the_beginning_of_the_target_and_the_end_of_the_prompt(
    tokenizer, seq_len: int, target_len: int | None
):
    left_out = LeftOut()
    config = BlockConfig(seq_len=seq_len, target_len=target_len, overlong="truncate")
    rows = {r.example.id: r for r in tokenize_corpus(long_pairs(), tokenizer, config, left_out)}
    whole = {r.example.id: r for r in tokenize_corpus(long_pairs(), tokenizer, BlockConfig(10_000))}
    assert left_out.count("shortened") + left_out.count("too_long") >= 3
    for name, row in rows.items():
        assert len(row.context_ids) + len(row.target_ids) <= seq_len
        assert len(row.context_ids) >= 1
        assert len(row.target_ids) <= (target_len or seq_len)
        full = whole[name]
        assert full.example.target.startswith(row.example.target)
        np.testing.assert_array_equal(row.target_ids, full.target_ids[: len(row.target_ids)])
        if len(row.target_ids) < len(full.target_ids) and row.byte_end[-1] < len(full.example.target.encode()):
            assert row.target_ids[-1] != tokenizer.eos_token_id  # the text goes on
        assert row.byte_end[-1] == len(row.example.target.encode())
        tail = len(row.context_ids) - 1
        assert row.context_ids[0] == tokenizer.bos_token_id or tail == 0
        np.testing.assert_array_equal(row.context_ids[1:], full.context_ids[len(full.context_ids) - tail :])


def test_both_sides_of_an_encoder_decoder_have_limits_of_their_own(tokenizer):
    config = BlockConfig(seq_len=6, target_len=4, encoder=True, overlong="truncate")
    rows = list(tokenize_corpus(pairs((TEXT, TEXT)), tokenizer, config))
    assert [(len(r.context_ids), len(r.target_ids)) for r in rows] == [(6, 4)]
    assert rows[0].context_ids[-1] == tokenizer.eos_token_id
    with pytest.raises(DataError, match="6 for the prompt, 4 for the target"):
        rows_of(pairs((TEXT, "A")), tokenizer, seq_len=6, target_len=4, encoder=True)
    assert len(rows_of(pairs(("Q", TEXT)), tokenizer, seq_len=6, encoder=True)) == 1  # no limit on the target
