"""`CacheManifest`: what a cache was made from, how it is laid out, and its fingerprint.

The *identity* holds everything that can change a stored value (teacher, tokenizer, text, blocks, targets) and
nothing else; its digest is the fingerprint. Batch size, device count, paths, shard size and dates are not in it.
`building.json` holds the same document while a build runs. `manifest.json` replaces it at the end, with the quality figures. The
last entry is a checksum over everything else. No dates are stored, so a resumed build is byte-identical to an unbroken one.
What grows with the number of shards is not in the document but in two tables beside it (`cache_tables`), which are read with it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from kd.cache_builder.store.encoding.arrays import ArraySpec
from kd.cache_builder.store.encoding.codecs import array_specs
from kd.cache_builder.store.encoding.logprob_codecs import CODECS
from kd.cache_builder.store.records.cache_tables import (
    COMMITS,
    MAX_TABLE_FILE,
    SHARDS,
    TABLES,
    load_commit_table,
    load_shard_table,
)
from kd.cache_builder.store.records.commit_table import CommitTable
from kd.cache_builder.store.records.manifest_checks import (
    MAX_SHARD_ROWS,
    MAX_SHARDS,
    bounded_count,
    check_bounds,
    check_file_names,
    check_inside,
    check_shard_table,
    file_table,
    length_pages,
)
from kd.cache_builder.store.records.shard_table import ShardTable
from kd.cache_builder.store.records.teacher_record import (
    gold_in_top_k,
    logprobs_only,
    refuse_beyond_logprobs,
    tail_unknown,
    weights_unknown,
)
from kd.cache_builder.store.targets import TargetConfig
from kd.common.errors import CacheDamageError, CacheError, CacheMismatchError
from kd.common.files import canonical_json, digest_of, read_json, write_atomic
from kd.common.paths import as_path
from kd.common.synonyms import nearest_name
from kd.data.conversations.conversation import CONVERSATIONS
from kd.data.tokenizing.block_config import BlockConfig
from kd.data.tokenizing.text_tokens import CONTROL_TOKENS

FORMAT = "kd-cache"
FORMAT_VERSION = 3
"""The version in which new caches are written."""
RELEASED_VERSIONS = (1, 2, 3)
"""Versions whose caches every later release reads; tests/golden has stores of each. What differs is in docs/cache-format.md."""
OLDEST_CONTINUED = 2
"""The oldest version whose unfinished builds are continued, each in its own version."""
MANIFEST, BUILDING = "manifest.json", "building.json"
TARGETS, VOCABULARY = "targets.zarr", "vocabulary.parquet"
MANY_SHARDS = 2**17
"""From here on a new cache has larger shards, not more of them: 10 billion rows are 76,294 shards of 131,072 rows."""
ANSWERS = "generated"
"""Folder of the teacher's answers, in a cache whose targets the teacher wrote; see `generate`."""


@dataclass(frozen=True)
class Layout:
    """How rows are grouped into files. It is not part of the identity."""

    shard_rows: int = 32768
    """Rows per shard, the unit of writing, committing and resuming."""
    chunk_rows: int = 4096
    """Rows per inner Zarr chunk, the unit of decoding and of the crc32c."""

    @classmethod
    def for_rows(cls, rows: int) -> Layout:
        """The layout of a new cache of this many rows. Shards grow where there would be more than `MANY_SHARDS` of them."""
        shard_rows = cls.shard_rows
        while rows > MANY_SHARDS * shard_rows and 2 * shard_rows <= MAX_SHARD_ROWS:
            shard_rows *= 2
        return cls(shard_rows)

    def __post_init__(self) -> None:
        if not 1 <= self.chunk_rows <= self.shard_rows or self.shard_rows % self.chunk_rows:
            raise CacheError(
                "the shard size does not fit the chunk size",
                found=f"{self.shard_rows} rows",
                expected=f"a multiple of {self.chunk_rows}",
            )


