"""kd cache verify and repair: find damage, and repair it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from kd.commands.terminal.console import emit_json, follow, outcome, say
from kd.commands.terminal.options import CACHE, PATH, json_option

if TYPE_CHECKING:
    from kd.cache_builder.store.cache_files import CacheFiles
    from kd.cache_builder.store.records.manifest import CacheManifest
    from kd.cache_builder.upkeep.verify import Finding
    from kd.common.errors import CacheDamageError


@click.command("verify")
@click.argument("path", metavar="PATH_OR_URL")
@click.option(
    "--checksums",
    is_flag=True,
    help="Compare bytes with their digests only, without decoding rows: as fast as SHA-256.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    default=None,
    help="Shards to check at the same time.  [default: the processors; 1 for a URL]",
)
@json_option
def cache_verify(path: str, checksums: bool, workers: int | None, as_json: bool) -> None:
    """Verify every checksum and every decoded row, and name the damaged shard, array and rows.

    Exit code 3 for damage, 1 where shards are missing.

    Example: kd cache verify runs/cache
    """
    from kd.cache_builder.opening import open_files
    from kd.cache_builder.store.records.manifest import load_manifest
    from kd.cache_builder.store.records.part import load_part
    from kd.cache_builder.upkeep.verify import verify
    from kd.common.errors import CacheError

    files = open_files(path)
    manifest = load_manifest(files.root)
    part = load_part(files.root, manifest)
    last = follow("verifying", verify(files, promises=not checksums, workers=workers))
    damage = last.result or ()
    findings = [asdict(f) for f in damage]
    if as_json:
        emit_json(
            {
                "path": path,
                "bytes": last.total,
                "sound": not findings,
                "complete": manifest.complete,
                "findings": findings,
            }
            | ({} if part is None else {"part": {"shards": len(part.shards), "arrays": list(part.arrays)}})
        )
    else:
        if part is not None:
            say(f"{path}: a part of a cache, {len(part.shards)} shards of arrays {', '.join(part.arrays)}")
        print_findings(path, damage)
        say(f"{last.total:,} bytes checked")
    if findings:
        sys.exit(3)
    if not manifest.complete:
        total, done = len(manifest.shards), len(files.committed(len(manifest.shards)))
        raise CacheError(
            "the files that are here are sound, but this cache is not complete",
            where=path,
            found=f"{done} of {total} shards",
            try_="run its kd cache build command again: it continues",
        )


@click.command("repair")
@click.argument("path", type=CACHE)
@click.option(
    "--from",
    "source",
    metavar="COPY",
    help="Take damaged files from a second copy of the cache, a folder or a URL.",
)
@click.option("--teacher", help="Where the teacher is now, if not where the build read it from.")
@click.option("--data", "spec", help="Where the text is now, if not where the build read it from.")
@click.option("--task-root", type=PATH, help="Folder of the local files of tasks, if they have moved.")
@click.option("--device", help="auto, cpu or cuda. By default the device of the build.")
@click.option("--device-map", help="How the teacher is spread over devices, as for kd cache build.")
@click.option("--max-memory", metavar="DEVICE=SIZE,…", help="Most memory for weights on each device, likewise.")
@click.option("--offload-folder", type=PATH, help="Folder for weights on the disk, likewise.")
@json_option
def cache_repair(path: Path, source: str | None, as_json: bool, **moved: Any) -> None:
    """Repair a damaged cache: from a second copy, or else by building the damaged shards again. Sound files are not touched.

    kd cache verify says what would be repaired, and writes nothing.
    Without --from, the teacher runs over the damaged shards with the options of the build, which the cache has recorded.
    Exit code 3 when damage is left.

    Example: kd cache repair runs/cache
    """
    from kd.cache_builder.opening import open_files
    from kd.cache_builder.store.records.manifest import load_manifest
    from kd.cache_builder.upkeep.rebuild_tables import rebuild_tables

    copy = None if source is None else open_files(source)
    mended = rebuild_tables(path) if copy is None else mend_from(copy, path, source)
    before, findings = load_manifest(path), verified(path)
    if copy is not None and findings:
        mended += mend_behind_a_bar(path, copy, findings)
        findings = verified(path)
    rebuilt: list[int] = []
    broken = [f for f in findings if f.shard is not None or f.where in before.files]
    if copy is None and (broken or not before.complete):
        rebuilt = build_again(path, before, broken, {name: str(v) for name, v in moved.items() if v is not None})
        findings = verified(path)
    same = load_manifest(path) == before
    if as_json:
        result = {"path": str(path), "mended": mended, "rebuilt_shards": rebuilt, "byte_identical": same}
        emit_json(result | {"sound": not findings, "findings": [asdict(f) for f in findings]})
    else:
        for name in mended:
            say(f"{name}: {'written again from the commits' if copy is None else f'taken from {source}'}")
        if rebuilt:
            other = "in other bytes: another machine or other versions; these are committed now"
            say(f"shards {', '.join(map(str, rebuilt))}: built again, {'the same bytes' if same else other}")
        print_findings(path, findings)
    if findings:
        sys.exit(3)


def mend_from(copy: CacheFiles, path: Path, source: str | None) -> list[str]:
    """Take the manifest from a second copy where it is unreadable; returns the names of replaced files.

    Raises CacheError where there is no cache at the copy, CacheMismatchError where it is another cache.
    """
    from kd.cache_builder.store.records.manifest import load_manifest
    from kd.cache_builder.upkeep.repair import mend_manifest

    theirs = load_manifest(copy.root)
    mended = mend_manifest(path, copy)
    require_copy(load_manifest(path), theirs, path, source)
    return mended


def mend_behind_a_bar(path: Path, copy: CacheFiles, findings: Sequence[Finding]) -> list[str]:
    """Replace damaged files by those of the copy, behind a progress bar; returns the names of replaced files."""
    from kd.cache_builder.upkeep.repair import mend

    return list(outcome("mending", mend(path, copy, findings)).mended)


def build_again(path: Path, before: CacheManifest, broken: Sequence[Finding], moved: dict[str, str]) -> list[int]:
    """Build the damaged and missing shards with the recorded options; returns their indices.

    moved   options whose values have changed since the build: where teacher and text are now

    Raises CacheDamageError where the options are not recorded, or the teacher was a model in memory, UnfinishedBuildError where
    another builder is at one of the shards.
    """
    from kd.cache_builder.build.build_settings import BuildSettings
    from kd.cache_builder.build.builder import require_finished
    from kd.cache_builder.store.records.commits import committed
    from kd.cache_builder.upkeep.cache_registry import places_of
    from kd.cache_builder.upkeep.repair import reopen
    from kd.commands.cache import build_behind_a_bar
    from kd.common.settings import make

    reopen(path, broken)
    rebuilt = sorted(set(range(len(before.shards))) - set(committed(path, len(before.shards))))
    recorded = before.provenance.get("options")
    if not isinstance(recorded, dict):
        raise cannot_rebuild(before, path, rebuilt)
    require_finished(
        build_behind_a_bar(
            make(BuildSettings, recorded | places_of(before) | moved | {"out": path}, where=path, typed=True)
        ),
        path,
    )
    return rebuilt


def cannot_rebuild(manifest: CacheManifest, path: Path, shards: Sequence[int]) -> CacheDamageError:
    """The error for a cache whose build this command cannot repeat."""
    from kd.cache_builder.store.records.teacher_record import IMPORTED
    from kd.common.errors import CacheDamageError
    from kd.models.identity import IN_MEMORY

    numbers = f"shards {', '.join(map(str, shards)) or 'none'}"
    if manifest.identity["teacher"].get("model") == IN_MEMORY:
        return CacheDamageError(
            "the damaged shards were removed, and their teacher was a model in memory",
            where=path,
            found=numbers,
            expected="the same model, tokenizer and texts, in Python",
            try_=f"kd.build_cache(model, tokenizer, texts, out={str(path)!r}, …): it builds only these shards",
        )
    if IMPORTED in manifest.identity["teacher"]:
        return CacheDamageError(
            "the damaged shards were removed, and this cache was imported",
            where=path,
            found=numbers,
            try_="its kd cache import command, with the same source: it writes only these shards",
        )
    return CacheDamageError(
        "the damaged shards were removed, but the options they were built with are not recorded",
        where=path,
        found=numbers,
        try_="its kd cache build command: it builds these alone",
    )


def require_copy(ours: CacheManifest, theirs: CacheManifest, path: Path, source: str | None) -> None:
    """Raise CacheMismatchError where the second copy is of another cache."""
    from kd.common.errors import CacheMismatchError

    if ours.fingerprint != theirs.fingerprint:
        raise CacheMismatchError(
            "the copy is of another cache", cache=path, copy=source, found=theirs.fingerprint, expected=ours.fingerprint
        )


def verified(path: Path) -> tuple[Finding, ...]:
    """Drive a verification and its progress bar to the end."""
    from kd.cache_builder.upkeep.verify import verify

    return outcome("verifying", verify(path))


def print_findings(path: Path | str, findings: Sequence[Finding]) -> None:
    """Print a line for each finding, and the verdict."""
    for finding in findings:
        location = [
            f"shard {finding.shard}" if finding.shard is not None else "",
            finding.array or "",
            f"rows {finding.rows}" if finding.rows else "",
        ]
        say(f"{finding.where}: {finding.problem} ({', '.join(p for p in location if p) or 'whole file'})")
    say(f"{path}: {'sound' if not findings else f'{len(findings)} findings'}")
