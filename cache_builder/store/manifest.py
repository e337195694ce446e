"""`CacheManifest`: what a cache was made from, how it is laid out, and its fingerprint.

The *identity* holds everything that can change a stored value (teacher, tokenizer, text, blocks, targets) and
nothing else; its digest is the fingerprint. Batch size, device count, paths, shard size and dates are not in it.
`building.json` holds the same document while a build runs; `manifest.json` replaces it, last of all, with the
shard table and the quality figures. A checksum over all else ends the document. Dates are nowhere: a resumed
build is byte-identical to an unbroken one.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kd.cache_builder.store.arrays import ArraySpec
from kd.cache_builder.store.codecs import array_specs
from kd.cache_builder.store.logprob_codecs import CODECS
from kd.cache_builder.store.targets import TargetConfig
from kd.common.errors import CacheDamageError, CacheError, CacheMismatchError
from kd.common.files import canonical_json, digest_of, read_json, unfinished, write_atomic
from kd.data.blocks import BlockConfig

FORMAT = "kd-cache"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
"""1 stored raw ids, normalisers and byte ends row by row; see docs/cache-format.md."""
MANIFEST, BUILDING = "manifest.json", "building.json"
TARGETS, VOCABULARY = "targets.zarr", "vocabulary.parquet"
ANSWERS = "generated"
"""Folder of the teacher's answers, where it wrote the targets; see `generate`."""
MAX_ROWS = 2**40
"""Bound on any row count a manifest may claim."""
MAX_SHARD_ROWS, MAX_ARRAY_BYTES = 2**24, 2**34
"""Bounds on what reading one shard may allocate per array (the default shard holds 2 MB of ids at k=64)."""


@dataclass(frozen=True)
class Layout:
    """How rows are grouped into files; not part of the identity."""

    shard_rows: int = 32768
    """Row slots per shard: the unit of writing, committing and resuming."""
    chunk_rows: int = 4096
    """Rows per inner Zarr chunk: the unit of reading and of the crc32c."""

    def __post_init__(self) -> None:
        if not 1 <= self.chunk_rows <= self.shard_rows or self.shard_rows % self.chunk_rows:
            raise CacheError(
                "the shard size does not fit the chunk size",
                found=f"{self.shard_rows} rows",
                expected=f"a multiple of {self.chunk_rows}",
            )


@dataclass(frozen=True)
class ShardRecord:
    """One whole shard on disk. It exists if and only if its commit file does."""

    index: int
    examples: tuple[int, int]
    """First example and one past the last, numbered over the cache."""
    row_start: int
    """Address of the first row in every array: index * shard_rows."""
    rows: int
    files: dict[str, dict[str, Any]]
    """Path in the cache -> {"bytes", "sha256"}."""
    quality: dict[str, float]
    """Sums over the rows: see `codecs.encode`."""
    fingerprint: str

    @property
    def bytes(self) -> int:
        """Bytes of the shard's files."""
        return sum(int(entry["bytes"]) for entry in self.files.values())


@dataclass(frozen=True)
class CacheManifest:
    """The document in `manifest.json` (or `building.json`)."""

    identity: dict[str, Any]
    """teacher, tokenizer, corpus, blocks, targets."""
    layout: Layout
    examples: int
    rows: int
    shards: tuple[tuple[int, int, int], ...]
    """Per shard: first example, one past the last, rows."""
    files: dict[str, dict[str, Any]]
    """Files outside shards (Zarr metadata, vocabulary) with bytes and SHA-256."""
    provenance: dict[str, Any]
    """Names, paths and versions, for people; changes no value."""
    quality: dict[str, float] = field(default_factory=dict)
    """Sums over all rows; empty while building."""
    commits: tuple[str, ...] = ()
    """SHA-256 of each commit file; empty while building."""
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Digest of format version and identity."""
        return fingerprint_of(self.identity, self.format_version)

    @property
    def complete(self) -> bool:
        """True when every shard is committed and counted here."""
        return len(self.commits) == len(self.shards)

    @property
    def targets(self) -> TargetConfig:
        """How each row is kept."""
        values = dict(self.identity["targets"])
        for name in ("temperatures", "band_temperatures"):
            values[name] = tuple(float(t) for t in values[name])
        return TargetConfig(**values)

    @property
    def blocks(self) -> BlockConfig:
        """How text became rows."""
        return BlockConfig(**self.identity["blocks"])

    @property
    def vocabulary_size(self) -> int:
        """Ids the teacher's distribution ranges over."""
        return int(self.identity["teacher"]["vocabulary_size"])

    @property
    def labels(self) -> tuple[str, ...]:
        """Words of the classes, where the rows are texts to classify; else empty."""
        return tuple(self.identity["tokenizer"].get("labels", ()))

    @property
    def arrays(self) -> list[ArraySpec]:
        """Every array of `targets.zarr`."""
        return array_specs(self.targets, self.vocabulary_size, self.format_version)

    def to_json(self) -> str:
        """Canonical JSON text."""
        arrays = [{"name": a.name, "dtype": a.dtype, "columns": a.columns} for a in self.arrays]
        document = {
            "format": FORMAT,
            "format_version": self.format_version,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "layout": asdict(self.layout),
            "arrays": arrays,
            "examples": self.examples,
            "rows": self.rows,
            "shards": [list(s) for s in self.shards],
            "files": self.files,
            "provenance": self.provenance,
            "quality": self.quality,
            "commits": list(self.commits),
        }
        return canonical_json(document | {"checksum": digest_of(document)})

    def save(self, root: Path, name: str) -> None:
        """Write the document under `root`, whole or not at all."""
        write_atomic(root / name, self.to_json())


