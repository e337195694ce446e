"""The tutorial, the how-tos and the explanations run as they are written; models of the hub are tiny ones of the same layouts."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from page_runner import DOCS, ROOT, run_page, typed_commands
from test_examples import NOT_OURS
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from kd.models.tokenizer import load_tokenizer
from kd.student_trainer.batches.alignment import Side, align

TUTORIAL = DOCS / "tutorial.md"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
SENTENCES = [
    "The fox went down to the river to look at the fish, and came home with a story.",
    "Seven ships came on Monday, five on Tuesday, and on Wednesday there was fog.",
    "A long overwhelmingly quiet night is written without a word about the weather.",
]


def save_tiny(folder: Path, tokenizer: Path, kind: str, seed: int) -> None:
    """A random model with a layout of the hub, beside a tokenizer."""
    words = load_tokenizer(str(tokenizer))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "qwen3":
            Qwen3ForCausalLM(Qwen3Config(vocab_size=len(words), **SIZES)).save_pretrained(folder)
        else:
            LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **SIZES)).save_pretrained(folder)
    words.save_pretrained(folder)


@pytest.fixture
def workplace(tmp_path: Path, tokenizer_dir: Path) -> Path:
    """A folder in which the names of the pages are tiny models and short texts."""
    save_tiny(tmp_path / "Qwen" / "Qwen3-1.7B", tokenizer_dir, "qwen3", seed=1)
    save_tiny(tmp_path / "Qwen" / "Qwen3-0.6B", tokenizer_dir, "qwen3", seed=2)
    save_tiny(tmp_path / "HuggingFaceTB" / "SmolLM2-360M", ROOT / "models" / "embedded", "llama", seed=3)
    for name, times in (("corpus.jsonl", 8), ("held-out.jsonl", 2), ("wikitext-2.jsonl", 4)):
        rows = [{"text": f"{number}. {sentence} "} for number in range(times) for sentence in SENTENCES]
        start = 100 * times  # the texts have no document in common
        rows = [{"text": f"{start + number}: {row['text']}" * 2} for number, row in enumerate(rows)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


def offline(words: list[str]) -> list[str]:
    """The command with a local text in place of WikiText-2: a file has no split."""
    if "wikitext-2" not in words:
        return words
    test = "test" in words
    words = [word for word in words if word not in ("--split", "test")]
    words[words.index("wikitext-2")] = "held-out.jsonl" if test else "wikitext-2.jsonl"
    return words


def short(words: list[str]) -> list[str]:
    """The command with one document and two steps. The slow test has models of the hub, the plan, the baseline and the report."""
    if any("qwen" in word.lower() for word in words) or {"plan", "data", "ce", "report"} & set(words[1:3] + words[6:8]):
        return []
    words = [word for word in words if word != "runs/finetuned"]
    for option, number in (("--limit", "1"), ("--max-steps", "2")):
        if option in words:
            words[words.index(option) + 1] = number
    return [*words, "--limit", "1"] if words[1] == "eval" else words


def test_the_tutorial_runs_with_one_document_and_two_steps(workplace: Path) -> None:
    assert len(typed_commands(TUTORIAL)) >= 12
    printed = run_page(TUTORIAL, workplace, small=short, compare=False)
    assert "The function returns" in next(text for command, text in printed.items() if "generate" in command)


@pytest.mark.slow
def test_the_tutorial_prints_what_it_says(workplace: Path) -> None:
    run_page(TUTORIAL, workplace, small=offline)


@pytest.mark.parametrize("name", ["what-is-in-a-cache", "tails-and-temperatures", "uld-and-alignment"])
def test_the_python_of_an_explanation_prints_what_it_says(name: str, tmp_path: Path) -> None:
    run_page(DOCS / "explanation" / f"{name}.md", tmp_path)


def test_the_groups_that_the_page_draws_are_those_of_the_alignment() -> None:
    text = (DOCS / "explanation" / "uld-and-alignment.md").read_text(encoding="utf-8")
    rows = {m[1]: m[2].split(" | ") for m in re.finditer(r"^\| (\w+) \| (.+) \|$", text, flags=re.MULTILINE)}
    pieces = {side: [cell.strip("`") for cell in rows[side] if cell] for side in ("teacher", "student")}
    assert "".join(pieces["teacher"]) == "".join(pieces["student"])
    sides = [Side(np.cumsum([len(piece) for piece in pieces[side]])) for side in ("teacher", "student")]
    drawn = [int(cell) for cell in rows["group"]]
    lengths = [drawn.count(group) for group in sorted(set(drawn))]
    assert list(np.diff(align(*sides).teacher, axis=1)[:, 0]) == lengths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "commands"),
    [
        ("another-tokenizer", 6),
        ("several-gpus", 2),
        ("from-hugging-face-to-gguf", 3),
        ("choose-k-and-profile", 9),
        pytest.param("own-training-loop", 5, marks=NOT_OURS),
    ],
)
def test_a_how_to_runs_and_prints_what_it_says(page: str, commands: int, workplace: Path) -> None:
    path = DOCS / "how-to" / f"{page}.md"
    assert len(typed_commands(path)) == commands
    run_page(path, workplace, small=offline)
    if page == "from-hugging-face-to-gguf":
        run = workplace / "runs" / "student"
        assert {"config.json", "tokenizer.json", "model.safetensors"} <= {file.name for file in run.iterdir()}
        assert json.loads((run / "config.json").read_text(encoding="utf-8"))["architectures"] == ["Qwen3ForCausalLM"]
    shutil.rmtree(workplace / "runs")
