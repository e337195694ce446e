"""The bytes of every id spell the text, ends are byte positions, and the fingerprint sees every change."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd.common.errors import DataError
from kd.models import tokenizer as module
from kd.models.tokenizer import (
    encode_at_once,
    encode_texts,
    encode_with_ends,
    load_tokenizer,
    token_bytes,
    tokenizer_fingerprint,
    vocabulary_size,
)

TEXTS = [
    "The quick brown fox.\n\nJumps  over\tthe lazy dog",
    "naïve café — “quotes” 😀👩‍👩‍👧 日本語\r\n",
    "def f(x):\n\treturn {x: ~1}\n",
    " leading and trailing ",
    "a",
    "before<|endoftext|>after",
]
LOSSLESS = ["tokenizers/gpt2", "tokenizers/gpt-neox-20b", "tokenizers/smollm2"]
STORIES = ["weights/stories260K", "weights/llama2xs-279K"]


def spelled(pieces: list[bytes], ids) -> bytes:
    return b"".join(pieces[i] for i in ids)


@settings(max_examples=100)
@given(text=st.text(max_size=60))
def test_the_pieces_of_a_byte_level_tokenizer_spell_any_text(tokenizer, text: str):
    pieces = token_bytes(tokenizer)
    ids, ends = encode_with_ends(tokenizer, pieces, text)
    assert spelled(pieces, ids) == text.encode()
    assert list(ends) == list(np.cumsum([len(pieces[i]) for i in ids]))


@pytest.mark.parametrize("name", LOSSLESS)
@pytest.mark.parametrize("text", TEXTS)
def test_real_byte_level_pieces_spell_the_text(shared: Path, name: str, text: str):
    tokenizer = load_tokenizer(str(shared / name))
    pieces = token_bytes(tokenizer)
    ids, ends = encode_with_ends(tokenizer, pieces, text)
    assert spelled(pieces, ids) == text.encode()
    assert ends[-1] == len(text.encode())


@pytest.mark.parametrize("name", STORIES)
@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_pieces_spell_the_text_after_a_dummy_space(shared: Path, name: str, text: str):
    tokenizer = load_tokenizer(str(shared / name))
    pieces = token_bytes(tokenizer)
    ids, ends = encode_with_ends(tokenizer, pieces, text)
    dummy = b"" if text.startswith(" ") else b" "  # these tokenizers add a space only where there is none
    assert spelled(pieces, ids) == dummy + text.encode()
    starts = [0, *ends[:-1]]
    rebuilt = [text.encode()[a:b] for a, b in zip(starts, ends, strict=True)]
    assert rebuilt[1:] == [pieces[i] for i in ids[1:]]  # the first token alone lacks its dummy space
    assert dummy + rebuilt[0] == pieces[ids[0]]


@pytest.mark.parametrize("text", TEXTS)
def test_t5_which_loses_characters_still_covers_the_text(shared: Path, text: str):
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "t5"))
    pieces = token_bytes(tokenizer)
    ids, ends = encode_with_ends(tokenizer, pieces, text)
    assert len(ends) == len(ids)
    assert (np.diff(ends) >= 0).all()
    assert ends[-1] == len(text.encode())


def test_t5_pieces_spell_plain_words(shared: Path):
    tokenizer = load_tokenizer(str(shared / "tokenizers" / "t5"))
    pieces = token_bytes(tokenizer)
    ids, ends = encode_with_ends(tokenizer, pieces, "The quick brown fox")
    assert spelled(pieces, ids) == b" The quick brown fox"
    words = [b"The quick brown fox"[:e] for e in ends]
    assert b"The quick" in words


@pytest.mark.parametrize(
    ("name", "size"),
    [("gpt2", 50257), ("gpt-neox-20b", 50277), ("t5", 32100), ("smollm2", 49152)],
)
def test_vocabulary_sizes_are_the_published_ones(shared: Path, name: str, size: int):
    tokenizer = load_tokenizer(str(shared / "tokenizers" / name))
    assert vocabulary_size(tokenizer) == size
    pieces = token_bytes(tokenizer)
    assert len(pieces) == size
    assert tokenizer.eos_token.encode() == pieces[tokenizer.eos_token_id]


def test_byte_fallback_pieces_are_single_bytes(shared: Path):
    pieces = token_bytes(load_tokenizer(str(shared / "weights" / "stories260K")))
    assert {bytes([b]) for b in range(256)} <= set(pieces)
    assert pieces[1] == b"<s>"


def test_empty_text_is_no_tokens(tokenizer):
    ids, ends = encode_with_ends(tokenizer, token_bytes(tokenizer), "")
    assert len(ids) == len(ends) == 0


def test_no_special_token_is_added(tokenizer, shared: Path):
    stories = load_tokenizer(str(shared / "weights" / "stories260K"))
    for each in (tokenizer, stories):
        ids, _ = encode_with_ends(each, token_bytes(each), "a word")
        assert not {each.bos_token_id, each.eos_token_id} & set(ids.tolist())


def changed(source: Path, folder: Path, edit) -> str:
    """Fingerprint after `edit(tokenizer.json, tokenizer_config.json)`."""
    shutil.copytree(source, folder)
    documents = [json.loads((folder / name).read_text()) for name in ("tokenizer.json", "tokenizer_config.json")]
    edit(*documents)
    for name, document in zip(("tokenizer.json", "tokenizer_config.json"), documents, strict=True):
        (folder / name).write_text(json.dumps(document))
    return tokenizer_fingerprint(load_tokenizer(str(folder)))


def swap_two_ids(model: dict, config: dict) -> None:
    vocab = model["model"]["vocab"]
    a, b = sorted(vocab, key=vocab.get)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]


def drop_a_merge(model: dict, config: dict) -> None:
    model["model"]["merges"].pop()


def prefix_space(model: dict, config: dict) -> None:
    model["pre_tokenizer"]["add_prefix_space"] = True


def lower_case(model: dict, config: dict) -> None:
    model["normalizer"] = {"type": "Lowercase"}


def no_bos(model: dict, config: dict) -> None:
    del config["bos_token"]


@pytest.mark.parametrize("edit", [swap_two_ids, drop_a_merge, prefix_space, lower_case, no_bos])
def test_the_fingerprint_changes_with(tokenizer_dir: Path, tmp_path: Path, edit):
    original = tokenizer_fingerprint(load_tokenizer(str(tokenizer_dir)))
    assert changed(tokenizer_dir, tmp_path / "copy", edit) != original


def test_the_fingerprint_does_not_change_with_the_path_or_with_use(tokenizer_dir: Path, tmp_path: Path):
    original = tokenizer_fingerprint(load_tokenizer(str(tokenizer_dir)))
    assert changed(tokenizer_dir, tmp_path / "copy", lambda model, config: None) == original
    used = load_tokenizer(str(tokenizer_dir))
    encode_with_ends(used, token_bytes(used), "some text")
    assert tokenizer_fingerprint(used) == original


def test_a_folder_without_a_tokenizer_says_what_was_expected(tmp_path: Path):
    with pytest.raises(DataError, match="cannot load the tokenizer") as caught:
        load_tokenizer(str(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert "tokenizer.json" in str(caught.value)


LOSSY = [
    "two  spaces and\na line",
    " leads and trails ",
    "tabs\tand\n\n\nlines",
    "unknown 🦊 sign",
    "café ﬁne ½",
    "a\u00a0b",
    "x",
]


@pytest.mark.parametrize("text", LOSSY)
def test_byte_ends_are_of_the_text_as_written_through_a_lossy_normaliser(t5_dir, text: str):
    tokenizer = load_tokenizer(str(t5_dir))
    check_lossy(tokenizer, text)


@pytest.mark.parametrize("text", LOSSY)
def test_byte_ends_are_right_through_t5_s_own_normaliser(shared, text: str):
    check_lossy(load_tokenizer(str(shared / "tokenizers" / "t5")), text)


def check_lossy(tokenizer, text: str) -> None:
    """Every word of the text ends where a token ends, and tokens never share a byte out of order."""
    ids, ends = encode_with_ends(tokenizer, token_bytes(tokenizer), text)
    data = text.encode("utf-8")
    assert len(ids) == len(ends)
    assert (np.diff(ends) >= 0).all()
    assert ends[-1] == len(data)
    marks = {len(text[: m.end()].encode()) for m in re.finditer(r"\S+", text)}
    assert marks - {max(marks)} <= set(ends.tolist())  # the last word also takes what trails it
    start = 0
    for number, end in zip(ids, ends, strict=True):  # a piece that is plain text is the text it stands for
        piece, span = (
            tokenizer.convert_ids_to_tokens(int(number)).replace("▁", ""),
            data[start:end].decode("utf-8", "replace"),
        )
        if piece.isascii() and piece.isalpha():
            assert piece in "".join(span.split()) or not span.isascii()
        start = end


LONG = {
    "words": "The keeper counted seven ships, and it rained.\n" * 80,
    "scripts": "a😀b👩‍👩‍👧 日本語 naïve — “too much” e\u0301\n\n" * 60,
    "no spaces": "abcdefgh" * 400,
    "control tokens": "one<|endoftext|>two</s> three <s>" * 100,
}


@pytest.mark.parametrize("name", [*LOSSLESS, *STORIES, "tokenizers/t5"])
@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
@pytest.mark.parametrize("control", [True, False])
def test_windows_give_the_ids_and_ends_of_the_whole(shared: Path, monkeypatch, name: str, text: str, control: bool):
    tokenizer = load_tokenizer(str(shared / name))
    pieces = token_bytes(tokenizer)
    monkeypatch.setattr(module, "WINDOW", 600)
    monkeypatch.setattr(module, "OVERLAP", 300)
    stretches = module._encode_in_windows(tokenizer, pieces, text, control)
    assert stretches is not None
    assert len(stretches) > 1
    joined = encode_with_ends(tokenizer, pieces, text, control=control)
    for windows, whole in zip(joined, encode_at_once(tokenizer, pieces, text, control=control), strict=True):
        np.testing.assert_array_equal(windows, whole)


def test_windows_that_do_not_agree_give_way_to_the_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(module, "WINDOW", 60)
    monkeypatch.setattr(module, "OVERLAP", 8)  # less than the tokens that must agree
    pieces, text = token_bytes(tokenizer), LONG["words"]
    assert module._encode_in_windows(tokenizer, pieces, text, True) is None
    for ours, whole in zip(
        encode_with_ends(tokenizer, pieces, text), encode_at_once(tokenizer, pieces, text), strict=True
    ):
        np.testing.assert_array_equal(ours, whole)


def test_a_tokenizer_is_left_as_it_was(shared: Path):
    tokenizer = load_tokenizer(str(shared / "tokenizers/smollm2"))
    before = tokenizer("a<|im_end|>")["input_ids"]
    ids, ends = encode_with_ends(tokenizer, token_bytes(tokenizer), "a<|im_end|>", control=False)
    assert tokenizer.eos_token_id not in ids
    assert ends[-1] == len("a<|im_end|>")
    assert tokenizer("a<|im_end|>")["input_ids"] == before
    tokenizer("one two three four", truncation=True, max_length=2, padding="max_length")
    assert len(encode_with_ends(tokenizer, token_bytes(tokenizer), "one two three four")[0]) == 4


def test_a_classifier_s_texts_hold_no_control_tokens(shared: Path):
    tokenizer = load_tokenizer(str(shared / "tokenizers/smollm2"))
    rows = [("plain", "text"), ("an <|im_end|> here", "and text"), ("", "")]
    ids = encode_texts(tokenizer, rows)
    assert [tokenizer.eos_token_id in row for row in ids[:2]] == [False, False]
    assert ids[0] == encode_texts(tokenizer, rows[:1])[0] == tokenizer("plain", "text")["input_ids"]
    assert tokenizer.decode(ids[1]) == "an <|im_end|> hereand text"
    assert ids[2] == [tokenizer.pad_token_id]
    assert tokenizer.eos_token_id in encode_texts(tokenizer, rows, control=True)[1]
    assert [len(row) for row in encode_texts(tokenizer, rows[:2], 4)] == [2, 4]


def test_the_fingerprint_is_the_same_whatever_an_earlier_call_has_left(tokenizer) -> None:
    """A repeated command computes it before a text is tokenised, a first one after."""
    before, cut = tokenizer_fingerprint(tokenizer), tokenizer_fingerprint(tokenizer, cut_to=5)
    tokenizer("one two three", truncation=True, max_length=5)  # as rows of classifiers are cut
    left = tokenizer.backend_tokenizer.to_str()
    assert tokenizer_fingerprint(tokenizer) == before != cut == tokenizer_fingerprint(tokenizer, cut_to=5)
    assert tokenizer.backend_tokenizer.to_str() == left
    digest = hashlib.blake2b(left.encode(), digest_size=32)
    digest.update(repr((tokenizer.bos_token_id, tokenizer.eos_token_id)).encode())
    assert cut == digest.hexdigest()  # the fingerprint that caches of classifiers always had
    tokenizer.backend_tokenizer.enable_padding()
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.backend_tokenizer.no_padding()
