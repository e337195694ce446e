"""How `chat_peers.py` judges scored tokens, on a conversation whose tokens are written by hand."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from chat_templates import LAYOUTS

from kd.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(shared: Path) -> Any:
    layout = LAYOUTS["chatml"]
    tokenizer = copy.deepcopy(load_tokenizer(str(shared / "tokenizers" / "smollm2")))
    tokenizer.add_special_tokens({"eos_token": layout.eos})
    tokenizer.chat_template = layout.source
    return tokenizer


def test_tokens_are_counted_by_what_a_model_reads_before_them(load_benchmark, tokenizer) -> None:
    peers = load_benchmark("chat_peers")
    talk = peers.said("Two?", "2", "Three?", "3")
    ids = tokenizer.apply_chat_template(talk, tokenize=True, return_dict=True)["input_ids"]
    every = [(tuple(ids[:n]), ids[n]) for n in range(len(ids))]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ends = [n for n, token in enumerate(ids) if token == end]
    right = [every[n] for last in (ends[1], ends[3]) for n in (last - 1, last)]
    assert peers.end_token(tokenizer) == "<|im_end|>"
    assert peers.counted(tokenizer, talk, right) == peers.Counts(4, 0, 0, 2)
    assert peers.counted(tokenizer, talk, [every[ends[1] + 1]]) == peers.Counts(1, 0, 1, 0), (
        "the line break after a turn"
    )
    assert peers.counted(tokenizer, talk, [every[2]]) == peers.Counts(1, 1, 0, 0), "a token of the user"
    header = every[ends[2] + 3]
    assert peers.counted(tokenizer, talk, [header]) == peers.Counts(1, 1, 0, 0), (
        "a token of the header of the second turn"
    )


def test_what_a_build_scores_is_what_a_model_writes(load_benchmark, tokenizer, tmp_path: Path) -> None:
    peers = load_benchmark("chat_peers")
    talks = peers.talks_for(tokenizer)
    file = tmp_path / "chat.jsonl"
    file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks.values()))
    for (title, talk), scored in zip(talks.items(), peers.scored_here(tokenizer, file), strict=True):
        counts = peers.counted(tokenizer, talk, scored)
        joined = title == "white space"  # one line break is a token with the prompt's
        assert (counts.unseen, counts.beyond) == (int(joined), 0), title
        assert counts.ends == sum(turn["role"] == "assistant" for turn in talk)