@dataclass(frozen=True)
class CacheManifest:
    """The document in `manifest.json` (or `building.json`)."""

    identity: dict[str, Any]
    """What the cache was made from: teacher, tokenizer, corpus, blocks, targets."""
    layout: Layout
    examples: int
    rows: int
    shards: ShardTable
    """Per shard: first example, one past the last, rows."""
    files: dict[str, dict[str, Any]]
    """Files outside shards (Zarr metadata, vocabulary, tables, lengths) with bytes and SHA-256."""
    provenance: dict[str, Any]
    """Names, paths and versions for people to read; no stored value depends on them."""
    quality: dict[str, float] = field(default_factory=dict)
    """Sums over all rows; empty while building."""
    commits: CommitTable = field(default_factory=CommitTable.none)
    """SHA-256 of each commit file; empty while building."""
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Digest of the identity, and of the rules by which values are stored."""
        return fingerprint_of(self.identity, self.format_version)

    @property
    def rows_digest(self) -> str:
        """Digest of what was asked of which teacher, in which order: equal where two caches differ in what they keep alone."""
        asked = {name: value for name, value in self.identity.items() if name != "targets"}
        return digest_of({"identity": asked, "shard_rows": self.layout.shard_rows})

    @property
    def complete(self) -> bool:
        """True when the manifest lists a commit for every shard."""
        return len(self.commits) == len(self.shards)

    @property
    def targets(self) -> TargetConfig:
        """What is kept of each row."""
        values = dict(self.identity["targets"])
        for name in ("temperatures", "band_temperatures"):
            values[name] = tuple(float(t) for t in values[name])
        return TargetConfig(**values)

    @property
    def blocks(self) -> BlockConfig:
        """How text was cut into rows."""
        control = self.provenance.get("control_tokens", "control")  # older caches read every control token as such
        if control not in CONTROL_TOKENS:
            raise CacheError("an unknown way to read control tokens", found=control, expected=", ".join(CONTROL_TOKENS))
        return BlockConfig.from_identity({**self.identity["blocks"], "control_tokens": control})

    @property
    def kind(self) -> str:
        """Kind of the corpus: documents, pairs, conversations or classes."""
        return str(self.identity["corpus"]["kind"])

    @property
    def vocabulary_size(self) -> int:
        """Number of ids in the teacher's distribution."""
        return int(self.identity["teacher"]["vocabulary_size"])

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes, in a cache of a classifier; empty otherwise."""
        return tuple(self.identity["tokenizer"].get("labels", ()))

    @property
    def logprobs_only(self) -> bool:
        """True where the teacher gave log-probabilities at temperature 1 and no logits, see `teacher_record`."""
        return logprobs_only(self.identity["teacher"])

    @property
    def weights_unknown(self) -> bool:
        """True where the teacher's weights could not be digested, so that the fingerprint does not cover them."""
        return weights_unknown(self.identity["teacher"])

    @property
    def gold_in_top_k(self) -> bool:
        """True where the log-probability of a token of the text is known only if it is among the kept ones."""
        return gold_in_top_k(self.identity["teacher"])

    @property
    def tail_unknown(self) -> bool:
        """True where nobody knows the probability beyond the kept tokens; theirs sum to 1."""
        return tail_unknown(self.identity["teacher"])

    @cached_property
    def arrays(self) -> list[ArraySpec]:
        """Every array of `targets.zarr`; kept, because every commit and every file of a cache is compared with it."""
        return array_specs(self.targets, self.vocabulary_size, self.format_version)

    def to_json(self) -> str:
        """Canonical JSON text."""
        document: dict[str, Any] = {
            "format": FORMAT,
            "format_version": self.format_version,
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "layout": asdict(self.layout),
            "arrays": [a.document for a in self.arrays],
            "examples": self.examples,
            "rows": self.rows,
            "files": self.files,
            "provenance": self.provenance,
            "quality": self.quality,
        }
        if self.format_version < 3:
            document |= {"shards": [list(s) for s in self.shards], "commits": list(self.commits)}
        else:
            document |= {"shards": len(self.shards), "bytes": self.commits.totals()}
        return canonical_json(document | {"checksum": digest_of(document)})

    def reopened(self) -> CacheManifest:
        """The manifest of the build that made this cache, as it was before the last shard."""
        files = {name: entry for name, entry in self.files.items() if name != COMMITS}
        return replace(self, commits=CommitTable.none(), quality={}, files=files)

    def save(self, root: Path, name: str) -> None:
        """Write the document under `root`, whole or not at all."""
        write_atomic(root / name, self.to_json())


