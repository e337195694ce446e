"""`ShardRecord`: the content of a shard's commit, read within bounds."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd.cache_builder.store.records.manifest_checks import bounded_count, check_inside, file_table
from kd.common.errors import CacheDamageError
from kd.common.files import digest_of


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
    """Fingerprint of the cache that the shard belongs to."""

    @property
    def bytes(self) -> int:
        """Size of the shard's files in bytes."""
        return sum(int(entry["bytes"]) for entry in self.files.values())


def parse_shard_record(document: dict[str, Any], where: Path) -> ShardRecord:
    """A commit file's document as a record. Raises CacheDamageError where it is none.

    The document's checksum covers everything else in it. The first releases did not write one; the commits of a finished cache
    are also in its manifest.
    """
    content = {name: value for name, value in document.items() if name != "checksum"}
    if document.get("checksum") not in (None, digest_of(content)) or set(content) != set(
        ShardRecord.__dataclass_fields__
    ):
        raise CacheDamageError("a commit was changed", where=where)
    try:
        first, stop = document["examples"][0], document["examples"][1]
        record = ShardRecord(
            index=bounded_count(document["index"]),
            examples=(bounded_count(first), bounded_count(stop)),
            row_start=bounded_count(document["row_start"]),
            rows=bounded_count(document["rows"]),
            files=file_table(document["files"]),
            quality={str(k): float(v) for k, v in document["quality"].items()},
            fingerprint=str(document["fingerprint"]),
        )
        for name in record.files:
            check_inside(name)
    except Exception as error:  # a damaged or hostile document can break any of the above in any way
        raise CacheDamageError(
            "a commit cannot be read", where=where, found=f"{type(error).__name__}: {error}"
        ) from error
    return record