def fingerprint_of(identity: dict[str, Any], version: int = FORMAT_VERSION) -> str:
    """Hex digest of the format version and an identity."""
    return digest_of({"format_version": version, "identity": identity})


def load_manifest(root: Path) -> CacheManifest:
    """Read and check a cache's manifest (of a finished or a running build).

    Raises CacheError when `root` is not a cache, CacheDamageError when the document contradicts itself.
    """
    root = Path(root)
    path = next((root / name for name in (MANIFEST, BUILDING) if (root / name).is_file()), None)
    if path is None:
        if (root / "commits").is_dir():
            raise CacheDamageError(
                "the cache's manifest is missing",
                where=root / MANIFEST,
                try_="the kd cache build command it was made with",
            )
        found = "no such directory" if not root.exists() else f"no {MANIFEST} in it"
        raise CacheError(
            "this is not a cache", where=root, found=found, try_="kd cache build --teacher … --data … --out DIR"
        )
    document = read_json(path)
    checksum = document.pop("checksum", None)
    if checksum not in (None, digest_of(document)):  # None: another format, or caught below
        advice = (
            "kd cache repair --from COPY; or remove it and run its kd cache build command again: committed shards stay"
        )
        raise CacheDamageError(
            "the manifest was changed",
            where=path,
            found=f"content {digest_of(document)}",
            expected=f"checksum {checksum}",
            try_=advice,
        )
    if document.get("format") != FORMAT:
        raise CacheError(
            "this is not a cache", where=path, found=f"format {document.get('format')!r}", expected=repr(FORMAT)
        )
    if document.get("format_version") not in READABLE_VERSIONS:
        raise CacheMismatchError(
            "this cache has another format version",
            where=path,
            found=document.get("format_version"),
            expected=f"one of {READABLE_VERSIONS}",
            try_="a kd release that reads it",
        )
    try:
        manifest = CacheManifest(
            identity=document["identity"],
            layout=Layout(**{k: _count(v) for k, v in document["layout"].items()}),
            examples=_count(document["examples"]),
            rows=_count(document["rows"]),
            shards=tuple((_count(a), _count(b), _count(r)) for a, b, r in document["shards"]),
            files={
                str(k): {"bytes": _count(v["bytes"]), "sha256": str(v["sha256"])} for k, v in document["files"].items()
            },
            provenance=dict(document["provenance"]),
            quality={str(k): float(v) for k, v in document["quality"].items()},
            commits=tuple(str(c) for c in document["commits"]),
            format_version=int(document["format_version"]),
        )
        _check(manifest, document, checksum)
    except CacheError as error:
        raise CacheDamageError("the manifest contradicts itself", where=path, found=str(error)) from error
    except Exception as error:  # a damaged or hostile document can break any of the above in any way
        raise CacheDamageError(
            "the manifest cannot be read", where=path, found=f"{type(error).__name__}: {error}"
        ) from error
    return manifest


