"""Several batches of a teacher pass at once on a CPU, each on a thread of its own: a lane.

torch's own threads share every operation out, wait for the slowest at its end and spin until the next, where numpy's
passes between could use the processor; batches need nothing of each other (docs/log.md has what that is worth). What a
lane computes with one thread does not depend on how many lanes there are.

A model may be run by several threads as long as its forward pass writes nothing into its modules. Some do (rotary
embeddings that grow with the text), and hooks may do anything: `leaves_no_trace` tries it, and such models get one lane.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import FunctionType, MethodType, ModuleType
from typing import Any, Generic, TypeVar

import torch

T = TypeVar("T")
Own = TypeVar("Own")

TOKENS_IN_FLIGHT = 8192
"""Of all lanes at once: activations and attention of more would be memory that nobody expects."""
DEPTH = 3
"""How far into objects that modules hold `leaves_no_trace` looks."""


def lane_count(threads: int, tokens: int) -> int:
    """Lanes for so many threads, where one forward pass is of `tokens` tokens."""
    return max(1, min(threads, TOKENS_IN_FLIGHT // tokens))


class _Threads:
    """torch's own threads, lent out: whoever comes last gives back what the first one found."""

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
        self._each = 0

    def __enter__(self) -> Lanes[Own]:
        if self.count > 1:
            self._each = _threads.borrow(self.count)
            self._pool = ThreadPoolExecutor(self.count, "kd-lane")
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None
            _threads.give_back()

    def start(self, work: Callable[[Own], T]) -> Callable[[], T]:
        """Start `work(what the lane has to itself)`; a call of what comes back waits for its result.

        A single lane works here and now, and raises here.
        """
        if self._pool is None:
            result = self._work(work)
            return lambda: result

        def on_its_own() -> T:
            torch.set_num_threads(self._each)  # a thread of Python's starts with a number of its own
            try:
                return self._work(work)
            except BaseException as error:
                # until somebody asks, or what ran out of memory would keep what it has
                traceback.clear_frames(error.__traceback__)
                raise

        return self._pool.submit(on_its_own).result

    def _work(self, work: Callable[[Own], T]) -> T:
        own = self._free.get()
        try:
            return work(own)
        finally:
            self._free.put(own)


def leaves_no_trace(modules: Iterable[Any], run: Callable[[], object]) -> bool:
    """Whether `run()` writes nothing into the modules: no attribute is set, not even to what it was; no tensor is written to.

    No for what is no module, for hooks, and for a forward pass put in the place of a module's own: what those write to is
    not seen. Neither is what lies deeper than DEPTH in objects that modules hold, or a tensor that was made in inference
    mode. Nothing else may run meanwhile.
    """
    tops = list(modules)
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return False
    if not all(isinstance(m, torch.nn.Module) for m in tops):
        return False
    every = list(dict.fromkeys(m for top in tops for m in top.modules()))
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in every):
        return False
    before = _state(every)
    with _written(every) as written:
        run()
    after = _state(every)
    same = len(before) == len(after) and all(a is b and m == n for (a, m), (b, n) in zip(before, after, strict=True))
    return same and not written


@contextmanager
def _written(modules: Iterable[torch.nn.Module]) -> Iterator[list[str]]:
    """The names of attributes that are set meanwhile, in order."""
    own, names, plain = set(map(id, modules)), list[str](), torch.nn.Module.__setattr__

    def watched(self: torch.nn.Module, name: str, value: Any) -> None:
        if id(self) in own:
            names.append(name)
        plain(self, name, value)

    torch.nn.Module.__setattr__ = watched  # type: ignore[method-assign]
    try:
        yield names
    finally:
        torch.nn.Module.__setattr__ = plain  # type: ignore[method-assign]


def _state(modules: Iterable[torch.nn.Module]) -> list[tuple[Any, int]]:
    """Every object that the modules hold and how often it was written to, where that is known.

    The objects themselves, so that none of them is freed and its place taken by another meanwhile.
    """
    seen: set[int] = set()
    return [found for m in modules for value in vars(m).values() for found in _inside(value, DEPTH, seen)]


def _inside(value: Any, depth: int, seen: set[int]) -> Iterator[tuple[Any, int]]:
    tracked = isinstance(value, torch.Tensor) and not value.is_inference()
    yield value, value._version if tracked else 0
    if (
        depth == 0
        or id(value) in seen
        or isinstance(value, torch.nn.Module | type | FunctionType | MethodType | ModuleType)
    ):
        return
    held: Iterable[Any] = vars(value).values() if hasattr(value, "__dict__") else ()
    if isinstance(value, dict):
        held = [*value.values(), *held]
    elif isinstance(value, list | tuple | set | frozenset | deque):
        held = [*value, *held]
    else:
        held = list(held)
    if held:
        seen.add(id(value))
    for part in held:
        yield from _inside(part, depth - 1, seen)
