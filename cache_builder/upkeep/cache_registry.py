"""Find caches: those that were finished on this machine, by fingerprint, and those below a folder.

`$KD_HOME/registry/` holds one small JSON file per finished cache, with its path and fingerprint. The files are hints: each path
is checked before it is used, and a cache that moved or is gone is left out.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from kd.cache_builder.store.cache_files import bytes_below, recorded_bytes
from kd.cache_builder.store.records.commits import committed
from kd.cache_builder.store.records.manifest import BUILDING, MANIFEST, CacheManifest, load_manifest
from kd.cache_builder.store.records.part import load_part
from kd.common.disk.home import kd_home
from kd.common.errors import CacheError, KdError
from kd.common.files import canonical_json, digest_of, read_json, write_atomic
from kd.common.paths import cache_folder
from kd.common.shown_text import public_place

PREFIX = re.compile(r"[0-9a-f]{8,64}")
"""The beginning of a fingerprint, which may stand for a cache in place of its path."""


PLACES = ("teacher", "teacher_adapter", "tokenizer", "spec", "task_root", "extend")
"""Options of a build that say where something lies."""


def public_options(options: Mapping[str, str | bool]) -> dict[str, str | bool]:
    """A build's options as its manifest holds them: of absolute paths the last name, and no secrets."""
    return {
        name: public_place(value) if name in PLACES and isinstance(value, str) else value
        for name, value in options.items()
    }


def remember(root: Path, options: Mapping[str, str | bool] | None = None) -> None:
    """Register a finished cache. Where the registry cannot be written, nothing happens.

    options   of its build, with the places that are not in the manifest: `kd cache repair` on this machine finds them here
    """
    path, manifest = root.resolve(), load_manifest(root)
    entry: dict[str, Any] = {"path": str(path), "fingerprint": manifest.fingerprint}
    if options is not None:
        entry["places"] = {name: options[name] for name in PLACES if name in options}
    try:
        write_atomic(kd_home() / "registry" / f"{digest_of(str(path))[:32]}.json", canonical_json(entry))
    except OSError:
        return


def places_of(manifest: CacheManifest) -> dict[str, str]:
    """Where this machine's build of a cache found its teacher and text, by option; what the manifest says otherwise is left out."""
    recorded = manifest.provenance.get("options") or {}
    for note in sorted((kd_home() / "registry").glob("*.json")):
        with suppress(KdError):
            entry = read_json(note)
            places = entry.get("places")
            if entry.get("fingerprint") == manifest.fingerprint and isinstance(places, dict):
                return {
                    n: str(address) for n, address in places.items() if public_place(str(address)) == recorded.get(n)
                }
    return {}


def remembered() -> Iterator[Path]:
    """Paths of the registered caches that still exist."""
    for note in sorted((kd_home() / "registry").glob("*.json")):
        try:
            path = Path(str(read_json(note)["path"]))
        except (KdError, KeyError):
            continue
        if is_cache(path):
            yield path


def is_cache(path: Path) -> bool:
    """True if a folder looks like a cache, finished or not."""
    return any((path / name).is_file() for name in (MANIFEST, BUILDING))


def caches_below(root: Path) -> Iterator[Path]:
    """Paths of all caches in or below a folder. Links are not followed; hidden folders are left out."""
    for folder, names, _ in os.walk(root):
        if is_cache(Path(folder)):
            names.clear()
            yield Path(folder)
        names[:] = sorted(n for n in names if not n.startswith("."))


def caches_with(fingerprint: str) -> list[Path]:
    """Paths of the registered, finished caches whose fingerprint is this, or begins like this."""
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
    """The folder of a cache that is named by its path, or by the beginning of its fingerprint. Raises CacheError or DataError."""
    folder = cache_folder(cache)
    if os.path.exists(folder) or not PREFIX.fullmatch(str(cache)):
        return folder
    paths = caches_with(str(cache))
    if len({load_manifest(p).fingerprint for p in paths}) > 1:
        raise CacheError(
            "several caches have a fingerprint that begins like this",
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
    """The rows of `kd cache ls`: the caches below `root`, or the registered ones; a damaged cache has its error."""
    rows: list[dict[str, Any]] = []
    for path in caches_below(root) if root is not None else remembered():
        try:
            manifest = load_manifest(path)
            size = recorded_bytes(manifest, load_part(path, manifest))
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
                "bytes": bytes_below(path) if size is None else size,
            }
        )
    return rows
