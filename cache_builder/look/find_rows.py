"""Find the rows of a cache that stand out, and the examples that hold a text: one pass over the shards.

Only the arrays that a question needs are read. The entropy needs the log-probabilities of the kept tokens and the mass beyond
them. The surprise needs neither. A search reads the table of the examples and no targets. Memory holds one shard at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np

from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.part import part_of
from kd.cache_builder.store.row_figures import entropy_bounds
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.common.progress import Progress

ROWS_AT_ONCE = 8192
"""Rows that are decoded together: in float64 a row of 64 tokens is half a kilobyte."""


@dataclass(frozen=True)
class FoundRow:
    """One row that stands out."""

    example: int
    token: int
    """Number of the row in its example."""
    nats: float
    """What it was found by: the lower bound of its entropy, or minus the log-probability of the token that is there."""


@dataclass(frozen=True)
class FoundText:
    """Examples that hold a text."""

    examples: tuple[int, ...]
    """The first of them, ascending."""
    total: int
    """How many there are."""


def uncertain_rows(reader: CacheReader, count: int) -> Iterator[Progress[list[FoundRow]]]:
    """The rows with the largest lower bound of the entropy; the last record carries them, the most uncertain first.

    Raises CacheError where this copy does not hold the arrays.
    """
    manifest = reader.manifest
    head = ["logprobs"] if manifest.targets.top_k else ["log_z"]
    size = manifest.vocabulary_size
    return _largest(reader, count, head, lambda targets: entropy_bounds(targets, size)[0])


def surprising_rows(reader: CacheReader, count: int) -> Iterator[Progress[list[FoundRow]]]:
    """The rows whose own token had the least probability; the last record carries them, the least probable first.

    Where the log-probability is an upper bound, the bound counts.
    """
    return _largest(reader, count, [], lambda targets: -targets.gold_logprob.astype(np.float64))


@dataclass(frozen=True)
class RowBlock:
    """The rows of consecutive examples."""

    first_example: int
    starts: np.ndarray
    """`[E]` the first row of each example, counted from the block's first row."""
    targets: SoftTargets


def blocks_of_rows(reader: CacheReader, arrays: Collection[str]) -> Iterator[RowBlock]:
    """All rows that are here, in order, with these arrays and those that every reader needs."""
    second = CacheReader(reader.files, top_k=reader.top_k, window=1)
    second.keep(part_of(reader.manifest, arrays=arrays).arrays)
    for shard in second.shards:
        ends, first = np.array(second.shard(shard).examples["row_end"]), second.manifest.shards[shard][0]
        start = 0
        while start < len(ends):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + ROWS_AT_ONCE, side="right")))
            starts = np.concatenate([[0], ends[start : stop - 1] - before])
            yield RowBlock(first + start, starts, second.read_rows(range(first + start, first + stop)))
            start = stop


def _largest(
    reader: CacheReader, count: int, arrays: Collection[str], figure: Callable[[SoftTargets], np.ndarray]
) -> Iterator[Progress[list[FoundRow]]]:
    total = sum(reader.manifest.shards[shard][2] for shard in reader.shards)
    best, done = list[FoundRow](), 0
    yield Progress(0, total)
    for block in blocks_of_rows(reader, arrays):
        values = figure(block.targets)
        rows = np.argsort(-values, kind="stable")[:count]
        indices = np.searchsorted(block.starts, rows, side="right") - 1
        candidates = [
            FoundRow(block.first_example + int(index), int(row - block.starts[index]), float(values[row]))
            for row, index in zip(rows, indices, strict=True)
        ]
        # the sort is stable: of equal rows the first comes first
        best = sorted([*best, *candidates], key=lambda one: -one.nats)[:count]
        done += len(block.targets)
        yield Progress(done, total)
    yield Progress(total, total, best)


def examples_with(reader: CacheReader, text: str, limit: int) -> Iterator[Progress[FoundText]]:
    """The examples whose prompt or target holds `text`, in any case of letters; the last record carries them."""
    wanted, total = text.casefold(), len(reader.shards)
    first, count = list[int](), 0
    yield Progress(0, total)
    for done, shard in enumerate(reader.shards, 1):
        table = reader.example_table(shard, ["prompt", "target"])
        for number, texts in enumerate(zip(table["prompt"], table["target"], strict=True)):
            if any(wanted in one.casefold() for one in texts):
                count += 1
                if len(first) < limit:
                    first.append(reader.manifest.shards[shard][0] + number)
        yield Progress(done, total)
    yield Progress(total, total, FoundText(tuple(first), count))
