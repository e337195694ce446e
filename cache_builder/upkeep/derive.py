"""Caches out of caches, without a teacher: a slice (fewer tokens per row, another profile, some examples), or a merger.

    for step in slice_cache(path, out, top_k=16, examples=(0, 1000)): ...
    for step in merge_caches([one, two], out): ...

What need not change is copied as it is stored, to the bit. Fewer tokens or a coarser codec are worked out from the decoded rows:
what was kept and is dropped goes into the tail, at every temperature. A slice's fingerprint names what it was cut from.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.store import codecs, commits
from kd.cache_builder.store.arrays import Arrays
from kd.cache_builder.store.logprob_codecs import CODECS, FLOAT16_MIN
from kd.cache_builder.store.manifest import (
    CacheManifest,
    existing_cache,
    refuse_mismatch,
)
from kd.cache_builder.store.mixed_reader import refuse_unlike
from kd.cache_builder.store.reader import CacheReader
from kd.cache_builder.store.shard_store import EXAMPLE_SCHEMA, Shard, ShardWriter
from kd.cache_builder.store.targets import PROFILES, TargetConfig
from kd.cache_builder.store.vocabulary import codes_by_count
from kd.common.errors import DataError
from kd.common.files import digest_of, write_error


@dataclass(frozen=True)
class DeriveProgress:
    """Shards written so far."""

    done: int
    total: int


@dataclass(frozen=True)
class _Piece:
    """Consecutive examples of one shard of one source."""

    source: int
    shard: int
    first: int
    """Numbers inside the shard."""
    stop: int


def sliced_config(
    config: TargetConfig, *, profile: str | None, top_k: int | None, logprob_codec: str | None
) -> TargetConfig:
    """The settings of a slice. Raises DataError for what the cache does not hold."""
    have = PROFILES[config.profile]
    want = PROFILES.get(profile or config.profile)
    if want is None:
        return replace(config, profile=str(profile))  # raises with the list of names
    missing = [
        name
        for name, wanted, held in (
            ("ids", want.ids, have.ids),
            ("top-k log-probabilities", want.top_k, config.top_k),
            ("rank bands", want.tail_bands, config.tail_bands),
            ("draws", want.samples, config.samples),
            ("boundaries", want.boundary, have.boundary),
        )
        if wanted and not held
    ]
    if missing:
        raise DataError(
            "a slice cannot hold what the cache does not",
            found=f"{config.profile} without {', '.join(missing)}",
            expected=f"what profile {profile} keeps",
            try_="a profile that keeps less",
        )
    k = config.top_k if top_k is None else top_k
    if not want.top_k and top_k is not None:
        raise DataError(
            f"the {profile or config.profile} profile keeps no top-k", found=f"--top-k {top_k}", try_="leave it out"
        )
    if want.top_k and not 1 <= k <= config.top_k:
        raise DataError(
            "a slice holds no more tokens per row than the cache", found=f"--top-k {k}", expected=f"1..{config.top_k}"
        )
    if want.tail_bands and k != config.top_k:
        raise DataError(
            "rank bands begin where the stored top-k ends",
            found=f"--top-k {k}",
            expected=config.top_k,
            try_="--profile kl or compact, which keep no bands",
        )
    codec = logprob_codec or (config.logprob_codec if profile in (None, config.profile) else want.logprob_codec)
    return replace(
        config,
        profile=profile or config.profile,
        top_k=k if want.top_k else 0,
        logprob_codec=codec,
        tail_bands=config.tail_bands if want.tail_bands else 0,
        samples=config.samples if want.samples else 0,
    ).normalised()


def slice_cache(
    path: Path,
    out: Path,
    *,
    profile: str | None = None,
    top_k: int | None = None,
    logprob_codec: str | None = None,
    examples: tuple[int, int] | None = None,
) -> Iterator[DeriveProgress]:
    """Write what is asked for of the cache at `path` to `out`; the same call continues. Raises KdError."""
    reader = CacheReader(path)
    config = sliced_config(reader.config, profile=profile, top_k=top_k, logprob_codec=logprob_codec)
    first, stop = examples or (0, len(reader))
    if not 0 <= first < stop <= len(reader):
        raise DataError("no such examples", found=f"--examples {first}:{stop}", expected=f"within 0:{len(reader)}")
    if config == reader.config and (first, stop) == (0, len(reader)):
        raise DataError(
            "this slice would be the whole cache", cache=path, try_="--top-k, --profile, --logprob-codec or --examples"
        )
    identity = reader.manifest.identity | {
        "targets": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()},
        "slice": {"of": reader.manifest.fingerprint, "examples": [first, stop]},
    }
    yield from _derive([reader], out, identity, config, list(_cut(reader, first, stop)), str(path))


def merge_caches(paths: Sequence[Path], out: Path) -> Iterator[DeriveProgress]:
    """Write the examples of several caches, one cache after another, to `out`; the same call continues.

    Raises CacheMismatchError, with the difference, where they are not of one teacher, tokenizer and settings.
    """
    readers = [CacheReader(path) for path in paths]
    refuse_unlike(readers, ("teacher", "tokenizer", "blocks", "targets"), "these caches cannot be merged")
    prints = [r.manifest.fingerprint for r in readers]
    if len(readers) < 2 or len(set(prints)) < len(prints):
        raise DataError("a merger wants two or more different caches", found=", ".join(p[:12] for p in prints))
    first = readers[0].manifest
    corpus = {"kind": first.identity["corpus"]["kind"], "text_digest": digest_of(prints), "merged": prints}
    identity = first.identity | {"corpus": corpus}
    pieces = [
        [_Piece(source, shard, 0, last - start)]
        for source, r in enumerate(readers)
        for shard, (start, last, _) in enumerate(r.manifest.shards)
    ]
    yield from _derive(readers, out, identity, first.targets, pieces, ", ".join(map(str, paths)))


def _cut(reader: CacheReader, first: int, stop: int) -> Iterator[list[_Piece]]:
    """The examples `[first, stop)` in shards as large as the source's."""
    room, pieces = reader.manifest.layout.shard_rows, list[_Piece]()
    _, rows = reader.lengths()
    for shard, (start, last, _) in enumerate(reader.manifest.shards):
        for example in range(max(first, start), min(stop, last)):
            if rows[example] > room:
                yield pieces
                room, pieces = reader.manifest.layout.shard_rows, []
            room -= int(rows[example])
            inside = example - start
            if pieces and pieces[-1].shard == shard:
                pieces[-1] = replace(pieces[-1], stop=inside + 1)
            else:
                pieces.append(_Piece(0, shard, inside, inside + 1))
    yield pieces


