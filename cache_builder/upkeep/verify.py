"""Check a cache to the last byte, and say which shard, array and rows are damaged.

Three layers: every file against its committed SHA-256; the documents against each other; the decoded rows
against what `SoftTargets` promises (sorted, unique ids within the vocabulary, masses that sum to one, tokens that
match their digest). A changed file is narrowed down to its inner chunks by the crc32c of each.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kd.cache_builder.store import codecs, commits, shard_store
from kd.cache_builder.store.arrays import ArraySpec
from kd.cache_builder.store.chunks import broken_chunks
from kd.cache_builder.store.manifest import CacheManifest, load_manifest
from kd.cache_builder.store.part import PARTIAL, load_part
from kd.cache_builder.store.targets import SoftTargets
from kd.cache_builder.store.vocabulary import tokens_digest
from kd.common.errors import CacheDamageError, CacheError, KdError
from kd.common.files import unfinished

BESIDE = {"README.md", ".gitattributes", ".git", ".cache"}
"""The dataset card, and what git and the hub's client leave beside a cache: no reader looks at it."""


@dataclass(frozen=True)
class Finding:
    """One piece of damage."""

    where: str
    """File in the cache."""
    problem: str
    shard: int | None = None
    array: str | None = None
    rows: str | None = None
    """`start:stop` addresses in the arrays, as narrow as could be told."""


@dataclass(frozen=True)
class VerifyProgress:
    """Files checked so far."""

    bytes_done: int
    bytes_total: int
    findings: tuple[Finding, ...]


def verify(root: str | Path, *, promises: bool = True) -> Iterator[VerifyProgress]:
    """Check the cache under `root`; yields progress, the last one with all findings.

    Without `promises` bytes alone are compared with their digests, which finds all that happened since they were committed.
    Shards are checked on as many threads as there are processors.

    Raises CacheError when `root` is not a cache at all; CacheDamageError when the manifest is unreadable.
    """
    root = Path(root)
    manifest = load_manifest(root)
    part = load_part(root, manifest)
    findings: list[Finding] = []
    known = {"manifest.json", "building.json", PARTIAL}
    present: Sequence[int] = range(len(manifest.shards))
    if part is not None:
        present = part.shards
    elif not manifest.complete:
        present = commits.committed(root, len(manifest.shards))
    arrays = [a for a in manifest.arrays if part is None or a.name in part.arrays]
    for name, entry in manifest.files.items():
        known.add(name)
        if present or (root / name).exists():  # a build that has no shard yet may still be laying out the directory
            findings += _check_file(root, name, entry)
    for index in present:
        known |= {f"commits/{index:05d}.json", *commits.shard_files(manifest.arrays, index).values()}
    done, total = 0, sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    if root in commits.ORIGINS:
        total = _committed_bytes(root, manifest, present)

    def check(index: int) -> list[Finding]:
        return list(_check_shard(root, manifest, index, arrays, promises))

    workers = 1 if root in commits.ORIGINS else os.cpu_count() or 1
    with ThreadPoolExecutor(workers, thread_name_prefix="kd-verify") as pool:
        waiting: deque[tuple[int, Future[list[Finding]]]] = deque()
        for place, shard in enumerate([*present, *[None] * workers]):
            if shard is not None:
                commits.ask(root, present[place : place + workers + 4])
                waiting.append((shard, pool.submit(check, shard)))
            if waiting and (shard is None or len(waiting) > workers):  # few at a time: each holds a shard
                checked, future = waiting.popleft()
                findings += future.result()
                done += sum(_size(root / n) for n in commits.shard_files(arrays, checked).values())
                yield VerifyProgress(done, total, tuple(findings))
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        names = path.relative_to(root).parts
        if names[0] in BESIDE or any(unfinished(n) for n in names):  # a builder of another host may still run
            continue
        if path.is_file() and name not in known and manifest.complete:
            findings.append(Finding(name, "a file that no commit knows"))
    yield VerifyProgress(total, total, tuple(findings))


def _committed_bytes(root: Path, manifest: CacheManifest, present: Sequence[int]) -> int:
    """Bytes of the shards of a mirror, as far as their commits can be had."""
    commits.ask(root, present, ())
    total = 0
    for index in present:
        with suppress(KdError):  # it is found again, and named, when the shard is checked
            total += commits.read_commit(root, manifest, index).bytes
    return total


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _check_file(root: Path, name: str, entry: dict[str, object]) -> list[Finding]:
    try:
        commits.verify_file(root, name, entry)
    except CacheDamageError as error:
        return [Finding(name, error.headline)]
    return []


