"""Caches by fingerprint: those that were finished on this machine, and those below a folder.

`$KD_HOME/registry/` holds one small JSON per finished cache, its path and fingerprint. It is a hint: what it says is looked up
before it is believed, and a cache that moved or is gone is left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kd.cache_builder.store.commits import committed
from kd.cache_builder.store.manifest import BUILDING, MANIFEST, load_manifest
from kd.common.errors import CacheError, KdError
from kd.common.files import canonical_json, digest_of, read_json, write_atomic
from kd.common.home import kd_home

PREFIX = re.compile(r"[0-9a-f]{8,64}")
"""What may stand for a cache in place of its path: the beginning of its fingerprint."""


def remember(root: Path) -> None:
    """Note a finished cache. A home that cannot be written is no reason to fail."""
    path, manifest = root.resolve(), load_manifest(root)
    entry = {"path": str(path), "fingerprint": manifest.fingerprint}
    try:
        write_atomic(kd_home() / "registry" / f"{digest_of(str(path))[:32]}.json", canonical_json(entry))
    except OSError:
        return


def remembered() -> Iterator[Path]:
    """Caches noted on this machine that are still there."""
    for note in sorted((kd_home() / "registry").glob("*.json")):
        try:
            path = Path(str(read_json(note)["path"]))
        except (KdError, KeyError):
            continue
        if is_cache(path):
            yield path


def is_cache(path: Path) -> bool:
    """Does a folder look like a cache, finished or not?"""
    return any((path / name).is_file() for name in (MANIFEST, BUILDING))


def caches_below(root: Path) -> Iterator[Path]:
    """Every cache in or below a folder; links are not followed, hidden folders are left out."""
    for folder, names, _ in os.walk(root):
        if is_cache(Path(folder)):
            names.clear()
            yield Path(folder)
        names[:] = sorted(n for n in names if not n.startswith("."))


def found(fingerprint: str) -> list[Path]:
    """Finished caches of this machine with a fingerprint, or with one that begins so."""
    paths = []
    for path in remembered():
        try:
            manifest = load_manifest(path)
        except KdError:
            continue
        if manifest.complete and manifest.fingerprint.startswith(fingerprint):
            paths.append(path)
    return paths


def located(cache: str | Path) -> Path:
    """The folder of a cache named by its path, or by the beginning of its fingerprint. Raises CacheError."""
    if Path(cache).exists() or not PREFIX.fullmatch(str(cache)):
        return Path(cache)
    paths = found(str(cache))
    if len({load_manifest(p).fingerprint for p in paths}) > 1:
        raise CacheError(
            "several caches begin like this",
            found=cache,
            known=", ".join(map(str, paths)),
            try_="more of the fingerprint, or the path",
        )
    if not paths:
        raise CacheError(
            "no cache of this machine has that fingerprint",
            found=cache,
            where=kd_home() / "registry",
            try_="kd cache ls, or the path",
        )
    return paths[0]


def listing(root: Path | None = None) -> list[dict[str, Any]]:
    """What `kd cache ls` shows: the caches below `root`, or those remembered; a damaged one with its error."""
    rows: list[dict[str, Any]] = []
    for path in caches_below(root) if root is not None else remembered():
        try:
            manifest = load_manifest(path)
        except KdError as error:
            rows.append({"path": str(path), "fingerprint": None, "error": error.headline})
            continue
        done = len(manifest.shards) if manifest.complete else len(committed(path, len(manifest.shards)))
        rows.append(
            {
                "path": str(path),
                "fingerprint": manifest.fingerprint,
                "complete": manifest.complete,
                "shards": len(manifest.shards),
                "shards_committed": done,
                "teacher": manifest.provenance.get("teacher"),
                "corpus": manifest.provenance.get("corpus"),
                "profile": manifest.targets.profile,
                "top_k": manifest.targets.top_k,
                "examples": manifest.examples,
                "rows": manifest.rows,
                "bytes": sum(p.stat().st_size for p in path.rglob("*") if p.is_file()),
            }
        )
    return rows