def _derive(
    readers: Sequence[CacheReader],
    out: Path,
    identity: dict[str, Any],
    config: TargetConfig,
    shards: list[list[_Piece]],
    made_from: str,
) -> Iterator[DeriveProgress]:
    layout = max((r.manifest.layout for r in readers), key=lambda layout: layout.shard_rows)
    sizes, position = [], 0
    lengths = [r.lengths()[1] for r in readers]
    for pieces in shards:
        rows = count = 0
        for p in pieces:
            start = readers[p.source].manifest.shards[p.shard][0]
            rows += int(lengths[p.source][start + p.first : start + p.stop].sum())
            count += p.stop - p.first
        sizes.append((position, position + count, rows))
        position += count
    provenance = {**readers[0].manifest.provenance, "derived_from": made_from, "options": None}
    existing = existing_cache(out, commits.OWN_NAMES)
    if existing is not None:
        refuse_mismatch(out, identity, existing)
    manifest = existing or CacheManifest(
        identity, layout, position, sum(r for _, _, r in sizes), tuple(sizes), {}, provenance
    )
    writer = ShardWriter(out, manifest)
    try:
        writer.sweep()
        if not manifest.complete:
            vocabulary = readers[0].vocabulary()
            manifest = writer.create(vocabulary, codes_by_count(len(vocabulary), _sequences(readers, shards)))
        present = set(commits.committed(out, len(shards)))
        for index, pieces in enumerate(shards):
            if index not in present:
                whole = all(_is_whole(readers[p.source], p) for p in pieces) and config == readers[0].config
                quality = _summed(readers, pieces) if whole else None
                _write(writer, index, [_taken(readers[p.source], p, config) for p in pieces], config, quality)
            yield DeriveProgress(index + 1, len(shards))
        if not manifest.complete:
            writer.finish()
    except OSError as error:
        raise write_error(out, error) from error
    finally:
        writer.close()


def _sequences(readers: Sequence[CacheReader], shards: list[list[_Piece]]) -> Iterator[np.ndarray]:
    """The tokens of every example, for the table of codes."""
    for piece in (p for pieces in shards for p in pieces):
        shard = readers[piece.source].shard(piece.shard)
        table = shard.examples
        for i in range(piece.first, piece.stop):
            yield table["context_ids"][i]
            yield shard.arrays["gold_ids"][table["row_start"][i] : table["row_end"][i]].astype(np.int64)


