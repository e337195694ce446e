"""`CommitTable`: the digest of every commit of a finished cache, and how large each shard's files are, as columns of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kd.common.errors import CacheError

DIGEST_BYTES = 32
"""Bytes of a SHA-256."""


class CommitTable:
    """Per shard the SHA-256 of its commit, in hex where one is asked for, and from format version 3 on the bytes of its files."""

    def __init__(self, digests: np.ndarray, stored: Mapping[str, np.ndarray]) -> None:
        """The table of shards with these digests, `[S, 32]` uint8."""
        if digests.ndim != 2 or digests.shape[1] != DIGEST_BYTES:
            raise ValueError(f"digests of {digests.shape}")
        self.digests = digests
        self.stored = dict(stored)
        """Array name (or `examples`, `commit`) -> `[S]` int64 size of each shard's file in bytes; empty before format version 3."""

    @classmethod
    def from_hex(cls, digests: Iterable[Any], stored: Mapping[str, np.ndarray] | None = None) -> CommitTable:
        """The table of these digests. Raises CacheError for what is no SHA-256."""
        try:
            data = b"".join(_digest(text) for text in digests)
        except (TypeError, ValueError) as error:
            raise CacheError("a digest of a commit is no SHA-256", found=str(error)[:80]) from error
        return cls(np.frombuffer(data, dtype=np.uint8).reshape(-1, DIGEST_BYTES), stored or {})

    @classmethod
    def none(cls) -> CommitTable:
        """The table of a build that is not finished."""
        return cls.from_hex(())

    @classmethod
    def joined(cls, tables: Sequence[CommitTable]) -> CommitTable:
        """The digests of several tables, one table after another, without sizes."""
        return cls(np.concatenate([t.digests for t in tables]), {})

    def totals(self) -> dict[str, int]:
        """Bytes of all shards, by array; empty before format version 3."""
        return {name: int(sizes.sum()) for name, sizes in self.stored.items()}

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, index: int) -> str:
        return bytes(self.digests[index]).hex()

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, CommitTable):
            return NotImplemented
        same = self.stored.keys() == other.stored.keys() and np.array_equal(self.digests, other.digests)
        return same and all(np.array_equal(sizes, other.stored[name]) for name, sizes in self.stored.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"CommitTable({len(self)} shards)"


def _digest(text: Any) -> bytes:
    data = bytes.fromhex(text)
    if len(data) != DIGEST_BYTES:
        raise ValueError(repr(text)[:80])
    return data
