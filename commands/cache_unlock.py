"""kd cache unlock: show which builders hold shards of a cache, and remove the claims of those that have ended."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from kd.commands.terminal.console import emit_json, say
from kd.commands.terminal.options import PATH, json_option

if TYPE_CHECKING:
    from kd.cache_builder.store.writers.claims import Claim


@click.command("unlock")
@click.argument("path", type=PATH)
@click.option("--force", is_flag=True, help="Remove the claims of builders too that may still be at work.")
@json_option
def cache_unlock(path: Path, force: bool, as_json: bool) -> None:
    """Show the claims of builders on a cache's shards, and remove those that nobody holds any more.

    A builder that has lost its claim publishes nothing, so --force costs at most the work on these shards.

    Example: kd cache unlock runs/cache
    """
    from kd.cache_builder.store.records.manifest import load_manifest
    from kd.cache_builder.store.writers.claims import all_claims, claim_path

    load_manifest(path)  # or this is no cache
    claims = all_claims(path)
    removed = [claim for claim in claims if force or claim.void is not None]
    for claim in removed:
        claim_path(path / "commits", claim.shard).unlink(missing_ok=True)
    if as_json:
        emit_json({"path": str(path), "claims": [asdict(c) | {"removed": c in removed} for c in claims]})
        return
    for claim in claims:
        say(claim_line(claim, claim in removed))
    say(f"{path}: {len(claims)} claims, {len(removed)} removed")


def claim_line(claim: Claim, removed: bool) -> str:
    """A claim in a line."""
    state = claim.void or f"held, touched {claim.idle_seconds:,.0f} seconds ago"
    return f"  shard {claim.shard}: {claim.builder}: {state}{'; removed' if removed else ''}"
