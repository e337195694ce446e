"""kd cache status: how far a build is, and who holds which shard. kd cache unlock: remove claims of builders that have ended."""

from __future__ import annotations

import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kd.commands.terminal.console import emit_json, say
from kd.commands.terminal.options import PLACE, json_option
from kd.common.paths import StoreAddress

if TYPE_CHECKING:
    from kd.cache_builder.store.writers.claims import Claim
    from kd.cache_builder.upkeep.build_status import BuildStatus, Holder

STATES = {
    "running": "running",
    "finished": "finished",
    "stopped": "stopped: no builder holds a shard. The same kd cache build command continues",
}


@click.command("status")
@click.argument("path", type=PLACE, metavar="FOLDER|s3://BUCKET/PATH")
@click.option(
    "--watch", type=click.FloatRange(min=0.1), metavar="SECONDS", help="Show it again so often while it runs."
)
@json_option
def cache_status(path: Path | StoreAddress, watch: float | None, as_json: bool) -> None:
    """Show how far a build is: rows, speed, who holds which shard since when, and the expected end.

    It reads the folder or the store alone, so it can be run on any machine that sees it, also for a build that is finished or
    stopped.

    Example: kd cache status runs/cache
    """
    while True:
        status = status_at(path)
        if as_json:
            emit_json({"path": str(path)} | asdict(status))
        else:
            for line in status_lines(path, status, datetime.now()):
                say(line)
        if watch is None or status.state != "running":
            return
        time.sleep(watch)


def status_at(path: Path | StoreAddress) -> BuildStatus:
    """The status of the build in a folder or an object store."""
    if isinstance(path, StoreAddress):
        from kd.cache_builder.build.object_store.s3_traces import s3_build_status

        return s3_build_status(path)
    from kd.cache_builder.upkeep.build_status import build_status

    return build_status(path)


def status_lines(path: Path | StoreAddress, status: BuildStatus, now: datetime) -> list[str]:
    """The status for people. `now` is the time at which it was taken."""
    share = 100 * (status.rows + status.rows_under_way) / max(status.rows_total, 1)
    under_way = f" and {status.rows_under_way:,} under way" if status.rows_under_way else ""
    facts = {
        "rows": f"{status.rows:,}{under_way} of {status.rows_total:,} ({share:.1f} %)",
        "shards": f"{status.shards:,} of {status.shards_total:,}",
        "size": f"{status.bytes:,} bytes",
    }
    if status.state != "finished" and status.bytes_expected is not None:
        facts["size"] += f", {status.bytes_expected:,} expected"
    if status.state == "running":
        facts["speed"] = "not known yet"
        if status.rows_per_second is not None and status.measured_seconds is not None:
            facts["speed"] = f"{status.rows_per_second:,.0f} rows/s over the last {span(status.measured_seconds)}"
        facts["expected end"] = "not known yet"
        if status.seconds_left is not None:
            end = datetime.fromtimestamp(now.timestamp() + status.seconds_left)
            facts["expected end"] = f"{end:%Y-%m-%d %H:%M}, in {span(status.seconds_left)}"
    if status.last_commit_seconds is not None:
        facts["last commit"] = f"{span(status.last_commit_seconds)} ago"
    lines = [f"{path}: {STATES[status.state]}", *(f"  {name:<14}{text}" for name, text in facts.items())]
    return [*lines, *map(holder_line, status.holders)]


def holder_line(holder: Holder) -> str:
    """A builder in a line."""
    held = "" if holder.held_seconds is None else f", for {span(holder.held_seconds)}"
    state = f"void: {holder.void}" if holder.void else f"touched {span(holder.touched_seconds)} ago"
    return f"  shard {holder.shard}: {holder.builder}, {holder.rows:,} of {holder.shard_rows:,} rows{held}, {state}"


def span(seconds: float) -> str:
    """A time in the two largest units that it has: `3 h 5 min`."""
    whole = round(seconds)
    for name, size, smaller, unit in (("d", 86400, 3600, "h"), ("h", 3600, 60, "min"), ("min", 60, 1, "s")):
        if whole >= size:
            return f"{whole // size:,} {name} {whole % size // smaller} {unit}"
    return f"{whole} s"


@click.command("unlock")
@click.argument("path", type=PLACE, metavar="FOLDER|s3://BUCKET/PATH")
@click.option("--force", is_flag=True, help="Remove the claims of builders too that may still be at work.")
@json_option
def cache_unlock(path: Path | StoreAddress, force: bool, as_json: bool) -> None:
    """Show the claims of builders on a cache's shards, and remove those that nobody holds any more.

    A builder that has lost its claim publishes nothing, so --force costs at most the work on these shards.

    Example: kd cache unlock runs/cache
    """
    claims, removed = remove_claims_at(path, force=force)
    if as_json:
        emit_json({"path": str(path), "claims": [asdict(c) | {"removed": c in removed} for c in claims]})
        return
    for claim in claims:
        say(claim_line(claim, claim in removed))
    say(f"{path}: {len(claims)} claims, {len(removed)} removed")


def remove_claims_at(path: Path | StoreAddress, *, force: bool) -> tuple[list[Claim], list[Claim]]:
    """The claims of builders in a folder or an object store, and those that were removed."""
    if isinstance(path, StoreAddress):
        from kd.cache_builder.build.object_store.s3_traces import remove_s3_claims

        return remove_s3_claims(path, force=force)
    from kd.cache_builder.store.records.manifest import load_manifest
    from kd.cache_builder.store.writers.claims import all_claims, claim_path

    load_manifest(path)  # or this is no cache
    claims = all_claims(path)
    removed = [claim for claim in claims if force or claim.void is not None]
    for claim in removed:
        claim_path(path / "commits", claim.shard).unlink(missing_ok=True)
    return claims, removed


def claim_line(claim: Claim, removed: bool) -> str:
    """A claim in a line."""
    state = claim.void or f"held, touched {claim.idle_seconds:,.0f} seconds ago"
    return f"  shard {claim.shard}: {claim.builder}: {state}{'; removed' if removed else ''}"
