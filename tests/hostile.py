"""What a stranger may do to a cache: change anything, and make every digest fit again."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records.cache_tables import COMMITS, load_commit_table, write_commit_table
from kd.cache_builder.store.records.commit_table import CommitTable
from kd.cache_builder.store.records.commits import file_entry
from kd.cache_builder.store.records.manifest import fingerprint_of
from kd.cache_builder.upkeep.summary import cache_summary
from kd.cache_builder.upkeep.verify import verify
from kd.common.files import canonical_json, digest_of, sha256_of


def sign_commit(root: Path, document: dict[str, Any], index: int = 0) -> None:
    """Write a commit with its checksum, and its digest into the manifest."""
    document = {k: v for k, v in document.items() if k != "checksum"}
    path = root / "commits" / f"{index:05d}.json"
    path.write_text(canonical_json(document | {"checksum": digest_of(document)}))
    manifest = json.loads((root / "manifest.json").read_text())
    arrays = [a["name"] for a in manifest["arrays"]]
    table = load_commit_table(root, manifest["files"][COMMITS], manifest["shards"], arrays)
    digests = [sha256_of(path) if i == index else digest for i, digest in enumerate(table)]
    sizes = {name: column.copy() for name, column in table.stored.items()}
    sizes["commit"][index] = path.stat().st_size
    for name in document["files"] if isinstance(document.get("files"), dict) else ():
        array = name.split("/")[1] if name.startswith("targets.zarr/") and name.count("/") > 1 else "examples"
        if array in sizes:
            sizes[array][index] = document["files"][name]["bytes"]
    change_table(root, COMMITS, lambda file: write_commit_table(file, CommitTable.from_hex(digests, sizes)))


def change_table(root: Path, name: str, write: Callable[[Path], None]) -> None:
    """Write another table, and sign for it."""
    write(root / name)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["files"][name] = file_entry(root / name)
    if name == COMMITS:
        with suppress(Exception):  # where it cannot be read, nobody compares the sums
            table = pq.read_table(root / name)
            manifest["bytes"] = {n[6:]: pc.sum(table[n]).as_py() for n in table.column_names if n != "sha256"}
    sign_manifest(root, manifest)


def sign_manifest(root: Path, document: dict[str, Any]) -> None:
    """Write a manifest with fingerprint and checksum."""
    document = {k: v for k, v in document.items() if k != "checksum"}
    if isinstance(document.get("identity"), dict):
        with suppress(Exception):  # of an identity that is none
            document["fingerprint"] = fingerprint_of(document["identity"], document["format_version"])
    (root / "manifest.json").write_text(canonical_json(document | {"checksum": digest_of(document)}))


def change_manifest(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((root / "manifest.json").read_text())
    change(document)
    sign_manifest(root, document)


def change_file(root: Path, name: str, data: bytes, index: int = 0) -> None:
    """Put other bytes into a shard's file, and sign for them."""
    (root / name).write_bytes(data)
    document = json.loads((root / "commits" / f"{index:05d}.json").read_text())
    document["files"][name] = file_entry(root / name)
    sign_commit(root, document, index)


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_socket(path: Path) -> None:
    path.unlink()
    os.mknod(path, stat.S_IFSOCK | 0o600)  # binding one would need a short path


def a_link_to_an_endless_device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def a_link_to_a_terminal(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/ptmx")


def a_link_to_the_same_bytes_elsewhere(path: Path) -> None:
    elsewhere = Path(tempfile.mkdtemp()) / path.name
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


def a_link_to_nothing(path: Path) -> None:
    path.unlink()
    path.symlink_to("nothing")


def a_link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


NOT_PLAIN = (
    a_pipe,
    a_folder,
    a_socket,
    a_link_to_an_endless_device,
    a_link_to_a_terminal,
    a_link_to_the_same_bytes_elsewhere,
    a_link_to_nothing,
    a_link_to_itself,
)
"""Each puts something else in the place of a file."""


def use_everything(root: Path) -> None:
    """Everything that somebody who got this cache would do with it."""
    reader = CacheReader(root)
    reader.vocabulary()
    reader.lengths()
    reader.epoch_order(0, 0)
    for number in range(len(reader)):
        reader.read([number])
    cache_summary(root)
    for _ in verify(root):
        pass
