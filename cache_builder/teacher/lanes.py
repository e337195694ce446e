"""Several batches at once on a CPU, each on a thread of its own: a lane.

torch's own threads share every operation, wait for the slowest at its end, and spin until the next one, while numpy's passes
in between could use the processor. Batches need nothing of each other (docs/log.md has what lanes are worth). What a lane
computes with one thread does not depend on the number of lanes. Which models may have several lanes, and how many:
`execution`.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

T = TypeVar("T")
Resource = TypeVar("Resource")

TOKENS_IN_FLIGHT = 8192
"""Most tokens of all lanes together: the activations and attention of more would take memory that nobody expects."""


def lane_count(threads: int, tokens: int) -> int:
    """Number of lanes for so many threads, where one forward pass has `tokens` tokens."""
    return max(1, min(threads, TOKENS_IN_FLIGHT // tokens))


class _Threads:
    """torch's own threads, lent to one or more users: the last one to leave restores the number that the first one found."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._borrowers = self._whole = 0

    def borrow(self, lanes: int) -> int:
        """Threads for each lane."""
        with self._lock:
            before = torch.get_num_threads()
            if not self._borrowers:
                self._whole = before
            self._borrowers += 1
            each = max(1, before // lanes)
            torch.set_num_threads(each)
            return each

    def give_back(self) -> None:
        with self._lock:
            self._borrowers -= 1
            if not self._borrowers:
                torch.set_num_threads(self._whole)


_threads = _Threads()


class Lanes(Generic[Resource]):
    """A context in which work runs on several threads, and torch's own threads are divided among them.

    A single lane is the calling thread itself. Leaving waits for what was started and restores torch's threads.
    """

    def __init__(self, resources: Sequence[Resource]) -> None:
        """`resources`: for each lane an object that no other lane uses, such as its working memory."""
        self.count = len(resources)
        self._free: queue.SimpleQueue[Resource] = queue.SimpleQueue()
        for item in resources:
            self._free.put(item)
        self._pool: ThreadPoolExecutor | None = None
        self._each = 0

    def __enter__(self) -> Lanes[Resource]:
        if self.count > 1:
            self._each = _threads.borrow(self.count)
            self._pool = ThreadPoolExecutor(self.count, "kd-lane")
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            _threads.give_back()

    def start(self, work: Callable[[Resource], T]) -> Callable[[], T]:
        """Start `work(resource of the lane)`; calling the returned function waits for the result.

        A single lane does the work before it returns, and raises here.
        """
        if self._pool is None:
            result = self._work(work)
            return lambda: result

        def on_its_own() -> T:
            torch.set_num_threads(self._each)  # a thread of Python's starts with a number of its own
            try:
                return self._work(work)
            except BaseException as error:
                # otherwise the tensors of work that ran out of memory would live until the result is asked for
                traceback.clear_frames(error.__traceback__)
                raise

        return self._pool.submit(on_its_own).result

    def _work(self, work: Callable[[Resource], T]) -> T:
        resource = self._free.get()
        try:
            return work(resource)
        finally:
            self._free.put(resource)
