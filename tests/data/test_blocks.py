"""Documents become blocks in which every token but the first is scored once; pairs stay whole."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.data.blocks import BlockConfig, TokenRows, document_blocks, tokenize_corpus
from kd.data.left_out import LeftOut
from kd.data.rows.example import Example
from kd.data.sources import Corpus
from kd.data.text_tokens import TextTokens
from kd.models.tokenizer import encode_with_ends, token_bytes

TEXT = "The keeper of the lighthouse counted the ships: seven on Monday, five on Tuesday, and on Wednesday fog."
EMOJI = "a😀b👩‍👩‍👧 日本語 naïve — “too much” 😀😀😀"

texts = st.text(alphabet=st.sampled_from("ab the.\n é€😀日\u200d"), min_size=2, max_size=80).filter(lambda t: t.strip())


def documents(*found: str) -> Corpus:
    return Corpus("x", "train", "documents", tuple(Example(f"d{i}", t) for i, t in enumerate(found)), {})


def pairs(*found: tuple[str, str]) -> Corpus:
    return Corpus("x", "train", "pairs", tuple(Example(f"p{i}", t, prompt=p) for i, (p, t) in enumerate(found)), {})


def rows_of(corpus: Corpus, tokenizer, **config) -> list[TokenRows]:
    return list(tokenize_corpus(corpus, tokenizer, BlockConfig(**config)))


def without_bos(tokenizer):
    """The same vocabulary, with no BOS and no EOS token."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)


def check_spans(row: TokenRows) -> None:
    """`byte_end` is non-decreasing, ends with the target text, and lies inside it."""
    assert len(row.byte_end) == len(row.target_ids) >= 1
    assert len(row.context_ids) >= 1
    assert (np.diff(row.byte_end) >= 0).all()
    assert row.byte_end[0] >= 0
    assert row.byte_end[-1] == len(row.example.target.encode())


@settings(max_examples=60, deadline=None)
@given(text=texts, seq_len=st.integers(9, 24), stride=st.integers(1, 23), bos=st.booleans(), eos=st.booleans())
def test_every_token_but_the_first_is_scored_exactly_once(tokenizer, text, seq_len, stride, bos, eos):
    stride = min(stride, seq_len - 1)
    pieces, words = token_bytes(tokenizer), TextTokens(tokenizer)
    ids, _ = encode_with_ends(tokenizer, pieces, text)
    whole = [*([tokenizer.bos_token_id] if bos else []), *ids, *([tokenizer.eos_token_id] if eos else [])]
    config = BlockConfig(seq_len=seq_len, stride=stride, bos=bos, eos=eos)
    # a character here has at most 4 tokens, so one always fits beside a token of context
    blocks = list(document_blocks(Example("d", text), words, config))
    if not blocks:
        assert not bos
        assert not any(_is_text(pieces, whole[:n]) for n in range(1, len(whole)))
        return
    scored = [t for b in blocks for t in b.target_ids]
    skipped = len(whole) - len(scored)
    assert scored == whole[skipped:]
    # with BOS nothing real is skipped; without, only the document's first character (one token or its pieces)
    assert skipped == 1 if bos else _is_text(pieces, whole[:skipped]) and not _is_text(pieces, whole[: skipped - 1])
    position = skipped
    for block in blocks:
        assert len(block.input_ids) <= seq_len
        if len(block.context_ids) < min(position, seq_len - stride):
            # more tokens than the stride without a character boundary between them took the place of some context
            assert len(block.target_ids) > stride
            assert not any(_is_text(pieces, block.target_ids[:n]) for n in range(1, len(block.target_ids)))
        assert list(block.input_ids) == whole[position - len(block.context_ids) : position + len(block.target_ids)]
        position += len(block.target_ids)
        check_spans(block)
    assert [b.example.id for b in blocks] == [f"d#{i}" for i in range(len(blocks))]


def _is_text(pieces: list[bytes], ids) -> bool:
    """Do these tokens end on a character boundary? (False for none.)"""
    try:
        return bool(len(ids)) and b"".join(pieces[i] for i in ids).decode() is not None
    except UnicodeDecodeError:
        return False


