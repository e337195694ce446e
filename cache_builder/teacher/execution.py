"""How the batches of a teacher pass are run on its device: one after another, several at once, or one ahead.

    with execution.over(rows) as flight:
        flight.start(batch, work)
        batch, outcome = flight.finish(read)

On a CPU several batches are scored at once, each in a lane with its own sparsifier (`lanes`), as long as the model's forward
pass writes nothing into its modules (`module_traces`). Freed memory is kept for the next batch, and all lanes allocate from
one heap; for that the program calls `kd.common.memory.share_one_heap` before its first thread starts.

On a GPU nothing waits: results are copied to the host on a stream of their own (`host_copies`), and a batch is started before
the one before it is read, so that the chunks of at most two batches are held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from kd.cache_builder.teacher.batch_queue import Batch
from kd.cache_builder.teacher.host_copies import HostCopies
from kd.cache_builder.teacher.lanes import Lanes, lane_count
from kd.cache_builder.teacher.module_traces import leaves_no_trace
from kd.cache_builder.teacher.sparsify import Sparsifier
from kd.common.memory import keep_freed_memory
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.heads import LanguageModelHead

Started = TypeVar("Started")
Value = TypeVar("Value")


@dataclass(frozen=True)
class OutOfMemory:
    """A step that did not fit into memory."""

    message: str
    """First line of the device's message."""
    beside_others: bool = False
    """Whether other batches were running at the same time."""


class Flight(Generic[Started]):
    """Batches that were started and not read yet, oldest first."""

    def __init__(self, lanes: Lanes[Sparsifier], ahead: int) -> None:
        """`ahead`: batches to start before the first of them is read."""
        self.lanes = lanes
        self._ahead = ahead
        self._started: deque[tuple[Batch, bool, Callable[[], Started]]] = deque()

    def __bool__(self) -> bool:
        return bool(self._started)

    @property
    def has_room(self) -> bool:
        """Whether another batch should be started before the oldest is read."""
        return len(self._started) <= self._ahead

    def start(self, batch: Batch, work: Callable[[Sparsifier], Started]) -> OutOfMemory | None:
        """Start a batch. A lane on another thread reports a lack of memory when the batch is read."""
        result = unless_full(lambda: self.lanes.start(work))
        if isinstance(result, OutOfMemory):
            return result
        self._started.append((batch, self.lanes.count > 1 and self._ahead > 0, result))
        return None

    def finish(self, read: Callable[[Batch, Started], Value]) -> tuple[Batch, Value | OutOfMemory]:
        """Wait for the oldest batch and read it."""
        batch, beside_others, result = self._started.popleft()
        value = unless_full(lambda: read(batch, result()))
        return batch, OutOfMemory(value.message, beside_others) if isinstance(value, OutOfMemory) else value

    def one_at_a_time(self) -> None:
        """From here on, read every batch before the next is started."""
        self._ahead = 0


class Execution:
    """The device's way of running batches, and what it has found out about the model."""

    def __init__(self, head: LanguageModelHead, sparsifier: Sparsifier, token_budget: int) -> None:
        """`token_budget`: tokens of a batch, padding included."""
        self.head = head
        self.device = head.weight.device
        self.sparsifiers = [sparsifier]
        """One for each lane that was needed so far."""
        self.copies = HostCopies(self.device)
        self._token_budget = token_budget
        self._one_lane = self.device.type != "cpu"
        self._longest_tried = [0, 0, 0]
        """Longest context, target, and sum of both that the model was tried with, see `prepare`."""
        if self.device.type == "cpu":
            keep_freed_memory()

    @property
    def syncs(self) -> bool:
        """Whether a batch may wait for its device, so that ties and numbers that are not finite are seen to at once."""
        return self.copies.ahead == 0

    def prepare(self, rows: Sequence[TokenRows]) -> None:
        """Find out with the longest of `rows` whether several threads may run the model; does nothing for one thread.

        Call it with all rows of a build: the answer decides how sums are rounded, and a resumed build must not know less
        than one that was never stopped.
        """
        if self._one_lane or torch.get_num_threads() == 1:
            return
        sizes = np.array([(r.read_only, len(r.target_ids)) for r in rows])
        sizes = np.column_stack([sizes, sizes.sum(axis=1)])
        widest, lengths = [rows[i] for i in sizes.argmax(axis=0)], sizes.max(axis=0).tolist()
        if any(n > tried for n, tried in zip(lengths, self._longest_tried, strict=True)):
            self._longest_tried = [max(pair) for pair in zip(lengths, self._longest_tried, strict=True)]
            shortest = rows[int(sizes[:, 2].argmin())]
            self._one_lane = not self._stands_several([shortest, *sorted(widest, key=lambda row: len(row.input_ids))])

    @contextmanager
    def over(self, rows: Sequence[TokenRows]) -> Iterator[Flight[Any]]:
        """Run batches of `rows`. On a CPU torch has fewer threads of its own until the context is left."""
        with self.lanes(rows) as lanes:
            yield Flight(lanes, self.copies.ahead if lanes.count == 1 else lanes.count)

    def lanes(self, rows: Sequence[TokenRows]) -> Lanes[Sparsifier]:
        """As many lanes as threads and memory allow; one for a model that several threads must not run."""
        self.prepare(rows)
        count = 1
        if not self._one_lane:
            longest = max(r.read_only + len(r.target_ids) for r in rows)
            count = lane_count(torch.get_num_threads(), max(self._token_budget, longest))
        while len(self.sparsifiers) < count:
            self.sparsifiers.append(self.sparsifiers[0].twin())
        return Lanes(self.sparsifiers[:count])

    def release(self) -> None:
        """Give freed memory back to the device, so that a smaller batch fits."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _stands_several(self, rows: Sequence[TokenRows]) -> bool:
        """Whether running the model over `rows` leaves it as it was.

        The first row is short, which resets what has grown before; the last is the longest, so that what grows stays grown.
        """

        @torch.inference_mode()
        def run() -> None:
            for row in rows:
                hidden = self.head.scored_hidden([row.context_ids], [row.target_ids], [row.gaps])
            self.head.logits(hidden[:1])  # which may make another copy of its weight, once

        unchanged = unless_full(lambda: leaves_no_trace(self.head.bodies, run))
        return False if isinstance(unchanged, OutOfMemory) else unchanged


def unless_full(step: Callable[[], Value]) -> Value | OutOfMemory:
    """The step's value, or what the device said when its memory was full.

    An exception would hold, by its traceback, the tensors that have to be freed before a smaller batch is tried.
    """
    try:
        return step()
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        return OutOfMemory(str(error).splitlines()[0])


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in text or "can't allocate memory" in text