def _is_whole(reader: CacheReader, piece: _Piece) -> bool:
    first, stop, _ = reader.manifest.shards[piece.shard]
    return (piece.first, piece.stop) == (0, stop - first)


def _summed(readers: Sequence[CacheReader], pieces: list[_Piece]) -> dict[str, float]:
    """What the build measured of these shards."""
    total: dict[str, float] = {}
    for p in pieces:
        reader = readers[p.source]
        for name, value in commits.read_commit(reader.root, reader.manifest, p.shard).quality.items():
            total[name] = total.get(name, 0.0) + value
    return total


def _taken(reader: CacheReader, piece: _Piece, config: TargetConfig) -> Shard:
    """The rows and examples of a piece, as `config` keeps them."""
    shard = reader.shard(piece.shard)
    table = {name: column[piece.first : piece.stop] for name, column in shard.examples.items()}
    rows = slice(table["row_start"][0], table["row_end"][-1])
    arrays = {name: values[rows] for name, values in shard.arrays.items()}
    return replace(shard, arrays=converted(arrays, reader.config, config), examples=table)


def converted(stored: Arrays, old: TargetConfig, new: TargetConfig) -> Arrays:
    """Stored rows under other settings, which keep no more. The same settings: the same arrays."""
    if old == new and ("log_z" in stored) == (not new.top_k):
        return stored
    kept = {name: stored[name] for name in ("gold_ids", "gold_logprob", "gold_rank", "byte_end")}
    for name, wanted in (
        ("tail_bands", new.tail_bands),
        ("sample_ids", new.samples),
        ("sample_counts", new.samples),
        ("boundary_logprob", PROFILES[new.profile].boundary),
        ("token_ids", new.top_k and PROFILES[new.profile].ids),
    ):
        if wanted:
            kept[name] = stored[name][:, : new.top_k] if name == "token_ids" else stored[name]
    if not new.top_k:
        return kept | {"log_z": codecs.decode(stored, old).log_z}
    relative = CODECS[old.logprob_codec].decode(stored)
    codec = CODECS[new.logprob_codec]
    head = codec.encode(np.ascontiguousarray(relative[:, : new.top_k]))
    before, after = relative.astype(np.float64), codec.decode(head).astype(np.float64)
    odds = np.empty((len(before), len(new.temperatures)))
    for t, temperature in enumerate(new.temperatures):
        mass = np.exp(before / temperature)
        if "tail_odds" in stored:
            tail = np.exp(stored["tail_odds"][:, t].astype(np.float64)) * mass.sum(1)
        else:
            tail = np.maximum(np.exp(stored["log_z"][:, t].astype(np.float64)) - mass.sum(1), 0.0)
        tail += mass[:, new.top_k :].sum(1)
        with np.errstate(divide="ignore"):
            odds[:, t] = np.maximum(np.log(tail / np.exp(after / temperature).sum(1)), FLOAT16_MIN)
    return kept | head | {"tail_odds": odds.astype(codec.tail)}


def _write(
    writer: ShardWriter, index: int, parts: list[Shard], config: TargetConfig, quality: dict[str, float] | None
) -> None:
    names = parts[0].arrays
    stored = {name: np.concatenate([p.arrays[name] for p in parts]) for name in names}
    position = index * writer.manifest.layout.shard_rows
    examples = []
    for part in parts:
        for i, start in enumerate(part.examples["row_start"]):
            stop = position + part.examples["row_end"][i] - start
            row = {name: part.examples[name][i] for name in EXAMPLE_SCHEMA.names}
            examples.append(row | {"row_start": position, "row_end": stop})
            position = stop
    writer.write(index, stored, examples, measured(stored, config) if quality is None else quality)


def measured(stored: Arrays, config: TargetConfig) -> dict[str, float]:
    """The quality figures that stored rows tell; what was lost against the teacher (`head_kl`) they do not."""
    targets = codecs.decode(stored, config)
    quality = {
        "rows": float(len(targets)),
        "gold_nll": float(-targets.gold_logprob.astype(np.float64).sum()),
        "top1": float((targets.gold_rank == 0).sum()),
    }
    if config.top_k:
        quality["mass_kept"] = float(np.exp(targets.logprobs_at(1.0)).sum())
    return quality
