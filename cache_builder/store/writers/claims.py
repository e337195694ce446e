"""Claims: which builder works on which shard. Any number of builders share one directory; a dead one's claim is taken over.

A builder claims a shard with the file `commits/.00003.claim`, created once (hard link), which names host and process. It
touches the file while it works. A claim is void when its process is dead (on this host) or nothing touched it for
`STALE_SECONDS` (on any host). A file lock would not do: it does not say who holds it, and not every shared file system keeps
locks across hosts. Claims only save work: if two builders make one shard all the same, the first commit stays
(`ShardWriter.write`).
"""

from __future__ import annotations

import time
from contextlib import suppress
from itertools import count
from pathlib import Path

from kd.common.files import holder, process_tag, publish_first

STALE_SECONDS = 15 * 60
"""A builder touches its claims with every batch. After this time without a touch it counts as dead."""
TOUCH_SECONDS = 5.0
"""Least time between two touches."""
_BUILDERS = count()


class Claims:
    """The claims of one builder on the shards of one cache."""

    def __init__(self, root: Path) -> None:
        self.folder = root / "commits"
        self.tag = f"{process_tag()}.{next(_BUILDERS)}"
        self._held: dict[int, Path] = {}
        self._touched = 0.0

    def take(self, index: int) -> str | None:
        """Claim shard `index`. Returns None when the claim is ours now, else who holds it, in words."""
        path = self.folder / f".{index:05d}.claim"
        self.folder.mkdir(parents=True, exist_ok=True)
        for _ in range(2):
            staged = path.with_name(f".{index:05d}.claim.{self.tag}.tmp")
            staged.write_text(self.tag, encoding="utf-8")
            if publish_first(staged, path):
                self._held[index] = path
                return None
            holder_name = holder_of(path)
            if holder_name is not None:
                return holder_name
            path.unlink(missing_ok=True)
        return "another builder, just now"

    def touch(self) -> None:
        """Show that this builder is alive: touch its claims, at most every `TOUCH_SECONDS`."""
        if time.monotonic() - self._touched > TOUCH_SECONDS:
            self._touched = time.monotonic()
            for path in list(self._held.values()):
                with suppress(FileNotFoundError):  # another builder took it over; the first commit stays
                    path.touch()

    def release(self, index: int) -> None:
        """Give up the claim on a shard, committed or not."""
        path = self._held.pop(index, None)
        if path is not None and _read(path) == self.tag:
            path.unlink(missing_ok=True)

    def release_all(self) -> None:
        """Give up all claims."""
        for index in list(self._held):
            self.release(index)


def holder_of(path: Path) -> str | None:
    """Who holds a claim, in words; None where the claim is void."""
    tag = _read(path)
    if tag is None:
        return None
    try:
        idle = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    alive, words = holder(tag.rpartition(".")[0])
    return None if alive is False or idle > STALE_SECONDS else words


def void_claims(root: Path) -> None:
    """Remove the claims that are void."""
    for path in (root / "commits").glob(".*.claim"):
        if holder_of(path) is None:
            path.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
