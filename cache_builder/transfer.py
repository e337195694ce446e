"""Push a cache to a place where others find it, and pull one from there: verified, in parallel, continued when cut.

    push    every file checked against its commit before it is sent; data, then commits, then `manifest.json`
    pull    the manifest first (its own checksum), commits against the manifest, files against the commits; what has
            arrived lies under `.staging-pull` until it is right, `manifest.json` is published last

So a place without a manifest holds no cache, on either side, and the same command again goes on where it stopped:
what is there with the right size and SHA-256 is not moved again. That also mends a damaged copy.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from kd.cache_builder import commits
from kd.cache_builder.card import CARD, dataset_card
from kd.cache_builder.fetching import fetch, fetch_small, in_parallel, persist
from kd.cache_builder.files import MAX_JSON_BYTES, publish, sha256_of, sync_folder, unfinished, write_error
from kd.cache_builder.hub import Hub
from kd.cache_builder.manifest import (
    ANSWERS,
    BUILDING,
    MANIFEST,
    TARGETS,
    VOCABULARY,
    CacheManifest,
    load_manifest,
    refuse_mismatch,
)
from kd.cache_builder.part import PARTIAL, Part, load_part, part_of, whole
from kd.cache_builder.remotes import Entry, Folder, Remote, holds, open_remote
from kd.cache_builder.verify import BESIDE
from kd.data.errors import CacheDamageError, CacheError, CacheMismatchError, KdError

STAGING = ".staging-pull"
"""Folder of what is on its way; see `files.unfinished`."""
COMMIT_BYTES = 2**20
"""A commit is a few kilobytes; nobody says how many, so more is not taken."""


@dataclass(frozen=True)
class TransferProgress:
    """How far a push or a pull is."""

    bytes_done: int
    """Right where they should be, those that were there before too."""
    bytes_total: int
    bytes_moved: int
    """Over the wire in this run."""
    files: int
    """Moved in this run."""
    seconds: float
    part: Part | None = None
    """Pull: what the copy holds, where that is not the whole cache."""


class _Tally:
    """Counts for all threads."""

    def __init__(self) -> None:
        self.done = self.total = self.moved = self.files = 0
        self.started = time.monotonic()
        self.lock = threading.Lock()

    def add(self, *, done: int = 0, total: int = 0, moved: int = 0, files: int = 0) -> None:
        with self.lock:
            self.done, self.total = self.done + done, self.total + total
            self.moved, self.files = self.moved + moved, self.files + files

    def arrived(self, count: int) -> None:
        """Bytes from the network; a negative number takes back what turned out wrong."""
        self.add(done=count, moved=max(count, 0))

    def now(self, part: Part | None = None) -> TransferProgress:
        return TransferProgress(self.done, self.total, self.moved, self.files, time.monotonic() - self.started, part)


def push(path: str | Path, url: str, *, license: str | None = None, private: bool = False,
         workers: int = 8) -> Iterator[TransferProgress]:  # fmt: skip
    """Copy a complete cache to `url`; on the hub, with a dataset card that names the `license`.

    Raises CacheError for a cache that is not whole, CacheDamageError for one that is damaged, CacheMismatchError when
    another cache is there.
    """
    root, tally, stop = Path(path), _Tally(), threading.Event()
    manifest = load_manifest(root)
    if not manifest.complete or load_part(root, manifest) is not None:
        raise CacheError("only a whole cache can be shared", where=root,
                         found="a part of one" if manifest.complete else "a build that is not finished",
                         try_="kd cache pull the rest, or run its kd cache build command again")  # fmt: skip
    remote = open_remote(url)
    if isinstance(remote, Hub):
        remote.private = private
    persist(remote.prepare, remote, "", stop)
    known = _refuse_another(root, manifest, remote)
    data: dict[str, Entry] = dict(manifest.files)
    entries: dict[str, Entry] = {}
    for index in range(len(manifest.shards)):
        data |= commits.read_commit(root, manifest, index).files
        entries[f"commits/{index:05d}.json"] = commits.file_entry(commits.commit_path(root, index))
    tally.add(total=sum(int(e["bytes"]) for e in [*data.values(), *entries.values()]))
    held: set[str] = set()
    try:
        persist(lambda: held.update(remote.held(root, data | entries)), remote, "", stop)
        for layer in (data, entries):
            tally.add(done=sum(int(layer[name]["bytes"]) for name in layer if name in held))
            todo = [name for name in layer if name not in held]
            jobs = (partial(_send, remote, root, names, layer, tally, stop) for names in _batches(todo, remote.batch))
            for _ in in_parallel(jobs, min(workers, remote.writers), stop):
                yield tally.now()
        arrived: set[str] = set()
        persist(lambda: arrived.update(remote.held(root, data | entries)), remote, "", stop)
        if missing := sorted((data | entries).keys() - arrived):
            raise CacheError("what was sent is not there, or not as it was sent", where=remote.url, found=missing[0],
                             try_="the same command again; on the hub, no .gitignore that names it")  # fmt: skip
        if isinstance(remote, Hub):
            _send_card(remote, root, url, license, stop)
        if not known:
            persist(lambda: remote.write(root, [MANIFEST]), remote, MANIFEST, stop)
            tally.add(files=1)
    finally:
        if isinstance(remote, Folder):
            remote.close()
    yield tally.now()


def _batches(names: Sequence[str], size: int) -> Iterator[list[str]]:
    waiting = iter(names)
    while batch := list(islice(waiting, size)):
        yield batch


def _send(remote: Remote, root: Path, names: Sequence[str], entries: dict[str, Entry], tally: _Tally,
          stop: threading.Event) -> None:  # fmt: skip
    for name in names:
        commits.verify_file(root, name, entries[name])
    persist(lambda: remote.write(root, names), remote, names[0], stop)
    size = sum(int(entries[name]["bytes"]) for name in names)
    tally.add(done=size, moved=size, files=len(names))


def _refuse_another(root: Path, manifest: CacheManifest, remote: Remote) -> bool:
    """Does the place hold this manifest already? Raises where it holds another cache, or a part of one."""
    theirs, same = _optional(remote, MANIFEST), False
    if theirs is not None and not (same := theirs == (root / MANIFEST).read_bytes()):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / MANIFEST).write_bytes(theirs)
            with suppress(CacheDamageError):  # one that says nothing is replaced
                other = load_manifest(Path(folder))
                _raise_mismatch(remote.url, manifest, other)
    if _optional(remote, PARTIAL) is not None:
        raise CacheError("this place holds a part of a cache", where=remote.url, try_="another address")
    return same


def _raise_mismatch(where: object, wanted: CacheManifest, other: CacheManifest) -> None:
    """Raise CacheMismatchError with what differs between two caches of which one was expected to be the other."""
    try:
        refuse_mismatch(Path(str(where)), wanted.identity, other)
    except CacheMismatchError as error:
        details = {k: v for k, v in error.details.items() if k not in ("cache", "try")}
    else:
        details = {"differs": "layout or files; made from the same"}
    raise CacheMismatchError("another cache is there", where=where, **details, try_="another place")


def _optional(remote: Remote, name: str) -> bytes | None:
    try:
        return fetch_small(remote, name, MAX_JSON_BYTES)
    except FileNotFoundError:
        return None


def _send_card(remote: Remote, root: Path, url: str, license: str | None, stop: threading.Event) -> None:
    """A dataset card, where there is none yet: one that somebody has edited stays."""
    if _optional(remote, CARD) is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CARD).write_text(dataset_card(root, url, license), encoding="utf-8")
        persist(lambda: remote.write(Path(folder), [CARD]), remote, CARD, stop)


def pull(url: str, path: str | Path, *, examples: tuple[int, int] | None = None,
         arrays: Callable[[CacheManifest], Collection[str]] | None = None,
         workers: int = 8) -> Iterator[TransferProgress]:  # fmt: skip
    """Copy a cache from `url`, or the shards that hold `examples`, or the arrays (and those nobody can miss) alone.

    A copy of a part lists what it holds in `partial.json`; pulling more of it adds to that. Raises CacheError where
    there is no cache, CacheDamageError for what arrives wrong, CacheMismatchError when another cache is at `path`.
    """
    root, remote, tally, stop = Path(path), open_remote(url), _Tally(), threading.Event()
    with _staging(root) as staging:
        manifest, part = describe(remote, staging)
        wanted = part_of(manifest, examples=examples, arrays=None if arrays is None else arrays(manifest))
        wanted = _offered(remote, wanted, part, everything=examples is None and arrays is None)
        held = _held(root, staging, manifest)
        part = held.joined(wanted, manifest) if held is not None else wanted
        wanted = part if held is None or held != whole(manifest) else wanted
        for name, entry in manifest.files.items():
            tally.add(total=int(entry["bytes"]))
            _bring(remote, root, staging, name, entry, tally, stop)
        jobs: Iterable[Callable[[], None]] = (
            partial(_bring_commit, remote, root, staging, manifest, i, wanted, tally, stop) for i in wanted.shards
        )
        for _ in in_parallel(jobs, workers, stop):
            yield tally.now()
        _refuse_full_disk(root, tally)
        jobs = _data_jobs(remote, root, staging, manifest, wanted, tally, stop)
        for _ in in_parallel(jobs, workers, stop):
            yield tally.now()
        for index in wanted.shards:
            _publish(staging, root, f"commits/{index:05d}.json")
        if part == whole(manifest):
            (root / PARTIAL).unlink(missing_ok=True)
            sync_folder(root)
        else:
            part.save(root, manifest)
        _publish(staging, root, MANIFEST)
    yield tally.now(None if part == whole(manifest) else part)


def describe(remote: Remote, folder: Path) -> tuple[CacheManifest, Part | None]:
    """Write the remote's manifest (and `partial.json`, where it is a part itself) to `folder`, and read it checked."""
    try:
        data = fetch_small(remote, MANIFEST, MAX_JSON_BYTES)
    except FileNotFoundError as error:
        raise CacheError("there is no cache", where=remote.url, found=f"no {MANIFEST}",
                         try_="the address of the folder that holds it") from error  # fmt: skip
    (folder / MANIFEST).write_bytes(data)
    listed = _optional(remote, PARTIAL)
    if listed is None:
        (folder / PARTIAL).unlink(missing_ok=True)
    else:
        (folder / PARTIAL).write_bytes(listed)
    try:
        manifest = load_manifest(folder)
        if not manifest.complete:
            raise CacheError("the cache is not complete", found=f"{len(manifest.commits)} commits")
        return manifest, load_part(folder, manifest)
    except KdError as error:
        error.details = {"where": remote.url, **{k: v for k, v in error.details.items() if k != "where"}}
        raise


