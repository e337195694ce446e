"""Several batches of a teacher pass at once on a CPU, each on a thread of its own: a lane.

torch's own threads share every operation out, wait for the slowest at its end and spin until the next, where numpy's
passes between could use the processor; batches need nothing of each other (docs/log.md has what that is worth). What a
lane computes with one thread does not depend on how many lanes there are.

A model may be run by several threads as long as its forward pass leaves nothing behind in its modules. Some do (rotary
embeddings that grow with the text), and hooks may do anything: `leaves_no_trace` tries it, and such models get one lane.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
Own = TypeVar("Own")

TOKENS_IN_FLIGHT = 8192
"""Of all lanes at once: activations and attention of more would be memory that nobody expects."""


def lane_count(threads: int, tokens: int) -> int:
    """Lanes for so many threads, where one forward pass is of `tokens` tokens."""
    return max(1, min(threads, TOKENS_IN_FLIGHT // tokens))


class Lanes(Generic[Own]):
    """A context in which work runs on several threads, and torch's own threads are shared out among them.

    One lane is the calling thread itself. Leaving waits for what was started and gives torch its threads back.
    """

    def __init__(self, own: Sequence[Own]) -> None:
        """`own`: for every lane what it has to itself, memory to work in above all."""
        self.count = len(own)
        self._free: queue.SimpleQueue[Own] = queue.SimpleQueue()
        for item in own:
            self._free.put(item)
        self._pool: ThreadPoolExecutor | None = None
        self._threads = self._before = 0

    def __enter__(self) -> Lanes[Own]:
        if self.count > 1:
            self._before = torch.get_num_threads()
            self._threads = self._before // self.count
            torch.set_num_threads(self._threads)
            self._pool = ThreadPoolExecutor(self.count, "kd-lane")
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            torch.set_num_threads(self._before)

    def start(self, work: Callable[[Own], T]) -> Callable[[], T]:
        """Start `work(what the lane has to itself)`; a call of what comes back waits for its result.

        A single lane works here and now, and raises here.
        """
        if self._pool is None:
            result = self._work(work)
            return lambda: result

        def on_its_own() -> T:
            torch.set_num_threads(self._threads)  # a thread of Python's starts with a number of its own
            return self._work(work)

        return self._pool.submit(on_its_own).result

    def _work(self, work: Callable[[Own], T]) -> T:
        own = self._free.get()
        try:
            return work(own)
        finally:
            self._free.put(own)


def leaves_no_trace(modules: Iterable[Any], run: Callable[[], object]) -> bool:
    """Are the modules the same after `run()`: every attribute, and every tensor as often written to?

    No for what is no module, has hooks or a forward pass put in the place of its own: what those write to is not seen.
    """
    modules = list(modules)
    if not all(isinstance(m, torch.nn.Module) for m in modules):
        return False
    for module in (m for top in modules for m in top.modules()):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            return False
    before = _state(modules)
    run()
    after = _state(modules)
    return len(before) == len(after) and all(a is b and m == n for (a, m), (b, n) in zip(before, after, strict=True))


def _state(modules: Iterable[torch.nn.Module]) -> list[tuple[Any, int]]:
    """Every object that the modules hold and how often it was written to, where that is known.

    The objects themselves, so that none of them is freed and its place taken by another meanwhile.
    """
    found: list[tuple[Any, int]] = []
    for module in (m for top in modules for m in top.modules()):
        for value in vars(module).values():
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
            for part in (value, *inside):
                tracked = isinstance(part, torch.Tensor) and not part.is_inference()
                found.append((part, part._version if tracked else 0))
    return found
