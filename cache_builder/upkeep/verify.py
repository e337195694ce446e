"""Verify a cache to the last byte, and name the damaged shard, array and rows.

There are three layers of checks: every file against its committed SHA-256; the documents against each other; the decoded rows
against the promises of `SoftTargets` (sorted, unique ids within the vocabulary, masses that sum to one, tokens that match their
digest). In a changed file, the crc32c of each inner chunk shows which rows are damaged.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from kd.cache_builder.store import shard_store
from kd.cache_builder.store.cache_files import CacheFiles, bytes_below, files_at, files_below, recorded_bytes
from kd.cache_builder.store.chunks import broken_chunks
from kd.cache_builder.store.encoding import codecs
from kd.cache_builder.store.encoding.arrays import ArraySpec
from kd.cache_builder.store.example_table import gaps_at
from kd.cache_builder.store.lengths import LengthPages
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.cache_tables import COMMITS
from kd.cache_builder.store.records.manifest import CacheManifest, load_manifest
from kd.cache_builder.store.records.manifest_checks import PAGE_EXAMPLES, length_page
from kd.cache_builder.store.records.part import PARTIAL, load_part
from kd.cache_builder.store.records.shard_record import ShardRecord
from kd.cache_builder.store.soft_targets import SoftTargets
from kd.cache_builder.store.vocabulary import tokens_digest
from kd.cache_builder.upkeep.promised_lengths import broken_lengths
from kd.common.errors import CacheDamageError, CacheError, KdError
from kd.common.progress import Progress
from kd.common.strangers.plain_files import read_plain

NUMBER = re.compile(r"/(?:c[/.])?(\d+)(?:[/.]0|\.json|\.parquet)?$")
"""The number of a shard in the name of one of its files."""
BESIDE = {"README.md", "entropy.png", ".gitattributes", ".git", ".cache"}
"""Names of the dataset card and of files that git and the hub's client leave beside a cache; no reader uses them."""


@dataclass(frozen=True)
class Finding:
    """One damaged place in a cache."""

    where: str
    """Path of the file in the cache."""
    problem: str
    """What is wrong, in words."""
    shard: int | None = None
    """Index of the shard; None for a file outside the shards."""
    array: str | None = None
    """Name of the array, or `examples`; None where the whole shard is affected."""
    rows: str | None = None
    """`start:stop` addresses in the arrays, as narrow as could be determined; None for a file outside the shards."""


def verify(
    cache: str | Path | CacheFiles, *, promises: bool = True, workers: int | None = None
) -> Iterator[Progress[tuple[Finding, ...]]]:
    """Check a cache; yields progress in bytes, and on the last record everything that was found.

    promises   False: only bytes are compared with their digests, which finds every change since they were committed
    workers    shards that are checked at once; None for as many as there are processors, and one by one for those of a URL

    Raises CacheError when there is none; CacheDamageError when the manifest is unreadable.
    """
    files = files_at(cache)
    root = files.root
    manifest = load_manifest(root)
    part = load_part(root, manifest)
    findings: list[Finding] = []
    present: Sequence[int] = range(len(manifest.shards))
    if part is not None:
        present = part.shards
    elif not manifest.complete:
        present = files.committed(len(manifest.shards))
    arrays = [a for a in manifest.arrays if part is None or a.name in part.arrays]
    for name, entry in manifest.files.items():
        if present or (root / name).exists():  # a build without a shard may still be laying out the directory
            findings += _check_file(files, name, entry)
    done, total = 0, recorded_bytes(manifest, part)
    if total is None:
        total = bytes_below(root) if files.on_disk else _committed_bytes(files, manifest, present)

    lengths = LengthPages(files, manifest) if manifest.format_version > 2 else None

    def check(index: int) -> list[Finding]:
        return list(_check_shard(files, manifest, index, arrays, lengths, promises))

    if workers is None:
        workers = (os.cpu_count() or 1) if files.on_disk else 1
    with ThreadPoolExecutor(workers, thread_name_prefix="kd-verify") as pool:
        waiting: deque[tuple[int, Future[list[Finding]]]] = deque()
        for number, shard in enumerate([*present, *[None] * workers]):
            if shard is not None:
                files.expect(present[number : number + workers + 4])
                waiting.append((shard, pool.submit(check, shard)))
            if waiting and (shard is None or len(waiting) > workers):  # few at a time: each holds a shard in memory
                checked, future = waiting.popleft()
                findings += future.result()
                done += sum(_size(root / n) for n in commits.shard_files(arrays, checked).values())
                yield Progress(done, total, note=f"{len(findings)} findings")
    held = set(present)
    for path in files_below(root) if manifest.complete else ():
        inner = path.relative_to(root)
        if inner.parts[0] not in BESIDE and not _is_known(manifest, held, inner.as_posix()):
            findings.append(Finding(inner.as_posix(), "a file that no commit knows"))
    yield Progress(total, total, tuple(findings), f"{len(findings)} findings")


