"""What builders have left in an object store: the traces by which `kd cache status` and `kd cache unlock` know a build."""

from __future__ import annotations

import tempfile
from pathlib import Path

from kd.cache_builder.build.object_store.s3_claims import all_s3_claims, claim_name
from kd.cache_builder.build.object_store.s3_objects import S3Objects
from kd.cache_builder.build.object_store.staged_output import fetched_names
from kd.cache_builder.store.records.commits import COMMIT_NAME
from kd.cache_builder.store.records.manifest import BUILDING, MANIFEST, CacheManifest, load_manifest
from kd.cache_builder.store.writers.claims import Claim
from kd.cache_builder.upkeep.build_status import BuildStatus, BuildTraces, status_of
from kd.common.errors import CacheError


def s3_build_status(url: str) -> BuildStatus:
    """The status of the build at an address, from one listing of it. Raises CacheError where no cache was begun there."""
    objects = S3Objects(url)
    manifest = s3_manifest(objects)
    listed = objects.entries()
    times = {
        int(name.removeprefix("commits/").removesuffix(".json")): entry.put_at
        for name, entry in listed.items()
        if name.startswith("commits/") and COMMIT_NAME.fullmatch(name.removeprefix("commits/"))
    }
    times = {shard: put_at for shard, put_at in times.items() if shard < len(manifest.shards)}
    traces = BuildTraces(
        manifest,
        sorted(times),
        times,
        [] if manifest.complete else all_s3_claims(objects),
        None if manifest.complete else objects.clock(BUILDING),
        sum(entry.bytes for entry in listed.values()),
    )
    return status_of(traces)


def remove_s3_claims(url: str, *, force: bool) -> tuple[list[Claim], list[Claim]]:
    """The claims on the shards of a build, and those that were removed: the void ones, or with `force` all."""
    objects = S3Objects(url)
    s3_manifest(objects)  # or this is no cache
    claims = all_s3_claims(objects)
    removed = [claim for claim in claims if force or claim.void is not None]
    objects.remove([claim_name(claim.shard) for claim in removed])
    return claims, removed


def s3_manifest(objects: S3Objects) -> CacheManifest:
    """The manifest of a cache, finished or not. Raises CacheError where none was begun."""
    manifest = existing_in_store(objects.url)
    if manifest is None:
        raise CacheError(
            "no cache was begun at this address", where=objects.url, try_=f"kd cache build --out {objects.url}"
        )
    return manifest


def existing_in_store(url: str) -> CacheManifest | None:
    """The manifest of a cache at an address, finished or not; None where none was begun."""
    objects = S3Objects(url)
    names = fetched_names(objects)
    if MANIFEST not in names and BUILDING not in names:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            data = objects.get(name)
            if data is not None:
                (Path(folder) / name).write_bytes(data)
        return load_manifest(Path(folder))
