"""A folder in which the names of the pages are small: models of the hub with random weights, short texts, a few rows of every task.

A name of the hub is a folder here, so commands need no other model than the one that the page names. What is too large for a test
(rows, steps, lengths) is put right by `smaller`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from numbered_rows import save_hellaswag, save_task
from tiny_encoder import save_encoder
from tiny_families import family_folder
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

from kd.data.corpus import Corpus
from kd.data.rows.example import Example

LAYOUTS = {
    "openai-community/gpt2": "gpt2",
    "distilbert/distilgpt2": "gpt2",
    "EleutherAI/gpt-neo-2.7B": "gpt_neo",
    "EleutherAI/pythia-410m": "gpt_neox",
    "meta-llama/Llama-3.1-8B": "llama",
    "meta-llama/Llama-3.1-70B": "llama",
    "Qwen/Qwen3-0.6B": "qwen3",
    "Qwen/Qwen3-1.7B": "qwen3",
    "Qwen/Qwen3-8B": "qwen3",
    "Qwen/Qwen3-32B": "qwen3",
}
"""Causal models of the pages -> their kind in transformers."""
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
OWN_SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "gpt_neo": {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]], "window_size": 64},
}
EMBEDDED = Path(__file__).parents[1] / "models" / "embedded"
ENCODERS = ("google/flan-t5-xl", "google/flan-t5-small", "google/t5-v1_1-base")
SENTENCES = (
    "The fox went down to the river to look at the fish, and came home with a story.",
    "Seven ships came on Monday, five on Tuesday, and on Wednesday there was fog.",
    "A long quiet night is written without a word about the weather.",
)
TASKS = ("boolq", "paws", "anli_r1", "cosmos_qa", "squad", "samsum", "xsum", "common_gen")


def save_causal(folder: Path, kind: str, tokenizer: Path, vocabulary: int = 400) -> None:
    """A random model of a kind, beside the tokenizer."""
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, **SHAPE | OWN_SHAPES.get(kind, {}))
    with torch.random.fork_rng():
        torch.manual_seed(len(str(folder)))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)


def save_t5(folder: Path, tokenizer: Path) -> None:
    """A random T5 that can be loaded in 4 bits, beside the tokenizer of a smaller one."""
    config = T5Config.from_pretrained(tokenizer)
    config.update({"d_model": 64, "d_kv": 32, "d_ff": 64})
    with torch.random.fork_rng():
        torch.manual_seed(1)
        shutil.copytree(tokenizer, folder)
        T5ForConditionalGeneration(config).save_pretrained(folder)


def save_world(folder: Path, tokenizer: Path, t5: Path) -> Path:
    """Models, texts and rows; returns the folder."""
    for name, kind in LAYOUTS.items():
        save_causal(folder / name, kind, tokenizer)
    save_causal(folder / "HuggingFaceTB" / "SmolLM2-360M", "llama", EMBEDDED, vocabulary=2048)
    for name in ENCODERS:
        save_t5(folder / name, t5)
    family_folder("nllb", folder / "facebook" / "nllb-200-distilled-600M")
    save_encoder(folder / "FacebookAI" / "roberta-large")
    for task in TASKS:
        save_task(folder / "my" / "tasks", task, rows=6)
    save_hellaswag(folder / "my" / "tasks")
    for task, rows in (("boolq", 204), ("anli_r1", 4)):  # FLAN takes 200 development rows from those of training
        save_task(folder / "my" / "flan", task, rows)
    save_texts(folder)
    return folder


def short_text(spec: str, split: str) -> Corpus:
    """Twelve documents of a split, in place of `demo` and `wikitext-2`: no two splits have one in common."""
    texts = [f"{spec} {split} {n}. {sentence} " * 3 for n in range(4) for sentence in SENTENCES]
    examples = tuple(Example(f"{split}/{n}", text) for n, text in enumerate(texts))
    return Corpus(spec, split, "documents", examples, {"source": spec})


SHORT_SOURCES = dict.fromkeys(("demo", "wikitext-2"), short_text)


def save_texts(folder: Path) -> None:
    """The files that pages read."""
    for name in ("corpus", "held-out"):
        save_lines(folder / f"{name}.jsonl", ({"text": one.target} for one in short_text(name, "train").examples))
    (folder / "held-out.txt").write_text("\n<|endoftext|>\n".join(SENTENCES * 4), encoding="utf-8")
    save_lines(folder / "pairs.jsonl", ({"prompt": f"an ant {n}", "target": "the hat and the ant"} for n in range(4)))
    save_lines(folder / "prompts.jsonl", ({"prompt": f"Who is {n}?", "target": "The fox."} for n in range(4)))
    (folder / "prompts.txt").write_text("The fox\nThe keeper\n", encoding="utf-8")


def save_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """JSON, a row in each line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def smaller(words: list[str]) -> list[str]:
    """A command with the texts of the world, few rows, few steps and short answers."""
    extra: dict[str, str] = {}
    command = words[1] if words[1] != "cache" else words[2]
    if command in ("build", "plan") and "--config" not in words:
        extra |= {"--seq-len": "64", "--limit": "4"}
    if command == "train":
        extra |= {"--max-steps": "2", "--tokens-per-batch": "256", "--device": "cpu"}
        words = without(words, "--epochs", "--batch-size")
    if command == "eval":
        extra |= {"--max-per-task" if any(word.startswith("flan:") for word in words) else "--limit": "2"}
        if "generation" in " ".join(words) or "samples" in words:
            extra |= {"--max-new-tokens": "4"}
        if "--bertscore-model" in words:
            extra |= {"--bertscore-layer": "2"}
    if any(word.startswith("flan:") or word == "hellaswag" for word in words):
        extra |= {"--eval-task-root" if command == "train" else "--task-root": "my/tasks"}
    for option, value in extra.items():
        words = [*without(words, option), option, value]
    return words


def without(words: list[str], *options: str) -> list[str]:
    """The words less some options and their values."""
    for option in options:
        while option in words:
            at = words.index(option)
            words = words[:at] + words[at + 2 :]
    return words
