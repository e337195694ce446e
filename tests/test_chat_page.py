"""The commands of docs/how-to/chat.md, run in order: tiny random models of the same layouts, with real tokenizers."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import CHATML, REASONING, Layout
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kd.data.demo.mini_chat import mini_conversations
from kd.models.tokenizer import load_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "chat.md"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "initializer_range": 0.2,
}
LONGEST = "128"
"""In place of the page's lengths of answers: random weights never end one, and each token takes milliseconds."""


def save_chat_model(folder: Path, tokenizer: Path, layout: Layout, kind: str, seed: int) -> None:
    """A random model of a layout, and a real tokenizer with the control tokens and the template of a family."""
    words = load_tokenizer(str(tokenizer))
    words.add_special_tokens({"additional_special_tokens": list(layout.control), "eos_token": layout.eos})
    words.chat_template = layout.source
    size = (len(words) + 63) // 64 * 64
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "qwen3":
            model = Qwen3ForCausalLM(Qwen3Config(vocab_size=size, tie_word_embeddings=True, **SIZES))
        else:
            model = LlamaForCausalLM(LlamaConfig(vocab_size=size, tie_word_embeddings=True, **SIZES))
    model.save_pretrained(folder)
    words.save_pretrained(folder)


@pytest.fixture(scope="module")
def models(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name on the page -> folder of a tiny model of that layout."""
    root = tmp_path_factory.mktemp("models")
    qwen, smollm = shared / "tokenizers" / "gpt-neox-20b", shared / "tokenizers" / "smollm2"
    for name, tokenizer, layout, kind in (
        ("Qwen/Qwen3-8B", qwen, REASONING, "qwen3"),
        ("Qwen/Qwen3-0.6B", qwen, REASONING, "qwen3"),
        ("HuggingFaceTB/SmolLM2-360M-Instruct", smollm, CHATML, "llama"),
    ):
        save_chat_model(root / name, tokenizer, layout, kind, seed=len(name))
    return {name: root / name for name in ("Qwen/Qwen3-8B", "Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-360M-Instruct")}


def without_tools(talk: dict[str, Any]) -> dict[str, Any]:
    """A conversation without its calls of tools, which the templates of these models do not show."""
    messages = [m for m in talk["messages"] if m["role"] != "tool" and not m.get("tool_calls")]
    return {"messages": messages}


def commands_as_typed() -> list[str]:
    """Every `kd` command of the page."""
    return re.findall(r"^    kd (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)


def substituted(command: str, models: dict[str, Path], shared: Path) -> list[str]:
    """The words of a command with small models, local rows, a few of them, and short answers."""
    for name, folder in models.items():
        command = command.replace(name, str(folder))
    words = shlex.split(command)
    for option in ("--max-new-tokens", "--target-len"):
        if option in words:
            words[words.index(option) + 1] = "8"
    if words == ["demo", "--chat"]:  # minutes; tests/commands/test_experiment.py runs it in small
        words = ["experiment", "demo-chat", "--plan"]
    if words[0] == "train":
        words += ["--max-steps", "2", "--tokens-per-batch", "512"]
    if "hellaswag" in words or any(word.startswith("flan:") for word in words):
        words += ["--task-root", str(shared / "tasks"), "--limit", "6"]
    return words


@pytest.mark.slow
def test_the_commands_of_the_page_run_as_they_are_typed(
    models: dict[str, Path], shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kd.cli import cli

    monkeypatch.chdir(tmp_path)
    for name, split, count in (("chat.jsonl", "train", 8), ("held-out.jsonl", "heldout", 4)):
        talks = [without_tools(json.loads(talk.to_json())) for talk in mini_conversations(split, count)]
        Path(name).write_text("".join(json.dumps(talk) + "\n" for talk in talks), encoding="utf-8")
    questions = [{"prompt": "Two plus two?"}, {"messages": [{"role": "user", "content": "Name a colour."}]}]
    Path("questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    chosen = {"messages": [{"role": "user", "content": "Two plus two?"}], "choices": ["Four.", "Five."], "answer": 0}
    Path("choices.jsonl").write_text(json.dumps(chosen) + "\n", encoding="utf-8")
    typed = commands_as_typed()
    assert len(typed) > 10
    for command in typed:
        words = substituted(command, models, shared)
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, f"kd {command}\n{done.output}\n{done.exception!r}"
    for run in ("runs/qwen-student", "runs/smol-student"):
        assert load_tokenizer(run).chat_template, run
