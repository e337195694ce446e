"""Prompts of chat models: the tokens that stand before a scored turn, and the tokens that end an answer."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import CHATML, LAYOUTS, LLAMA3, PHI, Layout

from kd.models.chat.chat_prompt import chat_prompt, ending_ids
from kd.models.chat.chat_template import ChatTemplate
from kd.models.chat.reasoning import Reasoned, split_reasoning
from kd.models.chat.scored_turns import render_conversation
from kd.models.tokenizer import load_tokenizer, token_bytes

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two plus <|im_end|> two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And three?"},
    {"role": "assistant", "content": "the sum is five."},
]


@lru_cache
def loaded(name: str, shared: Path) -> Any:
    return load_tokenizer(str(shared / "tokenizers" / name))


def template_of(layout: Layout, shared: Path, name: str = "smollm2", **kwargs: Any) -> tuple[ChatTemplate, list[bytes]]:
    tokenizer = copy.deepcopy(loaded(name, shared))
    named = {"bos_token": layout.bos, "eos_token": layout.eos}
    tokenizer.add_special_tokens({"additional_special_tokens": list(layout.control)})
    tokenizer.add_special_tokens({name: token for name, token in named.items() if token is not None})
    tokenizer.chat_template = layout.source
    return ChatTemplate.of(tokenizer, kwargs=kwargs), token_bytes(tokenizer)


@pytest.mark.parametrize("tokenizer", ["smollm2", "gpt-neox-20b"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_prompt_has_the_ids_that_stand_before_the_scored_turn(name: str, tokenizer: str, shared: Path) -> None:
    template, pieces = template_of(LAYOUTS[name], shared, tokenizer)
    for stop in (3, 5):
        talk = TALK[:stop]
        rendering = render_conversation(template, pieces, talk, score="last")[-1]
        prompt = chat_prompt(template, pieces, talk[:-1])
        first = rendering.turns[-1].first
        assert np.array_equal(prompt.ids, rendering.ids[: len(prompt.ids)])
        if name != "mistral":  # whose answers begin with a space that the generation prompt lacks
            assert len(prompt.ids) == first


def test_white_space_that_an_answer_takes_is_no_part_of_the_prompt(shared: Path) -> None:
    template, pieces = template_of(CHATML, shared, "gpt-neox-20b")
    spaced = ChatTemplate(template.tokenizer, "{% for m in messages %}{{ m.content }}{% endfor %}Answer: ", {})
    prompt = chat_prompt(spaced, pieces, [{"role": "user", "content": "Two plus two? "}])
    assert prompt.lead == " "
    assert template.tokenizer.decode(prompt.ids) == "Two plus two? Answer:"


def test_an_answer_ends_where_the_template_closes_it_or_the_text_ends(shared: Path) -> None:
    for layout, closing in ((CHATML, ["<|im_end|>"]), (LLAMA3, ["<|eot_id|>", "<|end_of_text|>"])):
        template, pieces = template_of(layout, shared)
        assert template.tokenizer.convert_ids_to_tokens(ending_ids(template, pieces)) == closing
    template, pieces = template_of(PHI, shared)
    assert template.tokenizer.convert_ids_to_tokens(ending_ids(template, pieces)) == ["<|end|>", "<|endoftext|>"]


@pytest.mark.parametrize(
    ("text", "prompt", "parts"),
    [
        ("Four.", "", Reasoned(None, "Four.")),
        ("<think>\nTwo and two.\n</think>\n\nFour.", "", Reasoned("Two and two.", "Four.")),
        ("Two and two.\n</think>\n\nFour.", "assistant\n<think>\n", Reasoned("Two and two.", "Four.")),
        ("<think>\n\n</think>\n\nFour.", "", Reasoned(None, "Four.")),
        ("<think>\nTwo and", "", Reasoned("Two and", None)),
        ("Two and", "<think>\n", Reasoned("Two and", None)),
        ("I <think> so.", "", Reasoned(None, "I <think> so.")),
        ("<think>a</think>b</think>c", "", Reasoned("a", "b</think>c")),
    ],
)
def test_reasoning_and_answer_are_told_apart(text: str, prompt: str, parts: Reasoned) -> None:
    assert split_reasoning(text, prompt) == parts
