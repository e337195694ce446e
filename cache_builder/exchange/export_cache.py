"""Export a cache to formats that others read: plain arrays, or Parquet with a row for each sequence.

    export_cache("parquet", "runs/cache", out="rows")        # ['data-00000.parquet', …], one file per shard

Log-probabilities leave as the cache holds them, decoded to float32. What other formats have no place for stays behind: other
temperatures than 1, rank bands, draws, and the exact tail, which at temperature 1 is what the kept probabilities leave of 1.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kd.cache_builder.opening import open_files
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.readers.reading import CachedExample
from kd.common.errors import CacheError, DataError, unknown_name
from kd.common.files import process_tag, publish, write_error
from kd.common.paths import output_folder
from kd.common.progress import Progress, final

PARQUET_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("target_token_ids", pa.list_(pa.list_(pa.int32()))),
        ("logprobs", pa.list_(pa.list_(pa.float32()))),
        ("gold_logprobs", pa.list_(pa.float32())),
        ("gold_ranks", pa.list_(pa.int32())),
        ("prompt", pa.string()),
        ("target", pa.string()),
        ("byte_ends", pa.list_(pa.int32())),
    ]
)
"""Columns of an exported sequence. The lists of rows belong to the last tokens of `input_ids`, one each."""

OTHER_BYTES = 32
"""Most bytes of a row besides its kept tokens: the border of its text, how many tokens it keeps, and the text's own token."""


def export_cache(format: str, cache: str | os.PathLike[str], *, out: str | os.PathLike[str]) -> list[str]:
    """Write a cache as files that other programs read; returns their names.

    format   npz: plain arrays; parquet: a row for each sequence, with columns that vLLM's and axolotl's users know
    cache    a path, a URL, or the beginning of a fingerprint
    out      a new or empty folder

    Raises CacheError for a cache without ids, and for conversations, classes and encoder-decoder teachers, whose rows these
    formats cannot say.

    >>> import kd
    >>> kd.export_cache("parquet", "cache", out="rows")
    ['data-00000.parquet']
    """
    return final(export_steps(format, cache, output_folder(out)))


def export_steps(format: str, cache: str | os.PathLike[str], out: Path) -> Iterator[Progress[list[str]]]:
    """Export a cache; yields progress in rows, at last with the names of the files. Raises KdError."""
    reader = _checked_reader(format, cache, out)
    suffix, write = EXPORTS[format]
    names, done = list[str](), 0
    try:
        out.mkdir(parents=True, exist_ok=True)
        for shard in reader.shards:
            first, stop, rows = reader.manifest.shards[shard]
            name = f"data-{shard:05d}{suffix}"
            temporary = out / f".{name}.{process_tag()}.tmp"
            try:
                write(reader.read(range(first, stop)), temporary, gold=not reader.manifest.gold_in_top_k)
                publish(temporary, out / name)
            finally:
                temporary.unlink(missing_ok=True)
            names.append(name)
            done += rows
            yield Progress(done, reader.manifest.rows, note=name)
    except OSError as error:
        raise write_error(out, error) from error
    yield Progress(done, reader.manifest.rows, names, "complete")


def export_cost(format: str, cache: str | os.PathLike[str], out: Path) -> dict[str, Any]:
    """What an export would write. Raises KdError as the export does.

    Bytes are those of ids, log-probabilities and texts before compression; texts as four bytes a character, which npz takes.
    """
    reader = _checked_reader(format, cache, out)
    tokens, rows = reader.lengths()
    widths = {array.name: array.columns or 1 for array in reader.manifest.arrays}
    each_row = 8 * widths["token_ids"] + OTHER_BYTES
    tables = (reader.example_table(shard, ("id", "prompt", "target")) for shard in reader.shards)
    characters = sum(len(text or "") for table in tables for column in table.values() for text in column)
    return {
        "examples": len(tokens),
        "rows": int(rows.sum()),
        "files": len(reader.shards),
        "bytes_at_most": int(rows.sum()) * each_row + 4 * int(tokens.sum()) + 4 * characters,
    }


def _checked_reader(format: str, cache: str | os.PathLike[str], out: Path) -> CacheReader:
    """The reader of a cache that can be exported to this folder. Raises KdError for any other."""
    if format not in EXPORTS:
        raise unknown_name("format to export", format, EXPORTS)
    reader = CacheReader(open_files(cache))
    _refuse_unlike(reader)
    if out.exists() and any(out.iterdir()):
        raise DataError("the folder is not empty", where=out, try_="another --out")
    return reader


