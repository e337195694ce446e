"""The commands of docs/how-to/chat.md, run in order: tiny random models of the same layouts, with real tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import CHATML, REASONING, Layout
from page_runner import DOCS, run_page, typed_commands
from page_world import SHAPE, save_lines
from transformers import AutoConfig, AutoModelForCausalLM

from kd.data.demo.mini_chat import mini_conversations
from kd.models.tokenizer import load_tokenizer

PAGE = DOCS / "how-to" / "chat.md"


def save_chat_model(folder: Path, tokenizer: Path, layout: Layout, kind: str, seed: int) -> None:
    """A random model of a layout, and a real tokenizer with the control tokens and the template of a family."""
    words = load_tokenizer(str(tokenizer))
    words.add_special_tokens({"additional_special_tokens": list(layout.control), "eos_token": layout.eos})
    words.chat_template = layout.source
    size = (len(words) + 63) // 64 * 64
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        shape = SHAPE | {"vocab_size": size, "tie_word_embeddings": True, "max_position_embeddings": 2048}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape)).save_pretrained(folder)
    words.save_pretrained(folder)


def save_models(folder: Path, shared: Path) -> None:
    """Tiny models of the page's layouts, under the page's names."""
    qwen, smollm = shared / "tokenizers" / "gpt-neox-20b", shared / "tokenizers" / "smollm2"
    save_chat_model(folder / "Qwen" / "Qwen3-8B", qwen, REASONING, "qwen3", seed=1)
    save_chat_model(folder / "Qwen" / "Qwen3-0.6B", qwen, REASONING, "qwen3", seed=2)
    save_chat_model(folder / "HuggingFaceTB" / "SmolLM2-360M-Instruct", smollm, CHATML, "llama", seed=3)


def without_tools(talk: dict[str, Any]) -> dict[str, Any]:
    """A conversation without its calls of tools, which the templates of these models do not show."""
    messages = [m for m in talk["messages"] if m["role"] != "tool" and not m.get("tool_calls")]
    return {"messages": messages}


def save_conversations(folder: Path) -> None:
    """The files that the page reads."""
    for name, split, count in (("chat", "train", 8), ("held-out", "heldout", 4)):
        talks = [without_tools(json.loads(talk.to_json())) for talk in mini_conversations(split, count)]
        save_lines(folder / f"{name}.jsonl", talks)
    asked = {"messages": [{"role": "user", "content": "Two plus two?"}]}
    save_lines(folder / "questions.jsonl", [{"prompt": "Two plus two?"}, asked])
    save_lines(folder / "choices.jsonl", [asked | {"choices": ["Four.", "Five."], "answer": 0}])


def short(words: list[str], tasks: Path) -> list[str]:
    """A command with few steps and rows, and answers of eight tokens: random weights never end one."""
    for option in ("--max-new-tokens", "--target-len"):
        if option in words:
            words[words.index(option) + 1] = "8"
    if words == ["kd", "demo", "--chat"]:  # minutes; tests/commands/test_experiment.py runs it in small
        return ["kd", "experiment", "demo-chat", "--plan"]
    if words[1] == "train":
        words += ["--max-steps", "2", "--tokens-per-batch", "512"]
    if "hellaswag" in words or any(word.startswith("flan:") for word in words):
        words += ["--task-root", str(tasks), "--limit", "6"]
    return words


@pytest.mark.slow
def test_the_commands_of_the_page_run_as_they_are_typed(shared: Path, tmp_path: Path) -> None:
    save_models(tmp_path, shared)
    save_conversations(tmp_path)
    assert len(typed_commands(PAGE)) > 10
    run_page(PAGE, tmp_path, small=lambda words: short(words, shared / "tasks"))
    for run in ("qwen-student", "smol-student"):
        assert load_tokenizer(str(tmp_path / "runs" / run)).chat_template, run
