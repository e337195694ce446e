"""Push a cache to a remote: verified, in parallel, and continued by the same command when it was cut.

Every file is checked against its commit before it is sent: data first, then commits, then `manifest.json`. So a remote without a
manifest holds no cache. A file that is there with the recorded size and SHA-256 is not sent again.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from functools import partial
from itertools import islice
from pathlib import Path

from kd.cache_builder.share.dataset_card import CARD, PICTURE, dataset_card
from kd.cache_builder.share.fetching import in_parallel, persist
from kd.cache_builder.share.places import open_remote
from kd.cache_builder.share.remotes import Entry, Remote
from kd.cache_builder.share.transfer import (
    PlannedTransfer,
    Tally,
    Transferred,
    fetch_if_there,
    fetch_tables,
    raise_mismatch,
)
from kd.cache_builder.store.cache_files import LocalFiles
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import MANIFEST, CacheManifest, load_manifest
from kd.cache_builder.store.records.part import PARTIAL, load_part
from kd.common.errors import CacheDamageError, CacheError
from kd.common.files import MAX_JSON_BYTES
from kd.common.paths import as_path
from kd.common.progress import Progress
from kd.common.strangers.plain_files import read_plain


def push(
    path: str | Path,
    url: str,
    *,
    license: str | None = None,
    private: bool = False,
    workers: int = 8,
    picture: bytes | None = None,
) -> Iterator[Progress[Transferred]]:
    """Copy a complete cache to `url`; on the hub, with a dataset card that names the `license` and shows the `picture`, a PNG.

    Raises CacheError for a cache that is not whole, CacheDamageError for one that is damaged, CacheMismatchError when
    another cache is there.
    """
    root, tally, stop = as_path(path), Tally(), threading.Event()
    manifest = _whole_cache(root)
    remote = open_remote(url)
    persist(partial(remote.prepare, private=private), remote, "", stop)
    already_there = _refuse_another(root, manifest, remote)
    data, entries = _entries(root, manifest)
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
            raise CacheError(
                "a file that was sent is missing or differs",
                where=remote.url,
                found=missing[0],
                try_="the same command again; on the hub, no .gitignore that names it",
            )
        if remote.shows_card:
            _send_card(remote, root, url, license, picture, stop)
        if not already_there:
            persist(lambda: remote.write(root, [MANIFEST]), remote, MANIFEST, stop)
            tally.add(files=1)
    finally:
        remote.close()
    yield tally.end()


def planned_push(path: str | Path, url: str) -> PlannedTransfer:
    """What `push` would send. Nothing is written, and no repository is made.

    Raises CacheError for a cache that is not whole or an address that can only be read from, CacheMismatchError when another
    cache is there.
    """
    root = as_path(path)
    manifest = _whole_cache(root)
    with closing(open_remote(url)) as remote:
        is_place = remote.exists()
        there = is_place and _refuse_another(root, manifest, remote)
        data, entries = _entries(root, manifest)
        every = data | entries | {MANIFEST: commits.file_entry(root / MANIFEST)}
        held = remote.held(root, data | entries) if is_place else set()
    return PlannedTransfer.of(every, held | ({MANIFEST} if there else set()))


def _whole_cache(root: Path) -> CacheManifest:
    """The manifest of a cache that can be shared. Raises CacheError for a part of one."""
    manifest = load_manifest(root)
    if not manifest.complete or load_part(root, manifest) is not None:
        raise CacheError(
            "only a whole cache can be shared",
            where=root,
            found="a part of one" if manifest.complete else "a build that is not finished",
            try_="kd cache pull the rest, or run its kd cache build command again",
        )
    return manifest


def _entries(root: Path, manifest: CacheManifest) -> tuple[dict[str, Entry], dict[str, Entry]]:
    """The files of a cache but its manifest: those with data, which are sent first, and the commits."""
    data: dict[str, Entry] = dict(manifest.files)
    entries: dict[str, Entry] = {}
    for index in range(len(manifest.shards)):
        data |= commits.read_commit(root, manifest, index).files
        entries[f"commits/{index:05d}.json"] = commits.file_entry(commits.commit_path(root, index))
    return data, entries


def _batches(names: Sequence[str], size: int) -> Iterator[list[str]]:
    waiting = iter(names)
    while batch := list(islice(waiting, size)):
        yield batch


def _send(
    remote: Remote, root: Path, names: Sequence[str], entries: dict[str, Entry], tally: Tally, stop: threading.Event
) -> None:
    for name in names:
        LocalFiles(root).verify_file(name, entries[name])
    persist(lambda: remote.write(root, names), remote, names[0], stop)
    size = sum(int(entries[name]["bytes"]) for name in names)
    tally.add(done=size, moved=size, files=len(names))


def _refuse_another(root: Path, manifest: CacheManifest, remote: Remote) -> bool:
    """True if the remote holds this manifest already. Raises CacheError where it holds another cache, or a part of one."""
    theirs, same = fetch_if_there(remote, MANIFEST), False
    if theirs is not None and not (same := theirs == read_plain(root / MANIFEST, MAX_JSON_BYTES, inside=root)):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / MANIFEST).write_bytes(theirs)
            with suppress(CacheDamageError):  # an unreadable manifest is replaced
                fetch_tables(remote, Path(folder))
                other = load_manifest(Path(folder))
                raise_mismatch(remote.url, manifest, other)
    if fetch_if_there(remote, PARTIAL) is not None:
        raise CacheError("a part of a cache is there", where=remote.url, try_="another address")
    return same


def _send_card(
    remote: Remote, root: Path, url: str, license: str | None, picture: bytes | None, stop: threading.Event
) -> None:
    """Send a dataset card unless there is one: somebody may have edited it."""
    if fetch_if_there(remote, CARD) is not None:
        return
    with tempfile.TemporaryDirectory() as folder:
        card = dataset_card(root, url, license, picture=picture is not None)
        (Path(folder) / CARD).write_text(card, encoding="utf-8")
        names = [CARD]
        if picture is not None:
            (Path(folder) / PICTURE).write_bytes(picture)
            names.append(PICTURE)
        persist(lambda: remote.write(Path(folder), names), remote, CARD, stop)
