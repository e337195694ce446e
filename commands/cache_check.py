"""kd cache verify and repair: find damage, and mend it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd.commands.console import emit_json, follow
from kd.commands.options import PATH, json_option

if TYPE_CHECKING:
    from kd.cache_builder.store.manifest import CacheManifest
    from kd.cache_builder.upkeep.verify import Finding


@click.command("verify")
@click.argument("path", metavar="PATH_OR_URL")
@click.option(
    "--checksums", is_flag=True, help="Compare bytes with their digests and decode nothing: as fast as SHA-256."
)
@json_option
def cache_verify(path: str, checksums: bool, as_json: bool) -> None:
    """Check every checksum and promise; name the damaged shard, array and rows. Exit code 3 on damage, 1 where shards are missing.

    Example: kd cache verify runs/cache
    """
    from kd.cache_builder.opening import open_files
    from kd.cache_builder.store.manifest import load_manifest
    from kd.cache_builder.store.part import load_part
    from kd.cache_builder.upkeep.verify import verify
    from kd.common.errors import CacheError

    files = open_files(path)
    manifest = load_manifest(files.root)
    part = load_part(files.root, manifest)
    steps = verify(files, promises=not checksums)
    last = follow("verifying", steps, lambda p: (p.bytes_done, p.bytes_total, f"{len(p.findings)} findings"))
    findings = [asdict(f) for f in last.findings]
    if as_json:
        emit_json(
            {
                "path": path,
                "bytes": last.bytes_total,
                "sound": not findings,
                "complete": manifest.complete,
                "findings": findings,
            }
            | ({} if part is None else {"part": {"shards": len(part.shards), "arrays": list(part.arrays)}})
        )
    else:
        if part is not None:
            click.echo(f"{path}: a part of a cache, {len(part.shards)} shards of arrays {', '.join(part.arrays)}")
        print_findings(path, last.findings)
        click.echo(f"{last.bytes_total:,} bytes checked")
    if findings:
        sys.exit(3)
    if not manifest.complete:
        total, done = len(manifest.shards), len(files.committed(len(manifest.shards)))
        raise CacheError(
            "what is here is sound, but this cache is not complete",
            where=path,
            found=f"{done} of {total} shards",
            try_="run its kd cache build command again: it continues",
        )


@click.command("repair")
@click.argument("path", type=PATH)
@click.option(
    "--from",
    "place",
    metavar="COPY",
    help="A second copy, a folder or a URL: damaged files are taken from it.",
)
@click.option("--teacher", help="Where the same teacher is now, if not where the build found it.")
@click.option("--data", "spec", help="Where the same text is now.")
@click.option("--task-root", type=PATH, help="Tasks: where the same local files are now.")
@click.option("--device", help="auto, cpu or cuda; the build's own by default.")
@json_option
def cache_repair(path: Path, place: str | None, as_json: bool, **moved: Any) -> None:
    """Mend a damaged cache: from a second copy, else by building the damaged shards again, and nothing else.

    Without --from the teacher runs over the damaged shards, with the options the cache was built with (they are recorded in it).
    Exit code 3 when damage is left.

    Example: kd cache repair runs/cache
    """
    from kd.cache_builder.build.build_settings import BuildSettings
    from kd.cache_builder.opening import open_files
    from kd.cache_builder.store.commits import committed
    from kd.cache_builder.store.manifest import load_manifest
    from kd.cache_builder.upkeep.repair import mend, mend_manifest, reopen
    from kd.commands.cache import build_behind_a_bar
    from kd.common.errors import CacheDamageError
    from kd.common.settings import make

    mended: list[str] = []
    copy = None if place is None else open_files(place)
    if copy is not None:
        theirs = load_manifest(copy.root)  # no cache there: said before anything is looked at
        if mend_manifest(path, copy):
            mended.append("manifest.json")
        require_copy(load_manifest(path), theirs, path, place)
    before, findings = load_manifest(path), verified(path)
    if copy is not None and findings:
        done = follow("mending", mend(path, copy, findings), lambda p: (p.done, p.total, f"{len(p.mended)} files"))
        mended += done.mended
        findings = verified(path)
    rebuilt: list[int] = []
    broken = [f for f in findings if f.shard is not None or f.where in before.files]
    if copy is None and (broken or not before.complete):
        reopen(path, broken)
        rebuilt = sorted(set(range(len(before.shards))) - set(committed(path, len(before.shards))))
        recorded = before.provenance.get("options")
        if not isinstance(recorded, dict):
            raise CacheDamageError(
                "the damaged shards were given up, and what they were built with is not recorded",
                where=path,
                found=f"shards {', '.join(map(str, rebuilt)) or 'none'}",
                try_="its kd cache build command: it builds these alone",
            )
        given = {name: str(value) for name, value in moved.items() if value is not None}
        build_behind_a_bar(make(BuildSettings, recorded | given | {"out": path}, where=path))
        findings = verified(path)
    same = load_manifest(path) == before
    if as_json:
        emit_json(
            {
                "path": str(path),
                "mended": mended,
                "rebuilt_shards": rebuilt,
                "byte_identical": same,
                "sound": not findings,
                "findings": [asdict(f) for f in findings],
            }
        )
    else:
        for name in mended:
            click.echo(f"{name}: taken from {place}")
        if rebuilt:
            bytes_are = (
                "the same bytes"
                if same
                else "in other bytes: another machine or other versions; these are committed now"
            )
            click.echo(f"shards {', '.join(map(str, rebuilt))}: built again, {bytes_are}")
        print_findings(path, findings)
    if findings:
        sys.exit(3)


def require_copy(ours: CacheManifest, theirs: CacheManifest, path: Path, place: str | None) -> None:
    """Raise CacheMismatchError where the second copy is of another cache."""
    from kd.common.errors import CacheMismatchError

    if ours.fingerprint != theirs.fingerprint:
        raise CacheMismatchError(
            "the copy is of another cache", cache=path, copy=place, found=theirs.fingerprint, expected=ours.fingerprint
        )


def verified(path: Path) -> tuple[Finding, ...]:
    """Drive a verification and its progress bar to the end."""
    from kd.cache_builder.upkeep.verify import verify

    return follow(
        "verifying", verify(path), lambda p: (p.bytes_done, p.bytes_total, f"{len(p.findings)} findings")
    ).findings


def print_findings(path: Path | str, findings: Sequence[Finding]) -> None:
    """A line for each, and the verdict."""
    for finding in findings:
        place = [
            f"shard {finding.shard}" if finding.shard is not None else "",
            finding.array or "",
            f"rows {finding.rows}" if finding.rows else "",
        ]
        click.echo(f"{finding.where}: {finding.problem} ({', '.join(p for p in place if p) or 'whole file'})")
    click.echo(f"{path}: {'sound' if not findings else f'{len(findings)} findings'}")
