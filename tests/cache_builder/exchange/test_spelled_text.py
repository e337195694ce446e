"""The text of ids is the text that they were made of, and its parts end where the tokens do."""

from __future__ import annotations

import numpy as np

from kd.cache_builder.exchange.spelled_text import Speller
from kd.models.tokenizer import encode_with_ends, load_tokenizer, token_bytes

TEXT = "The fox 🦊 went down to the river.\nÉté.  Two spaces"


def test_the_spelled_text_and_its_ends_are_those_of_the_tokenizer(tokenizer, t5_dir) -> None:
    for each in (tokenizer, load_tokenizer(str(t5_dir))):
        text = TEXT if each is tokenizer else "The fox went down to the river."
        ids, ends = encode_with_ends(each, token_bytes(each), text)
        for context in (1, 3):
            found = Speller(each).text(ids.astype(np.int64), context)
            assert found.prompt + found.target == text
            np.testing.assert_array_equal(found.byte_end, ends[context:] - ends[context - 1])


def test_bos_and_eos_stand_for_no_text(tokenizer) -> None:
    ids = np.array([tokenizer.bos_token_id, *tokenizer("The fox")["input_ids"], tokenizer.eos_token_id])
    found = Speller(tokenizer).text(ids, 1)
    assert (found.prompt, found.target) == ("", "The fox")
    assert found.byte_end[-1] == found.byte_end[-2] == 7


def test_half_a_character_is_left_out_and_counted(tokenizer) -> None:
    pieces = token_bytes(tokenizer)
    ids = np.array([pieces.index(bytes([byte])) for byte in "a🦊b🦊".encode()])
    speller = Speller(tokenizer)
    found = speller.text(ids[:-1], 2)  # begins and ends inside a fox
    assert (found.prompt, found.target) == ("a", "b")
    assert speller.bytes_left_out == 6
    assert found.byte_end.tolist() == [0, 0, 0, 1, 1, 1, 1]
