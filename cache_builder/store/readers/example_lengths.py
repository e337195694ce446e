"""`ExampleLengths`: how long any examples of a reader are, looked up when they are asked for.

    lengths = ExampleLengths(reader)
    tokens, rows = lengths.of(numbers)

Lengths are read in groups of GROUP_EXAMPLES consecutive examples. The groups that were used last are kept, 4 bytes an example: all
groups of a cache of 16 million examples, 67 MB. Of a larger cache, an epoch reads a group about once for each shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from kd.cache_builder.store.lengths import GROUP_EXAMPLES, Lengths
from kd.cache_builder.store.readers.reading import Reader
from kd.cache_builder.store.records.manifest_checks import PAGE_EXAMPLES

KEPT = 256
"""Groups in memory, of 0.25 MB each; of 0.5 MB where an example has more than 65,535 tokens."""


class ExampleLengths:
    """The lengths of all examples of a reader; 0 for those that are not here. Thread-safe."""

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self._group = lru_cache(KEPT)(self._read_group)

    def __len__(self) -> int:
        return len(self.reader)

    def of(self, examples: np.ndarray) -> Lengths:
        """`([n], [n])` tokens and rows of the examples `[n]`, int64. Raises CacheDamageError for a file that is damaged."""
        groups = examples // GROUP_EXAMPLES
        tokens, rows = np.empty(len(groups), dtype=np.int64), np.empty(len(groups), dtype=np.int64)
        by_group = np.argsort(groups, kind="stable")
        for members in np.split(by_group, np.flatnonzero(np.diff(groups[by_group])) + 1):
            if len(members):
                group = int(groups[members[0]])
                within = examples[members] - group * GROUP_EXAMPLES
                of_group = self._group(group)
                tokens[members], rows[members] = of_group[0][within], of_group[1][within]
        return tokens, rows

    @property
    def few(self) -> bool:
        """Whether the lengths of all examples are kept, once they were read."""
        return len(self) <= KEPT * GROUP_EXAMPLES

    def batches(self) -> Iterator[Lengths]:
        """Tokens and rows of all examples in their order, a file's at a time; kept where there are few."""
        if self.few:
            yield from map(self._group, range(-(-len(self) // GROUP_EXAMPLES)))
            return
        for first in range(0, len(self), PAGE_EXAMPLES):
            yield self.reader.lengths(first, min(first + PAGE_EXAMPLES, len(self)))

    def between(self, first: int, stop: int) -> Lengths:
        """Tokens and rows of the examples `[first, stop)`, of which nothing is kept."""
        return self.reader.lengths(first, stop)

    def over(self, reader: Reader) -> ExampleLengths:
        """The lengths of another reader of the same cache."""
        return ExampleLengths(reader)

    def _read_group(self, number: int) -> Lengths:
        first = number * GROUP_EXAMPLES
        tokens, rows = self.reader.lengths(first, min(first + GROUP_EXAMPLES, len(self)))
        dtype = np.uint16 if tokens.max() < 1 << 16 else np.uint32
        return tokens.astype(dtype), rows.astype(dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # another process opens the cache by itself, and asks `over` its reader


class ListedLengths:
    """As `ExampleLengths`, of a text whose lengths are in memory."""

    few = True

    def __init__(self, tokens: np.ndarray, rows: np.ndarray) -> None:
        self.tokens, self.rows = tokens, rows

    def __len__(self) -> int:
        return len(self.tokens)

    def of(self, examples: np.ndarray) -> Lengths:
        """As `ExampleLengths.of`."""
        return self.tokens[examples], self.rows[examples]

    def batches(self) -> Iterator[Lengths]:
        """As `ExampleLengths.batches`."""
        yield self.tokens, self.rows

    def between(self, first: int, stop: int) -> Lengths:
        """As `ExampleLengths.between`."""
        return self.tokens[first:stop], self.rows[first:stop]

    def over(self, reader: Reader) -> ListedLengths:
        """The same."""
        return self