@settings(max_examples=40, deadline=None)
@given(text=texts, seq_len=st.integers(9, 20), stride=st.integers(1, 19))
def test_targets_one_after_another_are_the_document(tokenizer, text, seq_len, stride):
    config = BlockConfig(seq_len=seq_len, stride=min(stride, seq_len - 1))
    blocks = list(document_blocks(Example("d", text), TextTokens(tokenizer), config))
    assert "".join(b.example.target for b in blocks) == text


@pytest.mark.parametrize("seq_len", [9, 10, 11, 13])
def test_each_token_is_a_slice_of_its_blocks_text(tokenizer, seq_len: int):
    pieces = token_bytes(tokenizer)
    blocks = rows_of(documents(EMOJI), tokenizer, seq_len=seq_len)
    assert len(blocks) > 3
    for block in blocks:
        data = block.example.target.encode()
        ends = [0, *block.byte_end]
        spelled = [data[a:b] for a, b in pairwise(ends)]
        assert spelled == [pieces[i] for i in block.target_ids]


def test_blocks_end_on_character_boundaries_even_inside_emoji(tokenizer):
    # 😀 is four one-byte tokens for this vocabulary unless merged; no cut at 4 bytes, so 5 + context fit
    blocks = rows_of(documents("😀" * 9), tokenizer, seq_len=6)
    assert all(set(b.example.target) == {"😀"} for b in blocks)
    assert sum(len(b.example.target) for b in blocks) == 9


def test_a_character_longer_than_a_block_names_the_example(tokenizer):
    ids, _ = encode_with_ends(tokenizer, token_bytes(tokenizer), "𒀀")
    assert len(ids) == 4  # no merge of these bytes was learned
    with pytest.raises(DataError, match="does not fit into a block") as caught:
        rows_of(documents("fine", "𒀀𒀀"), tokenizer, seq_len=3)
    assert "d1" in str(caught.value)


def test_the_prompt_of_a_block_is_the_text_of_its_context(tokenizer):
    blocks = rows_of(documents(TEXT), tokenizer, seq_len=16, stride=5)
    pieces = token_bytes(tokenizer)
    for number, block in enumerate(blocks):
        context = block.context_ids[1:] if block.context_ids[0] == tokenizer.bos_token_id else block.context_ids
        assert block.example.prompt == b"".join(pieces[i] for i in context).decode(), number
    assert any(len(b.context_ids) == 11 for b in blocks)


def test_bos_opens_each_document_and_eos_ends_it(tokenizer):
    blocks = rows_of(documents("one two", "three"), tokenizer, seq_len=64, eos=True)
    for block in blocks:
        assert list(block.context_ids) == [tokenizer.bos_token_id]
        assert block.target_ids[-1] == tokenizer.eos_token_id
        assert block.byte_end[-1] == block.byte_end[-2] == len(block.example.target.encode())


def test_without_bos_the_first_token_is_context(tokenizer):
    ids, _ = encode_with_ends(tokenizer, token_bytes(tokenizer), TEXT)
    (block,) = rows_of(documents(TEXT), tokenizer, seq_len=200, bos=False)
    assert list(block.context_ids) == [ids[0]]
    assert list(block.target_ids) == list(ids[1:])
    (bare,) = rows_of(documents(TEXT), without_bos(tokenizer), seq_len=200, bos=True, eos=True)
    assert list(bare.input_ids) == list(ids)  # a tokenizer with neither token gets neither


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


def test_blocks_never_cross_documents(tokenizer):
    together = rows_of(documents(TEXT, EMOJI), tokenizer, seq_len=12)
    apart = [*rows_of(documents(TEXT), tokenizer, seq_len=12), *rows_of(documents(EMOJI), tokenizer, seq_len=12)]
    assert [list(r.input_ids) for r in together] == [list(r.input_ids) for r in apart]


