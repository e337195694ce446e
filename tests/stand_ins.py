"""What tests of a teacher pass give it: rows of random tokens, and backbones that fail."""

from __future__ import annotations

import math

import numpy as np
import torch

from kd.data.rows.example import Example
from kd.data.tokenizing.token_rows import TokenRows


def make_rows(lengths: list[tuple[int, int]], seed: int = 0, vocabulary: int = 400) -> list[TokenRows]:
    """Random tokens: `(context, target)` lengths per example."""
    rng = np.random.default_rng(seed)
    rows = []
    for number, (c, n) in enumerate(lengths):
        context, target = (rng.integers(1, vocabulary, size).astype(np.int32) for size in (c, n))
        rows.append(TokenRows(Example(f"e{number}", "x" * n), context, target, np.arange(1, n + 1)))
    return rows


class Poisoned:
    """A backbone that answers NaN from one position of one example on."""

    def __init__(self, backbone, token: int) -> None:
        self.backbone, self.token = backbone, token

    def __call__(self, input_ids, **options):
        result = self.backbone(input_ids=input_ids, **options)
        seen = (input_ids == self.token).long().cumsum(1) > 0
        result.last_hidden_state = result.last_hidden_state.masked_fill(seen[..., None], math.nan)
        return result


class OutOfMemory:
    """A backbone that cannot hold more than so many tokens."""

    def __init__(self, backbone, tokens: int, error: type[RuntimeError] = torch.OutOfMemoryError) -> None:
        self.backbone, self.tokens, self.error, self.failures = backbone, tokens, error, 0

    def __call__(self, input_ids, **options):
        if input_ids.numel() > self.tokens:
            self.failures += 1
            raise self.error("CUDA out of memory. Tried to allocate 2 GiB")
        return self.backbone(input_ids=input_ids, **options)