def _is_known(manifest: CacheManifest, shards: Set[int], name: str) -> bool:
    """Whether a file belongs to a cache of which these shards are here."""
    if name in {"manifest.json", "building.json", PARTIAL} or name in manifest.files:
        return True
    number = NUMBER.search(name)
    if number is None or len(number[1]) > 9 or int(number[1]) not in shards:
        return False
    index = int(number[1])
    array = name.split("/")[1]
    files = commits.shard_files([a for a in manifest.arrays if a.name == array], index)
    return name in (f"commits/{index:05d}.json", *files.values())


def _committed_bytes(files: CacheFiles, manifest: CacheManifest, present: Sequence[int]) -> int:
    """Bytes of the shards of a mirror, as far as their commits can be fetched."""
    files.expect(present, ())
    total = 0
    for index in present:
        with suppress(KdError):  # the check of the shard will report it
            total += files.read_commit(manifest, index).bytes
    return total


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _check_file(files: CacheFiles, name: str, entry: dict[str, object]) -> list[Finding]:
    try:
        files.verify_file(name, entry)
    except CacheDamageError as error:
        return [Finding(name, error.headline)]
    return []


def _check_shard(
    files: CacheFiles,
    manifest: CacheManifest,
    index: int,
    arrays: Sequence[ArraySpec],
    lengths: LengthPages | None,
    promises: bool,
) -> Iterator[Finding]:
    commit = f"commits/{index:05d}.json"
    rows = manifest.shards[index][2]
    start = index * manifest.layout.shard_rows
    whole = f"{start}:{start + rows}"
    try:
        record = files.read_commit(manifest, index)
    except KdError as error:
        yield Finding(commit, error.headline, index, None, whole)
        return
    yield from _check_recorded(manifest, record, commit)
    data: dict[str, bytes] = {}
    paths = commits.shard_files(arrays, index)
    for array, name in paths.items():
        try:
            data[array] = files.verified_bytes(name, record.files[name])
        except CacheDamageError as error:
            narrowed = None if array == "examples" else _narrowed(files.root, name, record, manifest)
            yield Finding(name, error.headline, index, array, narrowed or whole)
    if len(data) < len(paths) or not promises:
        return
    try:
        shard = shard_store.decode_files(files, manifest, record, data)
        yield from _check_rows(manifest, shard, commit)
        if lengths is not None:
            yield from _check_lengths(lengths, shard)
    except KdError as error:
        yield Finding(commit, str(error.details.get("found", error.headline)), index, None, whole)


def _check_recorded(manifest: CacheManifest, record: ShardRecord, commit: str) -> Iterator[Finding]:
    """Compare the sizes in the table of commits with the commit."""
    for array, name in commits.shard_files(manifest.arrays, record.index).items():
        sizes = manifest.commits.stored.get(array)
        if sizes is not None and int(sizes[record.index]) != record.files[name]["bytes"]:
            yield Finding(commit, f"{COMMITS} gives {array} another size", record.index, array)