def existing_cache(out: Path, own_names: Collection[str]) -> CacheManifest | None:
    """The manifest under `out`, None for a fresh directory; refuses one that holds other things than `own_names`."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise CacheError("the output is not a directory", where=out, try_="another --out")
    if (out / MANIFEST).exists() or (out / BUILDING).exists():
        return load_manifest(out)
    foreign = sorted(p.name for p in out.iterdir() if p.name not in own_names and not unfinished(p.name))
    if foreign:
        raise CacheError(
            "the output directory is not empty and not a cache",
            where=out,
            found=", ".join(foreign[:5]),
            expected="an empty or new directory",
        )
    return None


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_ROWS:
        raise CacheError("a count is out of bounds", found=repr(value)[:80])
    return value


def check_bounds(manifest: CacheManifest) -> None:
    """Refuse shapes whose arrays no reader should be made to allocate."""
    if manifest.layout.shard_rows > MAX_SHARD_ROWS:
        raise CacheError(
            "too many rows per shard",
            found=manifest.layout.shard_rows,
            expected=f"at most {MAX_SHARD_ROWS}",
            try_="a smaller --shard-rows",
        )
    largest = max(manifest.arrays, key=lambda a: a.row_bytes)
    size = largest.row_bytes * manifest.layout.shard_rows
    if size > MAX_ARRAY_BYTES:
        raise CacheError(
            "a shard's array is too large",
            found=f"{largest.name}: {size} bytes",
            expected=f"at most {MAX_ARRAY_BYTES}",
            try_="a smaller --shard-rows",
        )


def _check(manifest: CacheManifest, document: dict[str, Any], checksum: str | None) -> None:
    if checksum is None:
        raise CacheError("it has no checksum")
    if document["fingerprint"] != manifest.fingerprint:
        raise CacheError(
            "fingerprint does not match the identity", found=document["fingerprint"], expected=manifest.fingerprint
        )
    if not 1 <= manifest.vocabulary_size <= 2**31:
        raise CacheError("vocabulary size out of bounds", found=manifest.vocabulary_size)
    if manifest.targets.logprob_codec not in CODECS:
        raise CacheError("unknown log-probability codec", found=manifest.targets.logprob_codec)
    manifest.targets.check_vocabulary(manifest.vocabulary_size)
    check_bounds(manifest)
    expected = [{"name": a.name, "dtype": a.dtype, "columns": a.columns} for a in manifest.arrays]
    if document["arrays"] != expected:
        raise CacheError("array table does not match the target settings")
    position = rows = 0
    for first, stop, count in manifest.shards:
        if first != position or stop <= first or not 1 <= count <= manifest.layout.shard_rows:
            raise CacheError("shard table is not contiguous", found=f"examples {first}:{stop}, {count} rows")
        position, rows = stop, rows + count
    if (position, rows) != (manifest.examples, manifest.rows):
        raise CacheError(
            "shard table does not add up",
            found=f"{position} examples, {rows} rows",
            expected=f"{manifest.examples} examples, {manifest.rows} rows",
        )
    if manifest.commits and not manifest.complete:
        raise CacheError("commit table does not cover the shards")
    for name in manifest.files:
        check_inside(name)
    missing = {*group_files(manifest.arrays), VOCABULARY} - set(manifest.files)
    if missing:
        raise CacheError("files of the cache are not listed", found=", ".join(sorted(missing)))


def group_files(arrays: Sequence[ArraySpec]) -> list[str]:
    """Metadata files of the Zarr group, as paths in the cache."""
    return [f"{TARGETS}/zarr.json", *(f"{TARGETS}/{a.name}/zarr.json" for a in arrays)]


def check_inside(name: str) -> None:
    """Refuse a file name that could leave the cache's directory."""
    parts = name.split("/")
    if name.startswith("/") or "\\" in name or "\0" in name or any(p in ("", ".", "..") for p in parts):
        raise CacheError("a file name leaves the cache's directory", found=repr(name)[:120])


def identity_difference(expected: dict[str, Any], found: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """`(dotted key, expected, found)` of everything that differs between two identities."""
    left, right = _flatten(expected), _flatten(found)
    return [
        (key, left.get(key), right.get(key))
        for key in sorted(left.keys() | right.keys())
        if left.get(key) != right.get(key)
    ]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        k: v for key, item in value.items() for k, v in _flatten(item, f"{prefix}.{key}" if prefix else key).items()
    }


def refuse_mismatch(root: Path, wanted: dict[str, Any], existing: CacheManifest) -> None:
    """Raise CacheMismatchError with the difference, unless `existing` was made from exactly `wanted`."""
    if existing.format_version != FORMAT_VERSION:
        raise CacheMismatchError(
            "the directory holds a cache of an older format",
            cache=root,
            found=f"format version {existing.format_version}",
            expected=FORMAT_VERSION,
            try_="another --out; the old cache can still be read and trained from",
        )
    differences = identity_difference(wanted, existing.identity)
    if differences:
        details = {f"differs {key}": f"asked for {_short(a)}, the cache has {_short(b)}" for key, a, b in differences}
        raise CacheMismatchError(
            "the directory holds a cache made from something else",
            cache=root,
            **details,
            try_="another --out, or the options that cache was built with (kd cache info)",
        )


def _short(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:16] + "…" + text[-8:]


def shard_record(document: dict[str, Any], where: Path) -> ShardRecord:
    """A commit file's document as a record; CacheDamageError when it is not one.

    Its checksum (over all else) was not written by the first releases; a finished cache's commits are in its manifest.
    """
    content = {name: value for name, value in document.items() if name != "checksum"}
    if document.get("checksum") not in (None, digest_of(content)) or set(content) != set(
        ShardRecord.__dataclass_fields__
    ):
        raise CacheDamageError("a commit was changed", where=where)
    try:
        record = ShardRecord(
            index=_count(document["index"]),
            examples=(_count(document["examples"][0]), _count(document["examples"][1])),
            row_start=_count(document["row_start"]),
            rows=_count(document["rows"]),
            files={
                str(k): {"bytes": _count(v["bytes"]), "sha256": str(v["sha256"])} for k, v in document["files"].items()
            },
            quality={str(k): float(v) for k, v in document["quality"].items()},
            fingerprint=str(document["fingerprint"]),
        )
        for name in record.files:
            check_inside(name)
    except Exception as error:  # as in load_manifest
        raise CacheDamageError(
            "a commit cannot be read", where=where, found=f"{type(error).__name__}: {error}"
        ) from error
    return record
