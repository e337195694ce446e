"""A cache in figures: identity, sizes on disk, quality as measured during the build. No targets are read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd.cache_builder.store.cache_files import CacheFiles, bytes_below, files_at, recorded_bytes
from kd.cache_builder.store.readers.reader import quality_means
from kd.cache_builder.store.records.commits import open_file, shard_files
from kd.cache_builder.store.records.manifest import TARGETS, CacheManifest, load_manifest
from kd.cache_builder.store.records.part import Part, load_part
from kd.data.left_out import recorded
from kd.data.tokenizing.token_notes import recorded_notes


def cache_summary(cache: Path | CacheFiles) -> dict[str, Any]:
    """What `kd cache info` prints: identity, sizes, measured quality."""
    files = files_at(cache)
    manifest = load_manifest(files.root)
    part = load_part(files.root, manifest)
    left_out = recorded(manifest.provenance)
    means, targets = quality_means(manifest), manifest.targets
    done = files.committed(len(manifest.shards)) if part is None else part.shards
    rows = int(manifest.shards.rows[list(done)].sum())
    if files.on_disk:
        refuse_missing_files(files.root, manifest, done, part)
    stored = _stored_bytes(files, manifest, done, None if part is None else part.arrays)
    arrays = {a.name: round(stored[a.name] / rows, 2) if rows and a.name in stored else None for a in manifest.arrays}
    if (recorded_size := recorded_bytes(manifest, part)) is not None:
        size = recorded_size
    elif files.on_disk:
        size = bytes_below(files.root)
    else:
        size = sum(stored.values()) + sum(int(entry["bytes"]) for entry in manifest.files.values())
    return {
        "fingerprint": manifest.fingerprint,
        "complete": manifest.complete and part is None,
        "part_of_a_cache": part is not None,
        "examples": manifest.examples,
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "shards_committed": len(done),
        "bytes": size,
        "bytes_per_token": size / rows if rows else None,
        "bytes_expected": round(size / rows * manifest.rows) if rows else None,
        "profile": targets.profile,
        "top_k": targets.top_k,
        "min_probability": targets.min_probability,
        "min_k": targets.min_k,
        "certain_below": targets.certain_below,
        "samples": targets.samples,
        "tail_samples": targets.tail_samples,
        "tail_draws_mean": means.get("tail_draws"),
        "tail_bands": targets.tail_bands,
        "temperatures": list(targets.temperatures),
        "logprob_codec": targets.logprob_codec,
        "id_codec": targets.id_codec,
        "teacher": manifest.provenance.get("teacher"),
        "teacher_class": manifest.identity["teacher"].get("model_class"),
        "dtype": manifest.identity["teacher"].get("dtype"),
        "quantization": manifest.identity["teacher"].get("quantization"),
        "quantised": manifest.provenance.get("quantised"),
        "adapter": manifest.provenance.get("adapter"),
        "logprobs_only": manifest.logprobs_only,
        "weights_unknown": manifest.weights_unknown,
        "unknown": manifest.provenance.get("imported", {}).get("unknown"),
        "teacher_id": manifest.identity["teacher"].get("id"),
        "vocabulary_size": manifest.vocabulary_size,
        "kind": manifest.identity["corpus"]["kind"],
        "corpus": manifest.provenance.get("corpus"),
        "token_notes": recorded_notes(manifest.provenance),
        "left_out": None if left_out is None else left_out.document(),
        "split": manifest.provenance.get("split"),
        "seq_len": manifest.blocks.seq_len,
        "tokens_kept_mean": means.get("tokens_kept", float(targets.top_k)) if targets.top_k else None,
        "rows_of_one_token": means.get("one_token"),
        "mass_kept_mean": None if manifest.tail_unknown else means.get("mass_kept"),
        "head_kl_mean": means.get("head_kl"),
        "teacher_nll_mean": None if manifest.gold_in_top_k else means.get("gold_nll"),
        "teacher_top1": means.get("top1"),
        "array_bytes_per_token": arrays,
    }


def refuse_missing_files(root: Path, manifest: CacheManifest, shards: Sequence[int], part: Part | None) -> None:
    """Raise CacheDamageError where a folder of targets holds fewer files than there are shards. No file is opened.

    `kd cache verify` compares sizes and bytes.
    """
    held = [a for a in manifest.arrays if part is None or a.name in part.arrays]
    for array in held:
        folder = root / TARGETS / array.name
        flat = sum(name.startswith("c.") for name in os.listdir(folder)) if folder.is_dir() else 0
        if flat < len(shards):  # or older versions, which have a folder for each shard
            for index in shards:
                open_file(root, shard_files([array], index)[array.name], shard=index).close()


def _stored_bytes(
    files: CacheFiles, manifest: CacheManifest, shards: Sequence[int], arrays: Sequence[str] | None
) -> dict[str, int]:
    """Bytes of some shards, by array; `arrays` are those that a copy of a part holds.

    A finished cache of format version 3 has recorded them, so no shard is opened.
    """
    if manifest.commits.stored:
        names = [a.name for a in manifest.arrays] if arrays is None else arrays
        return {name: int(manifest.commits.stored[name][list(shards)].sum()) for name in (*names, "examples")}
    files.expect(shards, ())
    stored: dict[str, int] = {}
    for index in shards:
        for array, count in files.stored_bytes(manifest, index).items():
            stored[array] = stored.get(array, 0) + count
    return stored
