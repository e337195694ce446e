"""Which shards a reader is going to load, from the order in which batches will be read: so that they are fetched before.

As much of that order is looked at as names the next shards; nothing grows with the length of a run.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np


class Announced:
    """Batches that are going to be read in this order, and the shards they will load; thread-safe."""

    def __init__(
        self,
        batches: Iterable[Sequence[int]],
        shards_of: Callable[[Sequence[int]], np.ndarray],
        *,
        held: int,
        ahead: int,
    ) -> None:
        """Look as far ahead as names `ahead` shards.

        batches     example numbers of each batch
        shards_of   shard of each of some examples
        held        number of shards that the reader keeps in memory: they are loaded once
        """
        self._batches, self._shards_of = iter(batches), shards_of
        self._held, self._ahead = held, ahead
        self._memory: OrderedDict[int, None] = OrderedDict()
        """The shards that the reader will hold after the batches that were looked at."""
        self._waiting: deque[tuple[tuple[int, ...], list[int]]] = deque()
        """The batch that was read last, those after it, and the shards that each will load."""
        self._names: Counter[tuple[int, ...]] = Counter()
        """How often each of these batches waits: a run may read one again."""
        self._loads = 0
        """Number of shards that they will load."""
        self._lock = threading.Lock()
        self._look_ahead()

    def coming(self) -> list[int]:
        """The next shards to be loaded, in order."""
        with self._lock:
            return list(dict.fromkeys(shard for _, shards in self._waiting for shard in shards))[: self._ahead]

    def read(self, batch: Sequence[int]) -> bool:
        """Say that a batch is being read; True where other shards are coming now. A batch that was not announced is passed over."""
        name = tuple(int(example) for example in batch)
        with self._lock:
            if not self._names[name]:
                return False
            before = self._loads
            while self._waiting[0][0] != name:  # its own shards are still to be loaded
                passed, shards = self._waiting.popleft()
                self._names[passed] -= 1
                if not self._names[passed]:
                    del self._names[passed]
                self._loads -= len(shards)
            moved = self._loads < before
            self._look_ahead()
            return moved

    def _look_ahead(self) -> None:
        while self._loads < self._ahead and (batch := next(self._batches, None)) is not None:
            shards = []
            for shard in np.unique(self._shards_of(batch)).tolist():
                if shard not in self._memory:
                    shards.append(shard)
                self._memory[shard] = None
                self._memory.move_to_end(shard)
                if len(self._memory) > self._held:
                    self._memory.popitem(last=False)
            name = tuple(int(example) for example in batch)
            self._waiting.append((name, shards))
            self._names[name] += 1
            self._loads += len(shards)