NEWS = {"min_probability", "tail_samples", "id_codec"}
"""Settings of targets that came with version 3: rows that differ in length, draws from tails, ids as places in lists."""


def needs_third(identity: dict[str, Any]) -> bool:
    """Whether version 3 was the first that could hold a cache of this identity: conversations, and targets with `NEWS`."""
    return identity["corpus"]["kind"] == CONVERSATIONS or not NEWS.isdisjoint(identity["targets"])


def fingerprint_of(identity: dict[str, Any], version: int = FORMAT_VERSION) -> str:
    """Hex digest of an identity, and of the version by whose rules its values are stored.

    From version 2 to 3 no value of documents, pairs or classes changed, so their caches have one fingerprint in both.
    """
    rules = 3 if needs_third(identity) else min(version, 2)
    return digest_of({"format_version": rules, "identity": identity})


def load_manifest(root: str | Path) -> CacheManifest:
    """Read and check a cache's manifest (of a finished or a running build).

    Raises CacheError when `root` is not a cache, CacheMismatchError for an unknown format version, CacheDamageError when the
    document contradicts itself.
    """
    path = _manifest_path(as_path(root))
    document = read_json(path, inside=path.parent)
    checksum = document.pop("checksum", None)
    _check_header(document, checksum, path)
    try:
        return _checked(document, checksum, path.parent)
    except CacheDamageError:  # of a table, which it names
        raise
    except CacheError as error:
        raise CacheDamageError("the manifest contradicts itself", where=path, found=str(error)) from error
    except Exception as error:  # a damaged or hostile document can break any of the above in any way
        raise CacheDamageError(
            "the manifest cannot be read", where=path, found=f"{type(error).__name__}: {error}"
        ) from error


