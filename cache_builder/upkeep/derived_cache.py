"""Write a cache out of pieces of other caches, without a teacher: what slicing and merging share.

Rows that need not change are copied as they are stored, to the bit. A killed call leaves whole shards; the same call continues.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.store.example_table import example_schema, gaps_at
from kd.cache_builder.store.lengths import Lengths
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.cache_identity import refuse_mismatch
from kd.cache_builder.store.records.manifest import CacheManifest
from kd.cache_builder.store.records.shard_table import ShardTable
from kd.cache_builder.store.shard_store import Shard
from kd.cache_builder.store.targets import TargetConfig
from kd.cache_builder.store.vocabulary import codes_by_count
from kd.cache_builder.store.writers.shard_writer import ShardWriter
from kd.cache_builder.upkeep.conversion import converted, measured
from kd.cache_builder.upkeep.redrawn_tails import row_uniforms
from kd.common.files import write_error
from kd.common.progress import Progress
from kd.common.shown_text import public_place
from kd.data.left_out import joined, recorded
from kd.data.tokenizing.token_notes import joined_notes


@dataclass(frozen=True)
class Piece:
    """Consecutive examples of one shard of one reader."""

    source: int
    """Number of the reader."""
    shard: int
    first: int
    """Number of the first example in the shard."""
    stop: int
    """One past the last."""


@dataclass(frozen=True)
class DerivedCache:
    """A cache that is going to be made of pieces of other caches."""

    readers: Sequence[CacheReader]
    identity: dict[str, Any]
    """Of the new cache."""
    config: TargetConfig
    """What is kept of each row; where it is that of the readers, rows are copied as they are stored."""
    shards: list[list[Piece]]
    """The pieces of each new shard."""
    made_from: str
    """Recorded in the provenance."""

    def manifest(self, out: Path) -> CacheManifest:
        """The manifest of the cache in `out`, or that of a new one. Raises CacheMismatchError where `out` holds another cache."""
        existing = commits.existing_cache(out)
        if existing is not None:
            refuse_mismatch(out, self.identity, existing)
            return existing
        table = _shard_table(self.readers, self.shards)
        return CacheManifest(
            identity=self.identity,
            layout=max((r.manifest.layout for r in self.readers), key=lambda layout: layout.shard_rows),
            examples=table.example_count,
            rows=table.row_count,
            shards=table,
            files={},
            provenance=_provenance(self.readers, self.made_from),
        )

    def cost(self, out: Path) -> dict[str, Any]:
        """What would be written to `out`; bytes are those of the arrays before compression, and of the examples as they are."""
        manifest = self.manifest(out)
        used = {(p.source, p.shard) for pieces in self.shards for p in pieces}
        text = sum(_example_bytes(self.readers[source], shard) for source, shard in used)
        return {
            "fingerprint": manifest.fingerprint,
            "examples": manifest.examples,
            "rows": manifest.rows,
            "shards": len(manifest.shards),
            "bytes_at_most": manifest.rows * sum(a.row_bytes for a in manifest.arrays) + text,
            "committed_shards": len(commits.committed(out, len(manifest.shards))),
        }


def write_derived(planned: DerivedCache, out: Path) -> Iterator[Progress[Path]]:
    """Write a cache to `out`; yields progress in shards. The same call continues.

    Raises CacheMismatchError where `out` holds another cache, CacheError where it cannot be written.
    """
    readers, shards, config = planned.readers, planned.shards, planned.config
    manifest = planned.manifest(out)
    writer = ShardWriter(out, manifest)
    try:
        writer.sweep()
        if not manifest.complete:
            vocabulary = readers[0].vocabulary()
            codes = codes_by_count(len(vocabulary), _sequences(readers, shards))
            manifest = writer.create(vocabulary, codes, _lengths(readers, shards))
        writer.recover()
        present = set(commits.committed(out, len(shards)))
        commits.check_sizes(out, manifest, present)
        for index, pieces in enumerate(shards):
            if index not in present:
                whole = all(_is_whole(readers[p.source], p) for p in pieces) and config.keeps_as(readers[0].config)
                quality = _summed(readers, pieces) if whole else None
                _write(writer, index, [_taken(readers[p.source], p, config) for p in pieces], config, quality)
            yield Progress(index + 1, len(shards), note=f"shard {index + 1}/{len(shards)}")
        if manifest.complete:
            writer.tidy()  # a run that was killed at its very end has left its `building.json`
        else:
            writer.finish()
    except OSError as error:
        raise write_error(out, error) from error
    finally:
        writer.close()
    yield Progress(len(shards), len(shards), out, "complete")


def _provenance(readers: Sequence[CacheReader], made_from: str) -> dict[str, Any]:
    """Where the new cache comes from: what the first cache says, and what was left out of all of them."""
    left_out = joined(filter(None, (recorded(reader.manifest.provenance) for reader in readers)))
    provenance = {**readers[0].manifest.provenance, "derived_from": public_place(made_from), "options": None}
    provenance |= {"left_out": left_out.document(), "token_notes": joined_notes(r.manifest.provenance for r in readers)}
    if not all("text_rules" in r.manifest.provenance for r in readers):
        provenance.pop("text_rules", None)
    return provenance


def _example_bytes(reader: CacheReader, shard: int) -> int:
    """Bytes of the file with the examples of a shard."""
    name = commits.shard_files(reader.manifest.arrays, shard)["examples"]
    return int(reader.files.read_commit(reader.manifest, shard).files[name]["bytes"])


def _shard_table(readers: Sequence[CacheReader], shards: list[list[Piece]]) -> ShardTable:
    """Examples and rows of the new shards."""
    lengths = [r.lengths()[1] for r in readers]
    examples, rows = np.zeros(len(shards), dtype=np.int64), np.zeros(len(shards), dtype=np.int64)
    for number, pieces in enumerate(shards):
        for p in pieces:
            start = readers[p.source].manifest.shards[p.shard][0]
            examples[number] += p.stop - p.first
            rows[number] += int(lengths[p.source][start + p.first : start + p.stop].sum())
    return ShardTable(examples, rows)


def _lengths(readers: Sequence[CacheReader], shards: list[list[Piece]]) -> Iterator[Lengths]:
    """Tokens and rows of the new examples, piece by piece."""
    for p in (p for pieces in shards for p in pieces):
        start = readers[p.source].manifest.shards[p.shard][0]
        yield readers[p.source].lengths(start + p.first, start + p.stop)


def _sequences(readers: Sequence[CacheReader], shards: list[list[Piece]]) -> Iterator[np.ndarray]:
    """The token ids of every example, for the table of codes."""
    for piece in (p for pieces in shards for p in pieces):
        shard = readers[piece.source].shard(piece.shard)
        table = shard.examples
        for i in range(piece.first, piece.stop):
            yield table["context_ids"][i]
            yield gaps_at(table, i).ids
            yield shard.arrays["gold_ids"][table["row_start"][i] : table["row_end"][i]].astype(np.int64)


def _is_whole(reader: CacheReader, piece: Piece) -> bool:
    first, stop, _ = reader.manifest.shards[piece.shard]
    return (piece.first, piece.stop) == (0, stop - first)


def _summed(readers: Sequence[CacheReader], pieces: list[Piece]) -> dict[str, float]:
    """Sums of the quality figures that the build has measured of these shards."""
    total: dict[str, float] = {}
    for p in pieces:
        reader = readers[p.source]
        for name, value in reader.files.read_commit(reader.manifest, p.shard).quality.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _taken(reader: CacheReader, piece: Piece, config: TargetConfig) -> Shard:
    """The rows and examples of a piece, as `config` keeps them."""
    shard = reader.shard(piece.shard)
    table = {name: column[piece.first : piece.stop] for name, column in shard.examples.items()}
    rows = slice(table["row_start"][0], table["row_end"][-1])
    arrays = {name: shard.part(name, rows) for name in shard.arrays}
    manifest, uniforms = reader.manifest, None
    if config.tail_samples:
        uniforms = row_uniforms(manifest.fingerprint, piece.shard, rows.start, rows.stop)
    new = converted(arrays, reader.config, config, manifest.vocabulary_size, uniforms)
    return replace(shard, arrays=new, examples=table)


def _write(
    writer: ShardWriter, index: int, parts: list[Shard], config: TargetConfig, quality: dict[str, float] | None
) -> None:
    names = parts[0].arrays
    stored = {name: np.concatenate([p.arrays[name] for p in parts]) for name in names}
    columns = [name for name in example_schema(writer.manifest.kind, 3).names if name != "rows"]
    examples = []
    for part in parts:
        for i, start in enumerate(part.examples["row_start"]):
            row = {name: part.examples[name][i] for name in columns}
            examples.append(row | {"rows": part.examples["row_end"][i] - start})
    writer.write(index, stored, examples, measured(stored, config) if quality is None else quality)
