"""`TextSample`: some examples of a text that is read whole, and estimates for all of it from them.

    sample = draw_sample(text.reading(left_out), 1000, seed=0)
    total, error = sample.estimate(values)         # `values [n]` of the examples that were drawn

Reading a text costs less than tokenising it, so a plan may read all of it, which counts examples and characters exactly, and
tokenise some. Every example is drawn with the same probability (reservoir sampling, Vitter 1985, algorithm R). A total is
estimated by regression on what is known of every example, the characters of its prompt and of its target (Cochran, Sampling
Techniques, 1977, chapter 7). Its error is that of leaving out one example after another. Where all examples are drawn it is exact.
With texts whose lengths spread over two orders of magnitude, 90 of 100 intervals held the total with 30 draws, 91 with 60, and 95
with 200.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from kd.data.rows.example import Example
from kd.data.tokenizing.token_rows import TokenRows

WIDTH = 1.96
"""Standard errors to each side of an estimate, for 95 of 100 samples."""


@dataclass(frozen=True)
class TextSample:
    """Examples drawn from a text, and what is known of all its examples."""

    drawn: tuple[Example, ...]
    """The examples that were drawn, in their order."""
    examples: int
    """Number of all examples."""
    prompts: int
    """Characters of all prompts."""
    targets: int
    """Characters of all targets."""

    def by_example(self, rows: Iterable[TokenRows], kind: str) -> Iterator[tuple[int, TokenRows]]:
        """The rows of the drawn examples, each with the number of its example among them; `kind` as `Corpus.kind`.

        A document is cut into blocks, and a conversation may be cut into turns, which are called ID#0, ID#1 and so on.
        """
        numbers = {example.id: number for number, example in enumerate(self.drawn)}
        for row in rows:
            whole = None if kind == "documents" else numbers.get(row.example.id)
            yield (numbers[row.example.id.rpartition("#")[0]] if whole is None else whole), row

    def estimate(self, values: np.ndarray) -> tuple[float, float]:
        """The total of a value over all examples, from those of the drawn ones `[n]`, and half of its 95 % interval.

        Infinite where too few were drawn to tell.
        """
        count = len(self.drawn)
        if count == self.examples:
            return float(values.sum()), 0.0
        lengths = np.array([[1, len(e.prompt), len(e.target)] for e in self.drawn], dtype=np.float64)
        scale = np.maximum(lengths.max(axis=0), 1)  # so that the rank does not depend on how long texts are
        x, totals = lengths / scale, np.array([self.examples, self.prompts, self.targets]) / scale
        inverse = np.linalg.pinv(x.T @ x, rcond=1e-10, hermitian=True)
        weights = x @ inverse @ totals
        total = float(weights @ values)
        left = values - x @ (inverse @ (x.T @ values))
        free = 1 - np.einsum("ij,jk,ik->i", x, inverse, x)
        if (free < 1e-9).any():  # an example without which nothing would be known of some direction
            return total, float("inf")
        return total, WIDTH * float(((weights * left / free) ** 2).sum() * (1 - count / self.examples)) ** 0.5


def draw_sample(examples: Iterable[Example], count: int, *, seed: int) -> TextSample:
    """Draw `count` of the examples, or all where there are no more. No others are held."""
    generator, drawn = random.Random(seed), list[tuple[int, Example]]()
    number = -1
    prompts = targets = 0
    for number, example in enumerate(examples):
        prompts += len(example.prompt)
        targets += len(example.target)
        if number < count:
            drawn.append((number, example))
        elif (drop := int(generator.random() * (number + 1))) < count:
            drawn[drop] = number, example
    kept = tuple(example for _, example in sorted(drawn, key=lambda one: one[0]))
    return TextSample(kept, number + 1, prompts, targets)
