"""Documents become blocks in which every token but the first is scored once."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from slow_rows import same_rows
from token_corpora import EMOJI, TEXT, check_spans, documents, rows_of

from kd.common.errors import DataError
from kd.data.rows.example import Example
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.document_blocks import document_blocks, whole_document
from kd.data.tokenizing.text_tokens import TextTokens
from kd.data.tokenizing.token_notes import TokenNotes
from kd.models import tokenizer as module
from kd.models.tokenizer import encode_with_ends, load_tokenizer, token_bytes

texts = st.text(alphabet=st.sampled_from("ab the.\n é€😀日\u200d"), min_size=2, max_size=80).filter(lambda t: t.strip())


@settings(max_examples=60)
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


@settings(max_examples=40)
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


def without_bos(tokenizer):
    """The same vocabulary, with no BOS and no EOS token."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)


def test_without_bos_the_first_token_is_context(tokenizer):
    ids, _ = encode_with_ends(tokenizer, token_bytes(tokenizer), TEXT)
    (block,) = rows_of(documents(TEXT), tokenizer, seq_len=200, bos=False)
    assert list(block.context_ids) == [ids[0]]
    assert list(block.target_ids) == list(ids[1:])
    (bare,) = rows_of(documents(TEXT), without_bos(tokenizer), seq_len=200, bos=True, eos=True)
    assert list(bare.input_ids) == list(ids)  # a tokenizer with neither token gets neither


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


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/smollm2", "weights/stories260K"])
def test_real_tokenizers_give_back_the_document(shared, name: str):
    from kd.models.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(shared / name))
    for seq_len in (10, 16, 17):
        blocks = rows_of(documents(EMOJI + TEXT), tokenizer, seq_len=seq_len)
        assert "".join(b.example.target for b in blocks) == EMOJI + TEXT
        for block in blocks:
            check_spans(block)


@settings(max_examples=25)
@given(
    words=st.lists(
        st.sampled_from(["the", "seven", "ships,", "é€", "😀😀", "日本", "rained.\n"]), min_size=60, max_size=120
    ),
    seq_len=st.integers(9, 24),
    stride=st.integers(1, 23),
    frame=st.booleans(),
)
def test_a_document_read_in_windows_has_the_blocks_of_one_read_at_once(tokenizer, words, seq_len, stride, frame):
    text, read = " ".join(words), TextTokens(tokenizer)
    config = BlockConfig(seq_len=seq_len, stride=min(stride, seq_len - 1), bos=frame, eos=frame)
    whole = list(document_blocks(Example("d", text), read, config))
    with pytest.MonkeyPatch.context() as patch:  # windows that are far smaller than the document
        patch.setattr(module, "WINDOW", 160)
        patch.setattr(module, "OVERLAP", 110)
        patch.setattr(module, "LONG", 8)
        same_rows(list(document_blocks(Example("d", text), read, config)), whole)


SHORT = st.text(alphabet=st.sampled_from("ab the.\n é€😀日\u200d"), min_size=1, max_size=20).filter(lambda t: t.strip())


@settings(max_examples=200)
@given(
    parts=st.lists(st.one_of(SHORT, st.just("<|endoftext|>"), st.just("</s>")), min_size=1, max_size=3),
    seq_len=st.integers(5, 40),
    stride=st.one_of(st.none(), st.integers(1, 39)),
    bos=st.booleans(),
    eos=st.booleans(),
)
@pytest.mark.parametrize("name", ["tokenizer", "unigram"])
def test_a_whole_document_is_its_one_block(tokenizer, t5_dir, name, parts, seq_len, stride, bos, eos):
    used = tokenizer if name == "tokenizer" else _unigram(str(t5_dir))
    example = Example("d", "".join(parts), task="a task", split="a split")
    config = BlockConfig(seq_len=seq_len, stride=stride and min(stride, seq_len - 1), bos=bos, eos=eos)
    words, notes = TextTokens(used), TokenNotes()
    words.encode_ahead([example.target])
    whole = whole_document(example, words, config)
    try:
        blocks = list(document_blocks(example, TextTokens(used), config, notes))
    except DataError:  # a character does not fit
        assert whole is None
        return
    if whole is not None:
        assert not notes.counts
        same_rows([whole], blocks)
    elif example.target.isascii() and len(blocks) == 1 and name == "tokenizer":
        assert notes.counts  # nothing else is left to the slow way here


@cache
def _unigram(folder: str):
    return load_tokenizer(folder)


def test_a_text_that_was_not_tokenised_ahead_is_no_whole_document(tokenizer):
    assert whole_document(Example("d", "a"), TextTokens(tokenizer), BlockConfig(seq_len=9)) is None
