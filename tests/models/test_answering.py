"""Answers to a batch of prompts: padding that changes nothing, and the cut at the end-of-text token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kd.models.answering import answer_batch, answer_text, padded_prompts, until_eos, unused_ids
from kd.models.loading import load_model
from kd.models.model_request import ModelRequest
from kd.models.tokenizer import load_tokenizer

PROMPTS = [np.array(ids, dtype=np.int32) for ids in ([5, 6, 7, 8], [9], [10, 11])]


def test_prompts_end_at_the_edge_where_the_model_continues() -> None:
    ids, mask = padded_prompts(PROMPTS[:2], 3, left=True)
    assert ids.tolist() == [[5, 6, 7, 8], [3, 3, 3, 9]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 0, 1]]
    ids, mask = padded_prompts(PROMPTS[:2], 3, left=False)
    assert (ids.tolist()[1], mask.tolist()[1]) == ([9, 3, 3, 3], [1, 0, 0, 0])


def test_an_answer_ends_before_the_first_end_of_text_token() -> None:
    row = np.array([5, 6, 0, 7, 0])
    assert (until_eos(row, 0).ids.tolist(), until_eos(row, 0).ended) == ([5, 6], True)
    assert until_eos(row, 5).ids.tolist() == []
    assert (until_eos(row, 9).ids.tolist(), until_eos(row, 9).ended) == ([5, 6, 0, 7, 0], False)
    assert (until_eos(row, None).ids.tolist(), until_eos(row, None).ended) == ([5, 6, 0, 7, 0], False)


@pytest.mark.parametrize("fixture", ["model_dir", "t5_dir"])
def test_neither_padding_nor_neighbours_change_an_answer(fixture: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(fixture)
    model = load_model(ModelRequest(str(folder), device="cpu"))
    options: dict[str, Any] = {"eos_id": None, "max_new_tokens": 5, "do_sample": False}
    together = answer_batch(model, PROMPTS, pad_id=0, **options)
    for prompt, answer in zip(PROMPTS, together, strict=True):
        (alone,) = answer_batch(model, [prompt], pad_id=1, **options)
        assert alone.ids.tolist() == answer.ids.tolist()
        assert len(alone.ids) == 5
    width = int(model.get_output_embeddings().weight.shape[0])
    assert unused_ids(model, width) is None
    assert unused_ids(model, width - 2) == [width - 2, width - 1]


@pytest.mark.parametrize("name", ["weights/stories260K", "tokenizers/gpt2", "tokenizers/t5"])
@pytest.mark.parametrize(("prompt", "answer"), [("Why?", " Because."), ("Why?\n", "Because."), ("It is un", "done.")])
def test_an_answer_is_the_text_that_follows_its_prompt(shared: Path, name: str, prompt: str, answer: str) -> None:
    tokenizer = load_tokenizer(str(shared / name))
    if "t5" in name and "\n" in prompt:
        pytest.skip("its normaliser makes a space of a line break")
    ids = np.array(tokenizer(prompt + answer, add_special_tokens=False)["input_ids"])
    first = next(n for n in range(len(ids), -1, -1) if prompt.startswith(tokenizer.decode(ids[:n]) if n else ""))
    rest = (prompt + answer)[len(tokenizer.decode(ids[:first])) :]
    assert answer_text(tokenizer, ids[first:], ids[:first]) == rest
    assert answer_text(tokenizer, ids[first:], None) == tokenizer.decode(ids[first:])


def test_white_space_of_the_prompt_is_taken_off_an_answer(shared: Path) -> None:
    tokenizer = load_tokenizer(str(shared / "tokenizers/gpt2"))
    context, ids = (np.array(tokenizer(text)["input_ids"]) for text in ("Why?", " Because"))
    assert answer_text(tokenizer, ids, context, " ") == "Because"
    assert answer_text(tokenizer, ids, context) == " Because"
    assert answer_text(tokenizer, context, context, " ") == "Why?"  # it wrote no space
    assert answer_text(tokenizer, ids, context, "\n") == "Because"
