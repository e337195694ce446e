"""Made-up GLUE rows that a tiny model can learn, and tiny classifiers of three layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from kd.data.instruction_tasks.glue import glue_tasks
from kd.models.classifiers import load_classifier
from kd.models.model_request import ModelRequest
from kd.student_trainer.merging.pool import ModelPool, PoolModel, read_pool
from kd.student_trainer.merging.stored_weights import StoredPool, skeleton

WORDS = ("fox", "river", "keeper", "baker", "bridge", "fog", "bells", "ships", "story", "price")


Tensors = dict[str, np.ndarray]
"""Tensors of a backbone by name, float64."""


def read_tensors(model: PoolModel, names: list[str]) -> Tensors:
    """Tensors of a model of a pool straight from its file, by the end of their names."""
    tensors = load_file(Path(model.path) / "model.safetensors")
    return {n: next(v for k, v in tensors.items() if k == n or k.endswith(f".{n}")).astype(np.float64) for n in names}


def made_up_rows(task: str, count: int, first: int = 0) -> list[dict[str, Any]]:
    """Rows whose first word tells the label."""
    rows = []
    glue = glue_tasks()[task]
    for i in range(first, first + count):
        label = i % len(glue.labels)
        text = " ".join([WORDS[label * 3], *(WORDS[(i * k + k) % 10] for k in range(2, 3 + i % 7))])
        texts = [text, " ".join(WORDS[(i + k) % 10] for k in range(1 + i % 4))][: len(glue.texts)]
        rows.append(dict(zip(glue.texts, texts, strict=True)) | {"idx": i, "label": label})
    return rows


@pytest.fixture(scope="session")
def glue_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ROOT/glue/TASK/{train,dev}.jsonl of all seven tasks: 48 and 20 rows."""
    root = tmp_path_factory.mktemp("rows") / "glue"
    for task in glue_tasks():
        (root / task).mkdir(parents=True)
        for split, count, first in (("train", 48, 0), ("dev", 20, 100)):
            lines = [json.dumps(row) for row in made_up_rows(task, count, first)]
            (root / task / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, tokenizer_dir: Path) -> dict[str, Path]:
    """Tiny language models of the three layouts, beside one tokenizer."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    size: dict[str, Any] = {
        "vocab_size": 400,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    folders = {"gpt2": model_dir}
    for name, config, cls in (
        ("gpt_neox", GPTNeoXConfig(**size), GPTNeoXForCausalLM),
        ("llama", LlamaConfig(**size, num_key_value_heads=1), LlamaForCausalLM),
    ):
        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            cls(config).save_pretrained(folder)
        shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
        folders[name] = folder
    return folders


@pytest.fixture(scope="session")
def make_classifier(tokenizer_dir: Path) -> Callable[..., Path]:
    """`make_classifier(folder, task, base, seed)`: `base` moved at random, with a random head of the task's classes."""

    def make(folder: Path, task: str, base: Path, *, seed: int, step: float = 0.05) -> Path:
        model = load_classifier(ModelRequest(str(base), device="cpu", seed=seed), glue_tasks()[task].labels, pad_id=0)
        noise = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.base_model.parameters():
                parameter += step * torch.randn(parameter.shape, generator=noise)
            model.score.weight.copy_(torch.randn(model.score.weight.shape, generator=noise))
        model.save_pretrained(folder)
        shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
        return folder

    return make


@pytest.fixture(scope="session", params=["gpt2", "gpt_neox", "llama"])
def pool(
    request: Any,
    tmp_path_factory: pytest.TempPathFactory,
    layouts: dict[str, Path],
    make_classifier: Callable[..., Path],
) -> ModelPool:
    """Three classifiers made from one base, in each layout: one text, a pair, a pair with three classes."""
    return _pool(tmp_path_factory.mktemp(f"pool-{request.param}"), layouts[request.param], make_classifier)


@pytest.fixture(scope="session")
def gpt2_pool(
    tmp_path_factory: pytest.TempPathFactory, layouts: dict[str, Path], make_classifier: Callable[..., Path]
) -> ModelPool:
    """The same in the GPT-2 layout alone."""
    return _pool(tmp_path_factory.mktemp("pool"), layouts["gpt2"], make_classifier)


@pytest.fixture
def wholes(pool: ModelPool) -> tuple[list[Tensors], Tensors]:
    """All tensors of the models of `pool`, and those of its base."""
    names = StoredPool.of(pool, skeleton(pool), with_base=False).names
    assert pool.base is not None
    return [read_tensors(m, names) for m in pool.models], read_tensors(pool.base, names)


def _pool(folder: Path, base: Path, make: Callable[..., Path]) -> ModelPool:
    for seed, task in enumerate(("cola", "mrpc", "mnli")):
        make(folder / task, task, base, seed=seed)
    lines = [f"base: {base}", "models:", *(f"  {task}: {task}" for task in ("cola", "mrpc", "mnli"))]
    (folder / "pool.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_pool(folder / "pool.yaml")


@pytest.fixture(scope="session")
def make_student(tmp_path_factory: pytest.TempPathFactory, save_student) -> Callable[..., Path]:
    """`make_student(seed=…, tied=…)`: a folder with a random GPT-2 language model of 2 layers and a tokenizer."""

    def make(*, seed: int, tied: bool = True) -> Path:
        return save_student(tmp_path_factory.mktemp("student"), seed=seed, dropout=0.1, tie_word_embeddings=tied)

    return make
