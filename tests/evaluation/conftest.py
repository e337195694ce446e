"""Two students of the tiny teacher, a text of several documents, and caches of it; naive twins get them in float64."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from kd.data.sources import load_corpus

VOCAB = 400
PADDED = 416
"""Columns of the students' output layer: 16 more than the tokenizer has ids."""

PROSE = (
    "The fox went down to the river to look at the fish, and every evening it came home with a story to tell. ",
    "There were seven ships on Monday, five on Tuesday, and on Wednesday there was fog. ",
    "They talked about the weather, about the price of fish, and about bells, and then each of them went home. ",
)


@pytest.fixture(scope="session")
def student_dirs(tmp_path_factory: pytest.TempPathFactory, save_model, tokenizer_dir: Path) -> list[Path]:
    """Two models with random weights and padded output layers, beside the teacher's tokenizer."""
    folders = []
    for seed in (1, 2):
        folder = tmp_path_factory.mktemp("students") / f"student-{seed}"
        save_model(folder, seed=seed, vocab=PADDED)
        shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
        folders.append(folder)
    return folders


@pytest.fixture(scope="session")
def student(student_dirs: list[Path]):
    return AutoModelForCausalLM.from_pretrained(student_dirs[0], dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def student64(student_dirs: list[Path]):
    """The same weights in float64, for the naive twins."""
    return AutoModelForCausalLM.from_pretrained(student_dirs[0], dtype=torch.float64).eval()


@pytest.fixture(scope="session")
def teacher(model_dir: Path):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def teacher64(model_dir: Path):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64).eval()


@pytest.fixture(scope="session")
def prose_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ASCII documents, of which two need several windows: windows then end on any token."""
    path = tmp_path_factory.mktemp("prose") / "prose.txt"
    documents = [PROSE[0] * 3, PROSE[1], PROSE[2] * 2]
    path.write_text("\n<|endoftext|>\n".join(documents), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def prose(prose_file: Path):
    return load_corpus(str(prose_file))


@pytest.fixture(scope="session")
def exact_cache(tmp_path_factory: pytest.TempPathFactory, build_request, run_build, prose_file: Path) -> Path:
    """A `kl` cache of the prose, 8 tokens a row as float32, in several shards."""
    out = tmp_path_factory.mktemp("caches") / "exact"
    run_build(build_request(out, text=prose_file, logprob_codec="float32"))
    return out


@pytest.fixture(scope="session")
def whole_cache(tmp_path_factory: pytest.TempPathFactory, build_request, run_build, prose_file: Path) -> Path:
    """Every token of the vocabulary kept: the rest bucket is empty."""
    out = tmp_path_factory.mktemp("caches") / "whole"
    run_build(build_request(out, text=prose_file, logprob_codec="float32", top_k=VOCAB))
    return out
