"""One shard from the teacher's numbers to its commit: encode, write, release the claim. Runs beside the forward pass.

The thread finishes the shard it is at when a build is interrupted: zarr writes in threads of its own, which a signal would
leave at work in a folder that is being removed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from kd.cache_builder.build.plan import BuildPlan
from kd.cache_builder.store.encoding import codecs
from kd.cache_builder.store.encoding.arrays import Arrays
from kd.cache_builder.store.example_table import GAP_COLUMNS
from kd.cache_builder.store.lengths import Lengths
from kd.cache_builder.store.targets import RawTargets
from kd.cache_builder.store.vocabulary import tokens_digest
from kd.cache_builder.store.writers.claims import Claims
from kd.cache_builder.store.writers.shard_writer import ShardWriter
from kd.common.files import write_error
from kd.data.tokenizing.token_rows import TokenRows

LENGTHS_AT_ONCE = 2**16
"""Examples whose lengths are handed on together."""


class WriterThread:
    """Encodes and commits one shard while the teacher scores the next."""

    def __init__(self, plan: BuildPlan, writer: ShardWriter, pool: ThreadPoolExecutor, claims: Claims) -> None:
        self.seconds = {"encode": 0.0, "write": 0.0, "wait": 0.0}
        """Time spent encoding and writing, and time the teacher had to wait for that."""
        self._plan, self._writer, self._pool, self._claims = plan, writer, pool, claims
        self._pending: tuple[int, Future[bool]] | None = None
        self.lost: list[int] = []
        """Shards that were not committed, because another builder has taken over their claims."""

    def check(self) -> None:
        """Raise what the thread has failed with, if it has."""
        if self._pending is not None and self._pending[1].done():
            self._pending[1].result()

    def wait(self) -> int:
        """Wait until the shard being written is committed; returns the number of shards committed, 0 or 1."""
        if self._pending is None:
            return 0
        started = time.perf_counter()
        index, future = self._pending
        committed = future.result()
        self.seconds["wait"] += time.perf_counter() - started
        self._pending = None
        if not committed:
            self.lost.append(index)
        return int(committed)

    def submit(self, index: int, rows: list[TokenRows], raw: RawTargets) -> None:
        """Encode and commit shard `index` in the background. The shard before it must have been waited for."""
        assert self._pending is None
        self._pending = (
            index,
            self._pool.submit(write_shard, self._writer, index, rows, raw, self._plan, self.seconds, self._claims),
        )

    def copy(self, index: int, rows: list[TokenRows], stored: Arrays, quality: dict[str, float]) -> int:
        """Commit shard `index` with arrays that are encoded already; returns as `wait` does."""
        assert self._pending is None
        self._pending = (
            index,
            self._pool.submit(
                commit_shard, self._writer, index, rows, stored, quality, self._plan, self.seconds, self._claims
            ),
        )
        return self.wait()


def write_shard(
    writer: ShardWriter,
    index: int,
    rows: Sequence[TokenRows],
    raw: RawTargets,
    plan: BuildPlan,
    seconds: dict[str, float],
    claims: Claims,
) -> bool:
    """Encode and commit one shard, as `commit_shard`; adds the time it took to `seconds`."""
    started = time.perf_counter()
    stored, quality = codecs.encode(raw, plan.manifest.targets, vocabulary_size=plan.manifest.vocabulary_size)
    seconds["encode"] += time.perf_counter() - started
    return commit_shard(writer, index, rows, stored, quality, plan, seconds, claims)


def commit_shard(
    writer: ShardWriter,
    index: int,
    rows: Sequence[TokenRows],
    stored: Arrays,
    quality: dict[str, float],
    plan: BuildPlan,
    seconds: dict[str, float],
    claims: Claims,
) -> bool:
    """Write one shard's arrays and examples, commit it and release its claim. Raises CacheError.

    Returns False where the claim was lost to another builder, which has not committed the shard yet: then nothing is published.
    """
    started = time.perf_counter()
    try:
        examples = example_rows(rows)
        committed = writer.write(index, stored, examples, quality, ours=lambda: claims.holds(index))
    except OSError as error:
        raise write_error(writer.root, error) from error
    claims.release(index)
    seconds["write"] += time.perf_counter() - started
    return committed


def lengths_of(rows: Sequence[TokenRows]) -> Iterator[Lengths]:
    """Tokens and rows of every example of a plan, as `ShardWriter.create` takes them."""
    for first in range(0, len(rows), LENGTHS_AT_ONCE):
        batch = rows[first : first + LENGTHS_AT_ONCE]
        scored = np.array([len(row.target_ids) for row in batch], dtype=np.int32)
        yield np.array([row.read_only for row in batch], dtype=np.int32) + scored, scored


def example_rows(rows: Sequence[TokenRows]) -> list[dict[str, Any]]:
    """The table of a shard's examples, see `example_table`."""
    examples = []
    for row in rows:
        columns: dict[str, Any] = {
            "id": row.example.id,
            "task": row.example.task,
            "split": row.example.split,
            "prompt": row.example.prompt,
            "target": row.example.target,
            "context_ids": row.context_ids,
            "rows": len(row.target_ids),
            "tokens_digest": tokens_digest(row.context_ids, row.target_ids, row.gaps),
        }
        if row.example.conversation is not None:
            columns |= {name: getattr(row.gaps, field) for name, field in GAP_COLUMNS.items()}
            columns |= {"ended": list(row.ended), "messages": list(row.messages)}
            columns |= {"conversation": row.example.conversation.to_json()}
        examples.append(columns)
    return examples
