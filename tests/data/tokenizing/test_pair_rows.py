"""Pairs stay whole: prompt, separator, target and end token."""

from __future__ import annotations

import pytest
from token_corpora import check_spans, documents, pairs, rows_of

from kd.common.errors import DataError
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.pair_rows import tokenize_pair, tokenize_prompt
from kd.data.tokenizing.text_tokens import TextTokens
from kd.data.tokenizing.token_notes import TokenNotes
from kd.models.tokenizer import encode_with_ends, token_bytes


def test_a_pair_is_prompt_then_target_then_eos(tokenizer):
    pieces = token_bytes(tokenizer)
    (row,) = rows_of(pairs(("How many ships?", "seven ships")), tokenizer)
    prompt, _ = encode_with_ends(tokenizer, pieces, "How many ships?\n")
    target, ends = encode_with_ends(tokenizer, pieces, "seven ships")
    assert list(row.context_ids) == [tokenizer.bos_token_id, *prompt]
    assert list(row.target_ids) == [*target, tokenizer.eos_token_id]
    assert list(row.byte_end) == [*ends, len("seven ships")]
    check_spans(row)


def test_the_separator_belongs_to_the_prompt(tokenizer):
    (row,) = rows_of(pairs(("Q", "A")), tokenizer, separator=" =>\n")
    assert b"".join(token_bytes(tokenizer)[i] for i in row.context_ids[1:]) == b"Q =>\n"


@pytest.mark.parametrize("separator", ["\n", " ", " => ", "\n\n", ":  "])
def test_a_prompt_that_is_to_be_answered_is_the_context_of_every_answer(tokenizer, separator: str):
    """Else a model never learns to write what stands between them, and is told which answers need it."""
    text, config = TextTokens(tokenizer), BlockConfig(separator=separator)
    notes = TokenNotes()
    asked, _ = tokenize_prompt(Example("p", "", prompt="What is it?"), text, config)
    for target in ("the", "A", "7", "fox", "(a)", "Zebra", "x = 3"):
        row = tokenize_pair(Example("p", target, prompt="What is it?"), text, config, notes)
        whole = text.tokenizer("What is it?" + separator + target, add_special_tokens=False)["input_ids"]
        assert row.input_ids.tolist() == [text.bos, *whole, text.eos]
        if separator != ":  ":  # two spaces are one token or two
            assert row.context_ids.tolist() == asked.tolist()
    assert (notes.rules == 3) == bool(notes.counts["space_scored"])
    assert bool(notes.counts["space_scored"]) == separator.endswith(" ")


def test_an_empty_prompt_is_bos_alone_and_an_error_without_bos(tokenizer):
    (row,) = rows_of(pairs(("", "A")), tokenizer)
    assert list(row.context_ids) == [tokenizer.bos_token_id]
    with pytest.raises(DataError, match="no context") as caught:
        rows_of(pairs(("Q", "A"), ("", "A")), tokenizer, bos=False)
    assert "example p1" in str(caught.value)


def test_an_encoder_reads_the_prompt_alone_and_its_end(tokenizer):
    (row,) = rows_of(pairs(("Q x", "A")), tokenizer, encoder=True, separator="|")
    pieces = token_bytes(tokenizer)
    prompt, _ = encode_with_ends(tokenizer, pieces, "Q x")
    assert list(row.context_ids) == [*prompt, tokenizer.eos_token_id]
    assert row.target_ids[-1] == tokenizer.eos_token_id
    with pytest.raises(DataError, match="needs a prompt"):
        rows_of(documents("text"), tokenizer, encoder=True)
