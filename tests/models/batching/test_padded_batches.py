"""Batches hold every example once, within the budget, and pad little on either side."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kd.models.batching.padded_batches import batches_by_length, even_rows, forward_tokens, padded_tokens


@pytest.mark.parametrize("budget", [1, 20, 25, 64, 200, 4096])
def test_every_example_is_in_one_batch_within_the_token_budget(budget: int) -> None:
    lengths = [5, 9, 2, 9, 30, 1, 7, 42, 21, 12, 9, 37]
    found = batches_by_length(lengths, budget)
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(len(b) * max(lengths[i] for i in b) <= budget or len(b) == 1 for b in found)
    assert found[0][0] == 7  # the longest


def two_sided(seed: int, n: int = 400) -> list[tuple[int, int]]:
    rng = np.random.default_rng(seed)
    return [(int(s), int(t)) for s, t in zip(rng.integers(1, 60, n), rng.geometric(0.2, n), strict=True)]


@pytest.mark.parametrize("budget", [64, 512, 2048])
def test_both_sides_of_an_encoder_decoder_are_bucketed(budget: int) -> None:
    sizes = two_sided(0)
    batches = batches_by_length(sizes, budget)
    assert sorted(i for b in batches for i in b) == list(range(len(sizes)))
    tokens = sum(map(sum, sizes))
    padded = sum(padded_tokens([sizes[i] for i in b]) for b in batches)
    # what filling batches from examples sorted by their whole length pads
    filled: list[list[int]] = [[]]
    width = (0, 0)
    for i in sorted(range(len(sizes)), key=lambda i: (-sum(sizes[i]), i)):
        width = (max(width[0], sizes[i][0]), max(width[1], sizes[i][1]))
        if (len(filled[-1]) + 1) * sum(width) > budget:
            filled, width = [*filled, []], sizes[i]
        filled[-1].append(i)
    naive = sum(padded_tokens([sizes[i] for i in b]) for b in filled if b)
    assert padded - tokens < (naive - tokens) / 2


def test_batches_of_one_side_are_filled_to_the_budget_from_the_longest_down() -> None:
    """Stored bytes follow from them: this rule must not change."""
    lengths = [s for s, _ in two_sided(1)]
    expected: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if expected and (len(expected[-1]) + 1) * lengths[expected[-1][0]] <= 512:
            expected[-1].append(i)
        else:
            expected.append([i])
    assert batches_by_length(lengths, 512) == expected


def test_batches_of_an_encoder_decoder_count_the_padding_of_both_sides() -> None:
    sizes = [(10, 2), (2, 10), (6, 6), (1, 1)]
    for budget in (12, 24, 40, 80):
        for batch in batches_by_length(sizes, budget):
            padded = len(batch) * (max(sizes[i][0] for i in batch) + max(sizes[i][1] for i in batch))
            assert padded <= budget or len(batch) == 1
    assert sorted(i for b in batches_by_length(sizes, 24) for i in b) == [0, 1, 2, 3]


@pytest.mark.parametrize("most", [5, 16, 128, 208])
def test_chunks_are_as_few_as_the_limit_allows_and_of_one_size_but_for_rounding(most: int) -> None:
    for rows in range(1, 700):
        step = even_rows(rows, most)
        sizes = [min(step, rows - start) for start in range(0, rows, step)]
        assert sum(sizes) == rows
        assert max(sizes) <= most
        if most % 16 == 0:
            assert len(sizes) == -(-rows // most)
            assert step - sizes[-1] < 16 * len(sizes)  # each chunk is rounded up to 16


def test_a_forward_pass_grows_with_the_threads_and_stays_that_of_a_gpu_at_most(monkeypatch) -> None:
    for threads, one, two in ((1, 512, 1024), (2, 512, 1024), (6, 1536, 3072), (64, 4096, 4096)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert (forward_tokens("cpu"), forward_tokens("cpu", two_sides=True)) == (one, two)
    assert forward_tokens("cuda") == forward_tokens("cuda", two_sides=True) == 4096
