"""A merge holds two models and a tensor of each other at most, measured as resident memory in a process of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SLACK = 30e6
"""Bytes: blocks in float64 with their intermediate results (7 models x 0.5 MB x about 6), mapped pages, the allocator's."""


def bench() -> Any:
    path = Path(__file__).parents[2] / "benchmarks" / "merging.py"
    spec = importlib.util.spec_from_file_location("bench_merging", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def held(methods: tuple[str, ...]) -> tuple[dict[str, float], float, float]:
    """Bytes held by method; bytes of a model and of its largest tensor."""
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=2000, n_positions=64, n_embd=256, n_layer=8, n_head=4)
    found = bench().measure_shape(config, 7, methods)
    return {m: row["held"] for m, row in found["methods"].items()}, found["bytes"], 4.0 * 2000 * 256


def test_seven_models_are_merged_in_the_memory_of_two() -> None:
    found, model, tensor = held(("ties",))
    bound = 2 * model + 7 * tensor + SLACK
    assert bound < 0.6 * 7 * model  # holding all of them would not pass
    assert found["ties"] < bound, {m: f"{b / model:.2f} models" for m, b in found.items()}


@pytest.mark.slow
def test_every_method_stays_in_the_memory_of_two_models() -> None:
    found, model, tensor = held(bench().METHODS)
    for method, size in found.items():
        bound = 2 * model + 7 * tensor + SLACK
        if (
            method == "regmean"
        ):  # its widest layer's system: six matrices of 1024 x 1024 in float64, two models of this shape
            bound += 6 * 8 * 1024**2
        assert size < bound < 7 * model, f"{method}: {size / model:.2f} models of {model / 1e6:.0f} MB"