def _check_shard(
    root: Path, manifest: CacheManifest, index: int, arrays: Sequence[ArraySpec], promises: bool
) -> Iterator[Finding]:
    commit = f"commits/{index:05d}.json"
    rows = manifest.shards[index][2]
    start = index * manifest.layout.shard_rows
    whole = f"{start}:{start + rows}"
    try:
        record = commits.read_commit(root, manifest, index)
    except KdError as error:
        yield Finding(commit, error.headline, index, None, whole)
        return
    data: dict[str, bytes] = {}
    files = commits.shard_files(arrays, index)
    for array, name in files.items():
        try:
            data[array] = commits.verified_bytes(root, name, record.files[name])
        except CacheDamageError as error:
            narrowed = whole
            if array != "examples" and (root / name).is_file() and commits.inside(root, root / name):
                narrowed = _broken_rows(manifest, (root / name).read_bytes(), start, rows) or whole
            yield Finding(name, error.headline, index, array, narrowed)
    if len(data) < len(files) or not promises:
        return
    try:
        yield from _check_rows(manifest, shard_store.decode_files(root, manifest, record, data), commit)
    except KdError as error:
        yield Finding(commit, str(error.details.get("found", error.headline)), index, None, whole)


def _broken_rows(manifest: CacheManifest, data: bytes, start: int, rows: int) -> str | None:
    """Row ranges of the inner chunks whose crc32c is wrong, joined; None where that cannot be told."""
    try:
        numbers = broken_chunks(data, manifest.layout)
    except CacheError:
        return None
    step, ranges = manifest.layout.chunk_rows, list[list[int]]()
    for number in numbers:
        first, stop = start + number * step, start + min((number + 1) * step, rows)
        if first >= stop:
            continue
        if ranges and ranges[-1][1] == first:
            ranges[-1][1] = stop
        else:
            ranges.append([first, stop])
    return ", ".join(f"{a}:{b}" for a, b in ranges) or None


def _check_rows(manifest: CacheManifest, shard: shard_store.Shard, commit: str) -> Iterator[Finding]:
    start = shard.index * manifest.layout.shard_rows
    targets = codecs.decode(shard.arrays, manifest.targets)
    for problem, array, bad in broken_promises(
        targets, manifest.vocabulary_size, normalisers_stored="log_z" in shard.arrays
    ):
        places = np.flatnonzero(bad)
        if len(places):
            yield Finding(commit, problem, shard.index, array, f"{start + places[0]}:{start + places[-1] + 1}")
    table = shard.examples
    expected = 0
    for i in range(len(table["id"])):
        first, stop = table["row_start"][i], table["row_end"][i]
        if first != expected or stop <= first:
            yield Finding(commit, f"row range of example {table['id'][i]} is not contiguous", shard.index, "examples")
            return
        expected = stop
        context = np.asarray(table["context_ids"][i], dtype=np.int32)
        if tokens_digest(context, targets.gold_ids[first:stop]) != table["tokens_digest"][i]:
            yield Finding(
                commit,
                f"rows of example {table['id'][i]} do not belong to its tokens",
                shard.index,
                "gold_ids",
                f"{start + first}:{start + stop}",
            )
        if targets.byte_end[stop - 1] != len(table["target"][i].encode("utf-8")):
            yield Finding(
                commit,
                f"byte ends of example {table['id'][i]} do not cover its text",
                shard.index,
                "byte_end",
                f"{start + first}:{start + stop}",
            )
    if expected != manifest.shards[shard.index][2]:
        yield Finding(commit, "the examples do not cover the shard's rows", shard.index, "examples")


def broken_promises(
    targets: SoftTargets, vocabulary_size: int, *, normalisers_stored: bool = True
) -> Iterator[tuple[str, str, np.ndarray]]:
    """`(problem, array, mask of rows [N])` for everything `SoftTargets` promises and these rows may break."""
    yield "an id beyond the vocabulary", "gold_ids", targets.gold_ids >= vocabulary_size
    yield "a rank beyond the vocabulary", "gold_rank", targets.gold_rank >= vocabulary_size
    yield "a normaliser that is not finite", "log_z", ~np.isfinite(targets.log_z).all(axis=1)
    yield "a log-probability that is not finite", "gold_logprob", ~np.isfinite(targets.gold_logprob)
    if targets.token_ids is not None:
        ids = np.sort(targets.token_ids, axis=1)
        yield "an id beyond the vocabulary", "token_ids", np.asarray((ids[:, 0] < 0) | (ids[:, -1] >= vocabulary_size))
        yield "an id that occurs twice", "token_ids", np.asarray((ids[:, 1:] == ids[:, :-1]).any(axis=1))
    if targets.logprobs is not None:
        yield (
            "log-probabilities out of order",
            "logprobs",
            np.asarray((np.diff(targets.logprobs, axis=1) > 0).any(axis=1)),
        )
        if normalisers_stored:  # else they are worked out of the head and the tail's odds, and cannot be below it
            for temperature in targets.temperatures:
                kept = np.exp(targets.logprobs_at(temperature)).sum(axis=1)
                # float32 log_z of up to 16 nats carries about 1e-6; sums over 64 values a little more
                yield f"kept mass above 1 at temperature {temperature:g}", "log_z", ~(kept <= 1 + 1e-4)
    if targets.sample_counts is not None:
        drawn = targets.sample_counts.sum(axis=1)
        yield "a number of draws that differs between rows", "sample_counts", drawn != targets.sample_counts.shape[1]
