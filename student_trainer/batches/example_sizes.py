"""`ExampleSizes`: the tokens of each example on each side of a student, looked up when batches are cut.

A causal student has one side. An encoder reads the context, and a decoder the target behind its start tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from kd.cache_builder.store.lengths import Lengths
from kd.cache_builder.store.readers.example_lengths import ExampleLengths, ListedLengths
from kd.cache_builder.store.readers.reading import Reader
from kd.common.errors import CacheDamageError
from kd.data.tokenizing.block_config import BlockConfig
from kd.student_trainer.counting.sizes_on_disk import SizesOnDisk, sizes_on_disk


@dataclass(frozen=True)
class ExampleSizes:
    """What a student reads of each example, in tokens."""

    lengths: ExampleLengths | ListedLengths
    """Tokens and scored tokens of the examples."""
    start: int = 0
    """Ids that a decoder begins every target with; 0 for a causal student."""
    at_most: tuple[int | None, ...] = ()
    """Tokens on each side that the cache's settings allow, where nobody has looked at all examples; None = any number."""

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, examples: np.ndarray) -> np.ndarray:
        """`[n, sides]` tokens of the examples `[n]`. Raises CacheDamageError for one that the cache's settings do not allow."""
        sizes = self._sides(self.lengths.of(examples))
        self._check(sizes, examples)
        return sizes

    @contextmanager
    def held(self, threads: int) -> Iterator[np.ndarray | SizesOnDisk]:
        """The same for whoever asks for all examples: `[E, sides]`, or what is indexed as that; read on so many threads."""
        if self.lengths.few:
            yield np.concatenate([self._sides(lengths).astype(np.uint32) for lengths in self.lengths.batches()])
            return

        def read(first: int, stop: int) -> np.ndarray:
            sizes = self._sides(self.lengths.between(first, stop))
            self._check(sizes, range(first, stop))
            return sizes

        sides = 2 if self.start else 1
        with sizes_on_disk(read, len(self), self.at_most or (None,) * sides, threads) as sizes:
            yield sizes

    def _check(self, sizes: np.ndarray, examples: np.ndarray | range) -> None:
        """Raise CacheDamageError where one of the examples is longer than the cache's settings allow."""
        for side, most in enumerate(self.at_most):
            if most is not None and sizes[:, side].max(initial=0) > most:
                raise CacheDamageError(
                    "an example of the cache is longer than its settings allow",
                    where=f"example {int(examples[sizes[:, side].argmax()])}",
                    found=f"{int(sizes[:, side].max())} tokens",
                    expected=f"at most {most}",
                    try_="kd cache verify",
                )

    def _sides(self, lengths: Lengths) -> np.ndarray:
        tokens, rows = (values.astype(np.int64, copy=False) for values in lengths)
        return tokens[:, None] if not self.start else np.stack([tokens - rows, rows + self.start - 1], axis=1)

    def longest(self) -> list[int]:
        """Tokens of the longest example on each side. All lengths are read, or what the cache's settings allow is taken."""
        if self.at_most:
            return [0 if most is None else most for most in self.at_most]
        most = np.max([self._sides(lengths).max(axis=0) for lengths in self.lengths.batches()], axis=0)
        return [int(n) for n in most]

    def trusting(self, blocks: BlockConfig, windows: Sequence[int | None]) -> ExampleSizes:
        """These sizes where not all of them need to be looked at before the first batch; else the same.

        A cache's settings say how long an example may be. Where no window of the student (None = without end) is shorter and
        the cache is large, that is enough; each example is compared with it when its batch is cut.
        """
        if self.lengths.few:
            return self
        target = None if blocks.target_len is None else blocks.target_len + self.start - 1
        allowed = (blocks.seq_len, target) if self.start else (blocks.seq_len,)
        for most, window in zip(allowed, windows, strict=False):
            if window is not None and (most is None or most > window):
                return self
        return ExampleSizes(self.lengths, self.start, allowed)

    def over(self, reader: Reader) -> ExampleSizes:
        """The same of another reader of the same cache."""
        return ExampleSizes(self.lengths.over(reader), self.start, self.at_most)