def _offered(remote: Remote, wanted: Part, offered: Part | None, everything: bool) -> Part:
    """What can be had of `wanted` from a remote that may be a part itself."""
    if offered is None:
        return wanted
    if everything:
        return offered
    if not (set(wanted.shards) <= set(offered.shards) and set(wanted.arrays) <= set(offered.arrays)):
        raise CacheError("this copy does not hold all of that", where=remote.url,
                         found=f"{len(offered.shards)} shards; arrays {', '.join(offered.arrays)}")  # fmt: skip
    return wanted


@contextmanager
def _staging(root: Path) -> Iterator[Path]:
    """The staging folder, held against another pull; removed when all went well, kept for the next attempt when not."""
    if root.is_dir() and not (root / MANIFEST).exists():
        known = {
            MANIFEST,
            VOCABULARY,
            TARGETS,
            ANSWERS,
            "commits",
            "examples",
            PARTIAL,
            *BESIDE,
        }
        foreign = sorted(p.name for p in root.iterdir() if p.name not in known and not unfinished(p.name))
        if foreign:
            building = BUILDING in foreign
            raise CacheError("a build is not finished there" if building else "the directory is not empty and not a cache",
                             where=root, found=", ".join(foreign[:5]), expected="an empty or new directory",
                             try_="another path")  # fmt: skip
    try:
        (root / STAGING).mkdir(parents=True, exist_ok=True)
        lock = (root / STAGING / "lock").open("w")
    except OSError as error:
        raise write_error(root, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise CacheError(
                "another pull is writing there", where=root, try_="wait for it, or another path"
            ) from error
        yield root / STAGING
        shutil.rmtree(root / STAGING)
        sync_folder(root)


def _held(root: Path, staging: Path, manifest: CacheManifest) -> Part | None:
    """What a copy at `root` has of this cache; None for nothing. Raises CacheMismatchError when it is another's."""
    if not (root / MANIFEST).exists():
        return None
    if (root / MANIFEST).read_bytes() != (staging / MANIFEST).read_bytes():
        try:
            other = load_manifest(root)
        except CacheDamageError:  # it says nothing any more, and will be replaced
            return None
        _raise_mismatch(root, manifest, other)
    with suppress(CacheDamageError):
        return load_part(root, manifest) or whole(manifest)
    return None


def _bring(remote: Remote, root: Path, staging: Path, name: str, entry: Entry, tally: _Tally,
           stop: threading.Event) -> None:  # fmt: skip
    if holds(root / name, entry):
        tally.add(done=int(entry["bytes"]))
        return
    staged = staging / name
    tally.add(done=staged.stat().st_size if staged.exists() else 0)
    fetch(remote, name, staged, entry, stop=stop, arrived=tally.arrived)
    _publish(staging, root, name)
    tally.add(files=1)


def _publish(staging: Path, root: Path, name: str) -> None:
    if (staging / name).exists():
        try:
            publish(staging / name, root / name)
        except OSError as error:
            raise write_error(root / name, error) from error


def _bring_commit(remote: Remote, root: Path, staging: Path, manifest: CacheManifest, index: int, part: Part,
                  tally: _Tally, stop: threading.Event) -> None:  # fmt: skip
    """A commit, checked against the manifest, into staging; its files of this part are added to the total."""
    name = f"commits/{index:05d}.json"
    if not any(p.is_file() and sha256_of(p) == manifest.commits[index] for p in (root / name, staging / name)):
        try:
            data = fetch_small(remote, name, COMMIT_BYTES, sha256=manifest.commits[index], stop=stop)
        except FileNotFoundError as error:
            raise CacheDamageError("a file is missing from the cache", where=remote.url, file=name) from error
        (staging / "commits").mkdir(exist_ok=True)
        (staging / name).write_bytes(data)
        tally.add(moved=len(data), files=1)
    record = commits.read_commit(staging if (staging / name).exists() else root, manifest, index)
    tally.add(total=sum(int(record.files[n]["bytes"]) for n in _names(manifest, part, index)))


def _names(manifest: CacheManifest, part: Part, index: int) -> list[str]:
    """Files of a shard that belong to a part. The names are ours: a remote's are only compared with them."""
    arrays = [a for a in manifest.arrays if a.name in part.arrays]
    return list(commits.shard_files(arrays, index).values())


def _data_jobs(remote: Remote, root: Path, staging: Path, manifest: CacheManifest, part: Part, tally: _Tally,
               stop: threading.Event) -> Iterator[Callable[[], None]]:  # fmt: skip
    for index in part.shards:
        staged = (staging / f"commits/{index:05d}.json").exists()
        record = commits.read_commit(staging if staged else root, manifest, index)
        for name in _names(manifest, part, index):
            yield partial(_bring, remote, root, staging, name, record.files[name], tally, stop)


def _refuse_full_disk(root: Path, tally: _Tally) -> None:
    """Raise CacheError where what is to come cannot fit: what lies there already may be counted twice, so with room."""
    there = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    free = shutil.disk_usage(root).free
    if tally.total - there > free:
        raise CacheError("the disk is too small for this", where=root, found=f"{free:,} bytes free",
                         expected=f"{tally.total - there:,}", try_="--examples or --arrays for a part of it")  # fmt: skip
