"""`CacheFiles`: the files of one cache, in a folder that holds them all or in a mirror that fetches the ones that are read.

A reader is given `CacheFiles` and never asks where they came from. `LocalFiles` is a folder on this disk. The other kind is
`kd.cache_builder.share.mirror.Mirror`, a folder that is filled from a URL. In both, the manifest and `partial.json` lie in
`root` from the beginning.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.cache_builder.store.records.part import Part, load_part
from kd.cache_builder.store.records.shard_record import ShardRecord
from kd.common.errors import CacheDamageError
from kd.common.files import unfinished
from kd.common.paths import as_path


class CacheFiles(Hashable, Protocol):
    """The files of one cache, by their paths in it."""

    @property
    def root(self) -> Path:
        """The folder on this disk where the files lie, or will lie once they were fetched."""

    @property
    def on_disk(self) -> bool:
        """True where every file is in `root` already; False where files are fetched when they are read."""

    def committed(self, shards: int) -> list[int]:
        """Indices of the committed shards among the first `shards`, ascending."""

    def read_commit(self, manifest: CacheManifest, index: int) -> ShardRecord:
        """The record of a committed shard, checked against the manifest. Raises CacheDamageError."""

    def verified_bytes(self, name: str, entry: Mapping[str, Any], **where: object) -> bytes:
        """The bytes of a file. Raises CacheDamageError unless its size and SHA-256 are those in `entry`."""

    def verify_file(self, name: str, entry: Mapping[str, Any], **where: object) -> None:
        """As `verified_bytes`, for a file whose bytes are not needed now."""

    def stored_bytes(self, manifest: CacheManifest, index: int) -> dict[str, int]:
        """Array name (or `examples`) -> size in bytes of each file of a shard."""

    def expect(self, shards: Sequence[int], arrays: Iterable[str] | None = None) -> None:
        """Announce which shards will be read next, in order, and which of their arrays.

        `arrays` are keys of `commits.shard_files`. None means all of them; an empty one means the commits alone.
        """


@dataclass(frozen=True)
class LocalFiles:
    """A folder on this disk that holds the cache, or the part of it that `partial.json` lists."""

    root: Path

    on_disk = True

    def committed(self, shards: int) -> list[int]:
        """As `CacheFiles.committed`."""
        return commits.committed(self.root, shards)

    def read_commit(self, manifest: CacheManifest, index: int) -> ShardRecord:
        """As `CacheFiles.read_commit`."""
        return commits.read_commit(self.root, manifest, index)

    def verified_bytes(self, name: str, entry: Mapping[str, Any], **where: object) -> bytes:
        """As `CacheFiles.verified_bytes`."""
        with commits.open_file(self.root, name, **where) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(size) if size == entry["bytes"] else b""
        _refuse(self.root / name, entry, len(data) or size, lambda: hashlib.sha256(data).hexdigest(), where)
        return data

    def verify_file(self, name: str, entry: Mapping[str, Any], **where: object) -> None:
        """As `CacheFiles.verify_file`; the file is read in pieces."""
        with commits.open_file(self.root, name, **where) as file:
            size = os.fstat(file.fileno()).st_size
            _refuse(self.root / name, entry, size, lambda: hashlib.file_digest(file, "sha256").hexdigest(), where)

    def stored_bytes(self, manifest: CacheManifest, index: int) -> dict[str, int]:
        """As `CacheFiles.stored_bytes`, of the arrays that this copy holds."""
        part = load_part(self.root, manifest)
        return {
            array: commits.file_size(self.root, name, shard=index)
            for array, name in commits.shard_files(manifest.arrays, index).items()
            if part is None or array == "examples" or array in part.arrays
        }

    def expect(self, shards: Sequence[int], arrays: Iterable[str] | None = None) -> None:
        """Nothing: every file is here."""


def files_at(cache: str | os.PathLike[str] | CacheFiles) -> CacheFiles:
    """The files of a cache: those in the folder that a path names, or `cache` itself where it is such files already."""
    return LocalFiles(as_path(cache)) if isinstance(cache, str | os.PathLike) else cache


def recorded_bytes(manifest: CacheManifest, part: Part | None = None) -> int | None:
    """Bytes of a finished cache, or of a part of it, as recorded; None before format version 3, and while it is built."""
    stored = manifest.commits.stored
    if not stored:
        return None
    names = stored if part is None else [*part.arrays, "examples", "commit"]
    shards = slice(None) if part is None else list(part.shards)
    beside = sum(int(entry["bytes"]) for entry in manifest.files.values()) + len(manifest.to_json().encode())
    return beside + sum(int(stored[name][shards].sum()) for name in names)


def files_below(root: Path) -> Iterator[Path]:
    """Everything in a folder and below it that is published and no folder; what builders and mirrors have under way is left out.

    Links to folders are not followed, they are listed. Folders that vanish meanwhile, because a builder has ended, count as empty.
    """
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not unfinished(name))
        links = [name for name in folders if Path(folder, name).is_symlink()]
        yield from (Path(folder, name) for name in sorted([*names, *links]) if not unfinished(name))


def bytes_below(root: Path) -> int:
    """Size in bytes of the files in a folder and below it."""
    size = 0
    for path in files_below(root):
        with suppress(FileNotFoundError):  # a mirror evicts files while we look
            size += path.stat().st_size if path.is_file() else 0
    return size


def _refuse(
    path: Path, entry: Mapping[str, Any], size: int, digest: Callable[[], str], where: Mapping[str, object]
) -> None:
    """Raise CacheDamageError unless a file's size and SHA-256 are the recorded ones."""
    if size != entry["bytes"]:
        raise CacheDamageError(
            "a file of the cache has another size",
            file=path,
            **where,
            found=f"{size} bytes",
            expected=f"{entry['bytes']} bytes",
            try_="kd cache repair",
        )
    if digest() != entry["sha256"]:
        raise CacheDamageError(
            "a file of the cache was changed",
            file=path,
            **where,
            found="another SHA-256 than committed",
            try_="kd cache repair",
        )
