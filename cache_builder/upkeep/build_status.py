"""How far a build is, seen from outside: rows, speed, who holds which shard since when, and the expected end.

    status = build_status(Path("runs/cache"))

Nothing but the files of the cache is asked: commits with their times, and claims (`BuildTraces`). So it works for builders on any
machine that share the folder, and for a build that nobody continues. Of a build in an object store the traces come from there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd.cache_builder.store.cache_files import bytes_below
from kd.cache_builder.store.records.commits import commit_path, committed
from kd.cache_builder.store.records.manifest import CacheManifest, load_manifest
from kd.cache_builder.store.writers.claims import STALE_SECONDS, Claim, all_claims, clock_of

RECENT_COMMITS = 64
"""The speed is measured over at most so many of the last commits."""


@dataclass(frozen=True)
class Holder:
    """A builder at a shard."""

    shard: int
    builder: str
    """The builder, in words."""
    rows: int
    """Rows of the shard that it has scored."""
    shard_rows: int
    """Rows of the shard."""
    held_seconds: float | None
    """Time since it claimed the shard; None where the claim does not say."""
    touched_seconds: float
    """Time since it last showed that it is at work."""
    void: str | None
    """Why it does not count any more, in words; None where it is at work."""


@dataclass(frozen=True)
class BuildStatus:
    """How far a build is."""

    state: str
    """`running`; `finished`; or `stopped`, where shards are left and no builder holds one."""
    rows: int
    """Rows that are committed."""
    rows_under_way: int
    """Rows that builders have scored of shards that are not committed."""
    rows_total: int
    shards: int
    """Shards that are committed."""
    shards_total: int
    bytes: int
    """Bytes on disk."""
    bytes_expected: int | None
    """Bytes of the finished cache, from those of the committed rows; None before the first commit."""
    rows_per_second: float | None
    """Speed of all builders together; None where none is at work, or it is not known yet."""
    measured_seconds: float | None
    """Time over which the speed was measured."""
    seconds_left: float | None
    """Expected time to the end."""
    last_commit_seconds: float | None
    """Time since the last commit; None before the first."""
    holders: tuple[Holder, ...]
    """Who holds which shard."""


@dataclass(frozen=True)
class BuildTraces:
    """What builders leave where they write."""

    manifest: CacheManifest
    done: Sequence[int]
    """The committed shards."""
    times: dict[int, float]
    """When shards were committed, by the clock of the place."""
    claims: Sequence[Claim]
    """Claims on shards of a cache that is not finished."""
    now: float | None
    """The time by the clock of the place; None where nothing is built."""
    bytes: int
    """Bytes of all files."""


def build_status(root: Path) -> BuildStatus:
    """The status of the build in a folder. Raises CacheError where no cache was begun there."""
    manifest = load_manifest(root)
    done = committed(root, len(manifest.shards))
    now = clock_of(root / "commits") if (root / "commits").is_dir() and not manifest.complete else None
    claims = [] if manifest.complete else all_claims(root)
    return status_of(BuildTraces(manifest, done, commit_times(root, done), claims, now, bytes_below(root)))


def status_of(traces: BuildTraces) -> BuildStatus:
    """The status of the build that left these traces."""
    manifest, done, times, now, size = traces.manifest, traces.done, traces.times, traces.now, traces.bytes
    sizes: list[int] = manifest.shards.rows.tolist()
    claims = [claim for claim in traces.claims if claim.shard < len(sizes)]
    holders = tuple(_holder(claim, sizes[claim.shard], now) for claim in claims if claim.shard not in times)
    live = [holder for holder in holders if holder.void is None]
    rows, under_way = sum(sizes[i] for i in done), sum(holder.rows for holder in live)
    speed, seconds = _speed(sizes, times, live, now) if live and now is not None else (None, None)
    return BuildStatus(
        state="finished" if manifest.complete else "running" if live else "stopped",
        rows=rows,
        rows_under_way=under_way,
        rows_total=sum(sizes),
        shards=len(done),
        shards_total=len(sizes),
        bytes=size,
        bytes_expected=round(size / rows * sum(sizes)) if rows else None,
        rows_per_second=speed,
        measured_seconds=seconds,
        seconds_left=(sum(sizes) - rows - under_way) / speed if speed else None,
        last_commit_seconds=max(0.0, (now or time.time()) - max(times.values())) if times else None,
        holders=holders,
    )


def commit_times(root: Path, done: Sequence[int]) -> dict[int, float]:
    """When each of these shards was committed, by the clock of the folder. One that is gone meanwhile is left out."""
    times = {}
    for index in done:
        try:
            times[index] = commit_path(root, index).lstat().st_mtime
        except FileNotFoundError:
            continue
    return times


def _holder(claim: Claim, shard_rows: int, now: float | None) -> Holder:
    held = None if claim.since is None or now is None else max(0.0, now - claim.since)
    rows = min(claim.rows, shard_rows)
    return Holder(claim.shard, claim.builder, rows, shard_rows, held, max(0.0, claim.idle_seconds), claim.void)


def _speed(
    sizes: Sequence[int], times: dict[int, float], live: Sequence[Holder], now: float
) -> tuple[float | None, float | None]:
    """Rows per second of all builders, and the seconds over which that was measured.

    Over the last commits without a long pause between them, with what is under way; while there are few of them, over the
    shards that are under way alone.
    """
    recent, oldest = list[int](), now
    for index, time_of_commit in sorted(times.items(), key=lambda item: -item[1])[:RECENT_COMMITS]:
        if oldest - time_of_commit > STALE_SECONDS:
            break
        recent.append(index)
        oldest = time_of_commit
    rates = [(h.rows / at, at) for h in live if h.held_seconds and (at := h.held_seconds - h.touched_seconds) > 0]
    if len(recent) > 2 * len(live) and now > oldest:  # the oldest commit begins the time
        rows = sum(sizes[i] for i in recent[:-1]) + sum(holder.rows for holder in live)
        return rows / (now - oldest), now - oldest
    rate = sum(rate for rate, _ in rates)
    return (rate, max(at for _, at in rates)) if rate else (None, None)
