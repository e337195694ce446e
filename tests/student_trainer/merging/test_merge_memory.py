"""A merge holds two models and a tensor of each other at most, measured as resident memory in a process of its own."""

from __future__ import annotations

from types import ModuleType

import pytest

SLACK = 30e6
"""Bytes: blocks in float64 with their intermediate results (7 models x 0.5 MB x about 6), mapped pages, the allocator's."""


def held(bench: ModuleType, methods: tuple[str, ...]) -> tuple[dict[str, float], float, float]:
    """Bytes held by method; bytes of a model and of its largest tensor."""
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=2000, n_positions=64, n_embd=256, n_layer=8, n_head=4)
    measured = bench.measure_shape(config, 7, methods)
    return {m: row["held"] for m, row in measured["methods"].items()}, measured["bytes"], 4.0 * 2000 * 256


def test_seven_models_are_merged_in_the_memory_of_two(load_benchmark) -> None:
    measured, model, tensor = held(load_benchmark("merging"), ("ties",))
    bound = 2 * model + 7 * tensor + SLACK
    assert bound < 0.6 * 7 * model  # holding all of them would not pass
    assert measured["ties"] < bound, {m: f"{b / model:.2f} models" for m, b in measured.items()}


@pytest.mark.slow
def test_every_method_stays_in_the_memory_of_two_models(load_benchmark) -> None:
    bench = load_benchmark("merging")
    measured, model, tensor = held(bench, bench.METHODS)
    for method, size in measured.items():
        bound = 2 * model + 7 * tensor + SLACK
        if (
            method == "regmean"
        ):  # its widest layer's system: six matrices of 1024 x 1024 in float64, two models of this shape
            bound += 6 * 8 * 1024**2
        assert size < bound < 7 * model, f"{method}: {size / model:.2f} models of {model / 1e6:.0f} MB"