def test_the_default_stride_reads_each_token_once_but_for_one_token_of_context(tokenizer):
    blocks = rows_of(documents(TEXT), tokenizer, seq_len=8)
    assert {len(b.context_ids) for b in blocks} == {1}
    assert (
        rows_of(documents(TEXT), tokenizer, seq_len=8, stride=7)[1].input_ids.tolist() == blocks[1].input_ids.tolist()
    )


@pytest.mark.parametrize("settings_", [{"seq_len": 1}, {"seq_len": 8, "stride": 8}, {"seq_len": 8, "stride": 0}])
def test_impossible_lengths_are_refused(settings_: dict):
    with pytest.raises(DataError):
        BlockConfig(**settings_)


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
    (row,) = rows_of(pairs(("Q", "A")), tokenizer, separator=" => ")
    assert b"".join(token_bytes(tokenizer)[i] for i in row.context_ids[1:]) == b"Q => "


def test_an_empty_prompt_is_bos_alone_and_an_error_without_bos(tokenizer):
    (row,) = rows_of(pairs(("", "A")), tokenizer)
    assert list(row.context_ids) == [tokenizer.bos_token_id]
    with pytest.raises(DataError, match="no context") as caught:
        rows_of(pairs(("Q", "A"), ("", "A")), tokenizer, bos=False)
    assert "example p1" in str(caught.value)


def test_a_pair_that_does_not_fit_names_itself_and_its_lengths(tokenizer):
    pieces = token_bytes(tokenizer)
    tokens = [len(encode_with_ends(tokenizer, pieces, text)[0]) + 1 for text in (TEXT + "\n", TEXT)]
    assert len(rows_of(pairs((TEXT, TEXT)), tokenizer, seq_len=sum(tokens))) == 1
    with pytest.raises(DataError, match="longer than the limits") as caught:
        rows_of(pairs(("Q", "A"), (TEXT, TEXT)), tokenizer, seq_len=sum(tokens) - 1)
    assert f"1 of 2, first p1 ({tokens[0]} context and {tokens[1]} target tokens)" in str(caught.value)
    assert "--overlong" in str(caught.value)


def long_pairs() -> Corpus:
    return pairs(("Q", "A"), (TEXT * 3, "short"), ("Q", TEXT), (TEXT * 3, TEXT))


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


def test_an_encoder_reads_the_prompt_alone_and_its_end(tokenizer):
    (row,) = rows_of(pairs(("Q x", "A")), tokenizer, encoder=True, separator="|")
    pieces = token_bytes(tokenizer)
    prompt, _ = encode_with_ends(tokenizer, pieces, "Q x")
    assert list(row.context_ids) == [*prompt, tokenizer.eos_token_id]
    assert row.target_ids[-1] == tokenizer.eos_token_id
    with pytest.raises(DataError, match="needs a prompt"):
        rows_of(documents("text"), tokenizer, encoder=True)


def test_both_sides_of_an_encoder_decoder_have_limits_of_their_own(tokenizer):
    config = BlockConfig(seq_len=6, target_len=4, encoder=True, overlong="truncate")
    rows = list(tokenize_corpus(pairs((TEXT, TEXT)), tokenizer, config))
    assert [(len(r.context_ids), len(r.target_ids)) for r in rows] == [(6, 4)]
    assert rows[0].context_ids[-1] == tokenizer.eos_token_id
    with pytest.raises(DataError, match="6 for the prompt, 4 for the target"):
        rows_of(pairs((TEXT, "A")), tokenizer, seq_len=6, target_len=4, encoder=True)
    assert len(rows_of(pairs(("Q", TEXT)), tokenizer, seq_len=6, encoder=True)) == 1  # no limit on the target


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/smollm2", "weights/stories260K"])
def test_real_tokenizers_give_back_the_document(shared, name: str):
    from kd.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared / name))
    for seq_len in (10, 16, 17):
        blocks = rows_of(documents(EMOJI + TEXT), tokenizer, seq_len=seq_len)
        assert "".join(b.example.target for b in blocks) == EMOJI + TEXT
        for block in blocks:
            check_spans(block)