def _refuse_unlike(reader: CacheReader) -> None:
    """Raise CacheError for a cache whose rows are no lists of ids and log-probabilities behind a context."""
    manifest = reader.manifest
    names = {a.name for a in manifest.arrays}
    reasons = {
        f"profile {reader.config.profile}, without ids and log-probabilities": not {"token_ids", "logprobs"} <= names,
        f"a cache of {manifest.kind}, whose rows do not follow each other": manifest.kind
        in ("classes", "conversations"),
        "a teacher with an encoder": manifest.blocks.encoder,
        "kept tokens that were renormalised, without a tail": manifest.tail_unknown,
    }
    reasons_found = [reason for reason, is_so in reasons.items() if is_so]
    if reasons_found:
        raise CacheError(
            "this cache cannot be exported",
            cache=reader.root,
            found="; ".join(reasons_found),
            expected="a cache of documents or pairs of profile kl, compact, adaptive or full",
        )


def _write_npz(examples: Sequence[CachedExample], path: Path, *, gold: bool) -> None:
    """See `npz_source` for the arrays; rows that differ in length are as wide as the longest."""
    parts = [_lists(example) for example in examples]
    wide = max(ids.shape[1] for ids, _, _ in parts)
    arrays: dict[str, Any] = {
        "input_ids": np.concatenate([_input_ids(e) for e in examples]),
        "lengths": np.array([len(_input_ids(e)) for e in examples], dtype=np.int64),
        "context_lengths": np.array([len(e.context_ids) for e in examples], dtype=np.int64),
        "token_ids": np.concatenate([_widened(ids, wide, 0) for ids, _, _ in parts]),
        "logprobs": np.concatenate([_widened(values, wide, -np.inf) for _, values, _ in parts]),
        "ids": np.array([e.id for e in examples], dtype=np.str_),
        "prompts": np.array([e.prompt for e in examples], dtype=np.str_),
        "targets": np.array([e.target for e in examples], dtype=np.str_),
        "byte_ends": np.concatenate([e.targets.byte_end for e in examples]),
    }
    if examples[0].targets.kept is not None:
        arrays["kept"] = np.concatenate([kept for _, _, kept in parts])
    if gold:
        arrays["gold_logprobs"] = np.concatenate([e.targets.gold_logprob for e in examples])
        arrays["gold_ranks"] = np.concatenate([e.targets.gold_rank for e in examples])
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)


def _write_parquet(examples: Sequence[CachedExample], path: Path, *, gold: bool) -> None:
    """A row for each sequence, see `PARQUET_SCHEMA`."""
    columns: dict[str, list[object]] = {name: [] for name in PARQUET_SCHEMA.names}
    for example in examples:
        ids, values, kept = _lists(example)
        targets = example.targets
        columns["id"].append(example.id)
        columns["input_ids"].append(_input_ids(example))
        columns["target_token_ids"].append([row[:k] for row, k in zip(ids, kept, strict=True)])
        columns["logprobs"].append([row[:k] for row, k in zip(values, kept, strict=True)])
        columns["gold_logprobs"].append(targets.gold_logprob if gold else None)
        columns["gold_ranks"].append(targets.gold_rank.astype(np.int32) if gold else None)
        columns["prompt"].append(example.prompt)
        columns["target"].append(example.target)
        columns["byte_ends"].append(targets.byte_end.astype(np.int32))
    pq.write_table(pa.table(columns, PARQUET_SCHEMA), path, compression="zstd")


def _lists(example: CachedExample) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids and log-probabilities `[n, K]` of the kept tokens, and how many of them each row uses `[n]`."""
    targets = example.targets
    assert targets.token_ids is not None
    assert targets.logprobs is not None
    ids, values = targets.padded(targets.token_ids), targets.padded(targets.logprobs, -np.inf)
    kept = np.full(len(targets), ids.shape[1]) if targets.kept is None else targets.kept
    return ids.astype(np.int32), values.astype(np.float32), kept


def _input_ids(example: CachedExample) -> np.ndarray:
    return np.concatenate([example.context_ids, example.targets.gold_ids]).astype(np.int32)


def _widened(values: np.ndarray, columns: int, filling: float) -> np.ndarray:
    return np.pad(values, ((0, 0), (0, columns - values.shape[1])), constant_values=filling)


EXPORTS: dict[str, tuple[str, Callable[..., None]]] = {
    "npz": (".npz", _write_npz),
    "parquet": (".parquet", _write_parquet),
}
"""Format -> the end of its files' names, and what writes one."""