def listed_tables(document: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables that belong to a manifest's document: name -> `bytes` and `sha256`. Raises CacheError for an impossible entry."""
    files = document.get("files")
    if document.get("format_version") != 3 or not isinstance(files, Mapping):
        return {}
    for name in files:
        check_inside(str(name))
    tables = file_table({name: files[name] for name in TABLES if name in files})
    for name, entry in tables.items():
        if entry["bytes"] > MAX_TABLE_FILE:
            raise CacheError("a table of the cache is too large", file=name, expected=f"at most {MAX_TABLE_FILE} bytes")
    return tables


def group_files(arrays: Sequence[ArraySpec]) -> list[str]:
    """Metadata files of the Zarr group, as paths in the cache."""
    return [f"{TARGETS}/zarr.json", *(f"{TARGETS}/{a.name}/zarr.json" for a in arrays)]


def _manifest_path(root: Path) -> Path:
    """The manifest of a finished or a running build. Raises CacheError, or CacheDamageError where only it is missing."""
    path = next((root / name for name in (MANIFEST, BUILDING) if os.path.lexists(root / name)), None)
    if path is not None:
        return path
    if os.path.isdir(root / "commits"):
        raise CacheDamageError(
            "the cache's manifest is missing",
            where=root / MANIFEST,
            try_="the kd cache build command it was made with",
        )
    problem = "no such directory" if not os.path.exists(root) else f"no {MANIFEST} in it"
    raise CacheError(
        "this is not a cache",
        where=root,
        did_you_mean=_cache_beside(root),
        found=problem,
        try_="kd cache build --teacher … --data … --out DIR",
    )


def _cache_beside(root: Path) -> Path | None:
    """The cache in the same folder whose name is spelled most like that of `root`; None where none is near."""
    try:
        names = [path.parent.name for path in root.parent.glob(f"*/{MANIFEST}")]
    except OSError:
        return None
    name = nearest_name(root.name, names)
    return None if name is None else root.parent / name


def _check_header(document: dict[str, Any], checksum: str | None, path: Path) -> None:
    """Raise unless the document is a manifest, of a format version that can be read, and has its checksum."""
    if checksum not in (None, digest_of(document)):  # None: another format, or caught by `_check`
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
    if document.get("format_version") not in RELEASED_VERSIONS:
        raise CacheMismatchError(
            "this cache has another format version",
            where=path,
            found=document.get("format_version"),
            expected=f"one of {RELEASED_VERSIONS}",
            try_="a kd release that reads it",
        )
    if document["format_version"] == 3 and isinstance(document.get("shards"), list):
        raise CacheMismatchError(
            "this cache was made by a draft of format version 3, which was never released",
            where=path,
            try_="build it again",
        )


def _checked(document: dict[str, Any], checksum: str | None, root: Path) -> CacheManifest:
    """The manifest of a document, with the tables beside it. Raises whatever a hostile document leads to."""
    if checksum is None:
        raise CacheError("it has no checksum")
    manifest = _parse(document)
    _check(manifest, document)
    if manifest.format_version < 3:
        manifest = replace(manifest, **_inner_tables(document))
    else:
        manifest = replace(manifest, **_tables_beside(manifest, document, root))
    check_shard_table(manifest.shards, manifest.layout.shard_rows, manifest.examples, manifest.rows)
    if len(manifest.commits) and not manifest.complete:
        raise CacheError("commit table does not cover the shards")
    return manifest


def _inner_tables(document: dict[str, Any]) -> dict[str, Any]:
    """`shards` and `commits` of a manifest before format version 3, which held them itself."""
    triples = ((bounded_count(a), bounded_count(b), bounded_count(r)) for a, b, r in document["shards"])
    return {"shards": ShardTable.from_triples(triples), "commits": CommitTable.from_hex(document["commits"])}


def _tables_beside(manifest: CacheManifest, document: dict[str, Any], root: Path) -> dict[str, Any]:
    """`shards` and `commits`, from the files beside the manifest. Raises CacheDamageError naming the file."""
    listed, count, commits = listed_tables(document), bounded_count(document["shards"]), CommitTable.none()
    if not 1 <= count <= MAX_SHARDS:
        raise CacheError("the number of shards is out of bounds", found=count, expected=f"1..{MAX_SHARDS}")
    sizes = document["bytes"]
    if COMMITS in listed:
        commits = load_commit_table(root, listed[COMMITS], count, [a.name for a in manifest.arrays])
    if sizes != commits.totals():
        raise CacheError("the sizes in it are not those of the table of commits")
    return {"shards": load_shard_table(root, listed[SHARDS], count), "commits": commits}


def _parse(document: dict[str, Any]) -> CacheManifest:
    """A manifest without its tables."""
    return CacheManifest(
        identity=document["identity"],
        layout=Layout(**{k: bounded_count(v) for k, v in document["layout"].items()}),
        examples=bounded_count(document["examples"]),
        rows=bounded_count(document["rows"]),
        shards=ShardTable.none(),
        files=file_table(document["files"]),
        provenance=dict(document["provenance"]),
        quality={str(k): float(v) for k, v in document["quality"].items()},
        format_version=int(document["format_version"]),
    )


def _check(manifest: CacheManifest, document: dict[str, Any]) -> None:
    """Raise CacheError where the parts of a manifest contradict each other or exceed their bounds."""
    if document["fingerprint"] != manifest.fingerprint:
        raise CacheError(
            "fingerprint does not match the identity", found=document["fingerprint"], expected=manifest.fingerprint
        )
    if manifest.format_version < 3 and needs_third(manifest.identity):
        raise CacheError("what this cache holds came with format version 3")
    if not 1 <= manifest.vocabulary_size <= 2**31:
        raise CacheError("vocabulary size out of bounds", found=manifest.vocabulary_size)
    if manifest.targets.logprob_codec not in CODECS:
        raise CacheError("unknown log-probability codec", found=manifest.targets.logprob_codec)
    manifest.targets.check_vocabulary(manifest.vocabulary_size)
    if manifest.logprobs_only:
        refuse_beyond_logprobs(manifest.targets, None)
    check_bounds(manifest.arrays, manifest.layout.shard_rows)
    if document["arrays"] != [a.document for a in manifest.arrays]:
        raise CacheError("array table does not match the target settings")
    required = [*group_files(manifest.arrays), VOCABULARY]
    if manifest.format_version == 3:
        required += [SHARDS, *length_pages(manifest.examples)]
    check_file_names(manifest.files, required)
