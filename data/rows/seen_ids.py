"""`SeenIds`: notices an id that occurs twice among ids that come one after another, in 16 bytes for each.

Ids are kept as digests of 128 bits, in sorted arrays of which each is at least twice as long as the next: a set of Python texts
would take about 120 bytes for an id. Sources make ids that cannot repeat; only a column of ids has to be looked at.
"""

from __future__ import annotations

import hashlib

import numpy as np

RECENT = 65_536
"""Ids that are held one by one, before they become an array."""


class SeenIds:
    """The ids so far."""

    def __init__(self, recent: int = RECENT) -> None:
        self._most, self._recent, self._runs = recent, dict[bytes, str](), list[np.ndarray]()

    def add(self, name: str) -> str | None:
        """Remember an id. Returns an id that has occurred twice, if one is known; it may be one of the last `RECENT`."""
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in self._recent:
            return name
        self._recent[digest] = name
        return self.repeated() if len(self._recent) >= self._most else None

    def repeated(self) -> str | None:
        """An id that has occurred twice among all so far; None where every id is another one."""
        if not self._recent:
            return None
        recent = np.sort(np.array(list(self._recent), dtype="S16"))
        names, self._recent = self._recent, {}
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, recent), len(run) - 1)
            same = np.flatnonzero(run[places] == recent)
            if len(same):
                return names[recent[same[0]].ljust(16, b"\0")]
        self._runs.append(recent)
        while len(self._runs) > 1 and len(self._runs[-2]) < 2 * len(self._runs[-1]):
            self._runs.append(np.sort(np.concatenate([self._runs.pop(), self._runs.pop()])))
        return None
