"""Claims on the shards of a cache in an object store: one object each, put only where there is none.

They mean what `store.writers.claims` says of files, without locks: a claim is void when its builder's process is dead on this host,
or when nothing touched it for `STALE_SECONDS` by the store's own clock.
"""

from __future__ import annotations

import time
from itertools import count

from kd.cache_builder.build.object_store.s3_objects import S3Objects
from kd.cache_builder.store.writers.claims import MAX_CLAIM_BYTES, Claim, claim_of_text, claim_text
from kd.common.files import process_tag

TOUCH_SECONDS = 30.0
"""Least time between two touches: each is two requests."""
_BUILDERS = count()


class S3Claims:
    """The claims of one builder on the shards of one cache in an object store."""

    def __init__(self, objects: S3Objects, name: str = "") -> None:
        self.objects, self.name = objects, name
        self.tag = f"{process_tag()}.s3-{next(_BUILDERS)}"
        self._held: dict[int, float] = {}
        """Shard -> when it was claimed."""
        self._touched = 0.0

    def take(self, index: int) -> str | None:
        """Claim shard `index`. Returns None when the claim is ours now, else who holds it, in words."""
        for _ in range(2):
            since = time.time()
            if self.objects.put_first(claim_name(index), self._text(since)):
                self._held[index] = since
                return None
            other = read_s3_claim(self.objects, index)
            if other is not None and other.void is None:
                return other.builder
            if other is not None:
                self.objects.remove([claim_name(index)])
        return "another builder, just now"

    def _text(self, since: float, rows: int = 0) -> bytes:
        return claim_text(self.tag, self.name, since, rows).encode()

    def holds(self, index: int) -> bool:
        """Whether the claim on shard `index` is still ours; another builder may have taken it over."""
        data = self.objects.get(claim_name(index)) if index in self._held else None
        return data is not None and data.decode(errors="replace").partition("\n")[0] == self.tag

    def touch(self, index: int | None = None, rows: int = 0) -> None:
        """Show that this builder is alive: put its claims again, at most every `TOUCH_SECONDS`."""
        if time.monotonic() - self._touched > TOUCH_SECONDS:
            self._touched = time.monotonic()
            for held, since in list(self._held.items()):
                if self.holds(held):
                    self.objects.put(claim_name(held), self._text(since, rows if held == index else 0))

    def release(self, index: int) -> None:
        """Give up the claim on a shard, committed or not."""
        if index in self._held:
            if self.holds(index):
                self.objects.remove([claim_name(index)])
            del self._held[index]

    def release_all(self) -> None:
        """Give up all claims."""
        for index in list(self._held):
            self.release(index)


def claim_name(index: int) -> str:
    """Name of the claim on shard `index`."""
    return f"commits/.{index:05d}.claim"


def read_s3_claim(objects: S3Objects, index: int) -> Claim | None:
    """What a claim says, and whether it still counts. None where there is none."""
    age, data = objects.age(claim_name(index)), objects.get(claim_name(index))
    if age is None or data is None:
        return None
    return claim_of_text(index, data[:MAX_CLAIM_BYTES].decode(errors="replace"), age)


def all_s3_claims(objects: S3Objects) -> list[Claim]:
    """The claims on a cache's shards, by shard."""
    names = sorted(name for name in objects.sizes("commits/.") if name.endswith(".claim"))
    numbers = [int(digits) for name in names if (digits := name.split("/.")[1].partition(".")[0]).isdecimal()]
    return [claim for number in numbers if (claim := read_s3_claim(objects, number)) is not None]