def _check_lengths(lengths: LengthPages, shard: shard_store.Shard) -> Iterator[Finding]:
    """Compare the lengths of the shard's examples with the examples."""
    first, stop, _ = lengths.manifest.shards[shard.index]
    table = shard.examples
    rows = np.subtract(table["row_end"], table["row_start"])
    gaps = [gaps_at(table, i).tokens for i in range(len(rows))]
    tokens = rows + [len(ids) for ids in table["context_ids"]] + gaps
    try:
        stored = lengths.read(first, stop)
    except CacheDamageError:  # of the page, which is a finding of its own
        return
    if not (np.array_equal(stored[0], tokens) and np.array_equal(stored[1], rows)):
        page = length_page(first // PAGE_EXAMPLES)
        yield Finding(page, f"lengths differ from the examples {first}:{stop}", shard.index, "examples")


def _narrowed(root: Path, name: str, record: ShardRecord, manifest: CacheManifest) -> str | None:
    """Row ranges of the inner chunks whose crc32c is wrong, as text; None where they cannot be determined."""
    start, rows = record.row_start, record.rows
    try:  # a file that grew has no index at its end
        numbers = broken_chunks(read_plain(root / name, int(record.files[name]["bytes"]), inside=root), manifest.layout)
    except (OSError, CacheError):
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
    broken = (
        broken_promises(targets, manifest.vocabulary_size, normalisers_stored="log_z" in shard.arrays),
        broken_lengths(targets, manifest.targets, manifest.vocabulary_size),
    )
    for problem, array, bad in chain(*broken):
        bad_rows = np.flatnonzero(bad)
        if len(bad_rows):
            yield Finding(commit, problem, shard.index, array, f"{start + bad_rows[0]}:{start + bad_rows[-1] + 1}")
    table = shard.examples
    expected = 0
    for i in range(len(table["id"])):
        first, stop = table["row_start"][i], table["row_end"][i]
        if first != expected or stop <= first:
            yield Finding(commit, f"row range of example {table['id'][i]} is not contiguous", shard.index, "examples")
            return
        expected = stop
        context = np.asarray(table["context_ids"][i], dtype=np.int32)
        if tokens_digest(context, targets.gold_ids[first:stop], gaps_at(table, i)) != table["tokens_digest"][i]:
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
    """Yield `(problem, array, mask of rows [N])` for every promise of `SoftTargets` that rows can break."""
    yield "an id beyond the vocabulary", "gold_ids", targets.gold_ids >= vocabulary_size
    yield "a rank beyond the vocabulary", "gold_rank", targets.gold_rank >= vocabulary_size
    yield "a normaliser that is not finite", "log_z", ~np.isfinite(targets.log_z).all(axis=1)
    yield "a log-probability that is not finite", "gold_logprob", ~np.isfinite(targets.gold_logprob)
    if targets.token_ids is not None:
        beyond = (targets.token_ids < 0) | (targets.token_ids >= vocabulary_size)
        yield "an id beyond the vocabulary", "token_ids", _rows_with(targets, beyond)
        yield "an id that occurs twice", "token_ids", _repeated(targets)
    if targets.logprobs is not None:
        yield "log-probabilities out of order", "logprobs", _ascending(targets, targets.logprobs)
        if normalisers_stored:  # otherwise they follow from the head and the odds of the tail
            for temperature in targets.temperatures:
                kept = targets.row_sums(np.exp(targets.logprobs_at(temperature)))
                # float32 log_z of up to 16 nats carries about 1e-6; sums over 64 values a little more
                yield f"kept mass above 1 at temperature {temperature:g}", "log_z", ~(kept <= 1 + 1e-4)
    if targets.sample_counts is not None:
        drawn = targets.sample_counts.sum(axis=1)
        yield "a number of draws that differs between rows", "sample_counts", drawn != targets.sample_counts.shape[1]
    if targets.tail_ids is not None:
        yield from _broken_tails(targets, vocabulary_size)


def _broken_tails(targets: SoftTargets, vocabulary_size: int) -> Iterator[tuple[str, str, np.ndarray]]:
    """The same for what draws from a tail promise beside its mass."""
    assert targets.tail_ids is not None
    assert targets.tail_draws is not None
    used = np.arange(targets.tail_ids.shape[1]) < targets.tail_draws[:, None]
    yield "an id beyond the vocabulary", "tail_ids", _any(used & (targets.tail_ids >= vocabulary_size))
    if targets.token_ids is None:
        return
    kept = targets.padded(targets.token_ids.astype(np.int64), -1.0)
    offset = np.arange(len(targets))[:, None] * (vocabulary_size + 1)
    twice = used & np.isin(targets.tail_ids + offset, (kept + offset)[kept >= 0])
    yield "a kept token that was drawn from the tail", "tail_ids", _any(twice)
    if targets.logprobs is not None:
        # masses of up to 1e-6 are what rounding leaves of a tail
        yield "a tail without a draw", "tail_draws", (targets.tail_mass_at(1.0) > 1e-6) & ~_any(used)


def _any(marks: np.ndarray) -> np.ndarray:
    """`[N]` whether a column of a row is marked."""
    return np.asarray(marks.any(axis=1))


def _rows_with(targets: SoftTargets, marks: np.ndarray) -> np.ndarray:
    """`[N]` whether a row has a marked entry."""
    return np.asarray(targets.row_sums(marks.astype(np.int64)) > 0)


def _repeated(targets: SoftTargets) -> np.ndarray:
    """`[N]` whether an id occurs twice in a row."""
    assert targets.token_ids is not None
    if targets.kept is None:
        ids = np.sort(targets.token_ids, axis=1)
        return np.asarray((ids[:, 1:] == ids[:, :-1]).any(axis=1))
    rows = np.repeat(np.arange(len(targets)), targets.kept)
    order = np.lexsort((targets.token_ids, rows))
    rows, ids = rows[order], targets.token_ids[order]
    again = (rows[1:] == rows[:-1]) & (ids[1:] == ids[:-1])
    return np.asarray(np.bincount(rows[1:][again], minlength=len(targets)) > 0)


def _ascending(targets: SoftTargets, values: np.ndarray) -> np.ndarray:
    """`[N]` whether a value of a row is larger than the one before it."""
    if targets.kept is None:
        return np.asarray((np.diff(values, axis=1) > 0).any(axis=1))
    larger = np.diff(values, prepend=np.inf) > 0
    larger[targets.offsets[:-1]] = False
    return _rows_with(targets, larger)
