"""Import a cache that others have made: its log-probabilities become a cache like any other, at temperature 1.

    for step in import_steps("npz", "rows.npz", make(ImportSettings, {"out": "runs/cache", "tokenizer": "gpt2"})): ...

    cache = import_cache("npz", "rows.npz", out="runs/cache", tokenizer="gpt2")     # the same in Python

The source is read twice: once to check every row and to find out what the cache will be, and once to write it. A killed import
leaves whole shards; the same call continues.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from kd.cache_builder.build.shard_writing import example_rows, lengths_of
from kd.cache_builder.exchange.checked_rows import sorted_rows
from kd.cache_builder.exchange.import_plan import ImportPlan, plan_import
from kd.cache_builder.exchange.import_settings import ImportSettings
from kd.cache_builder.exchange.source_sequences import SourceSequence
from kd.cache_builder.served.logprob_rows import raw_targets
from kd.cache_builder.store.encoding import codecs
from kd.cache_builder.store.readers.reader import CacheReader
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.vocabulary import codes_by_count
from kd.cache_builder.store.writers.shard_writer import ShardWriter
from kd.cache_builder.upkeep.cache_registry import remember
from kd.common.errors import DataError
from kd.common.files import write_error
from kd.common.paths import path_of
from kd.common.progress import Progress, ProgressRecord
from kd.common.settings import make


def import_cache(
    format: str,
    source: str | os.PathLike[str],
    *,
    on_progress: Callable[[ProgressRecord], object] | None = None,
    **settings: Any,
) -> CacheReader:
    """Write a cache from log-probabilities that others have computed, and open it.

    format       npz: plain arrays, the general way in; jsonl or parquet: a row for each sequence, as vLLM's and axolotl's users
                 have them; distillkit: a folder that DistillKit's capture script has written
    source       a file of that format, or a folder of them
    on_progress  called with every progress record, which has `done`, `total` and `note`
    settings     settings of `kd cache import` by their names in Python: out, tokenizer, teacher, top_k, tail, …

    Raises DataError for a source that cannot be what it is said to be, and CacheMismatchError, with the difference, where `out`
    holds another cache.

    >>> import kd, numpy
    >>> cache = kd.open_cache("cache")
    >>> kd.export_cache("npz", "cache", out="arrays")
    ['data-00000.npz']
    >>> again = kd.import_cache("npz", "arrays", out="imported", tokenizer="demo")
    >>> bool((again[3].targets.token_ids == cache[3].targets.token_ids).all())
    True
    """
    chosen = make(ImportSettings, settings)
    for step in import_steps(format, source, chosen):
        if on_progress is not None:
            on_progress(step)
    return CacheReader(chosen.out)


def import_steps(
    format: str, source: str | os.PathLike[str], settings: ImportSettings
) -> Generator[Progress[Path], None, None]:
    """Import a source; yields progress in rows, at last with the folder of the cache. Raises KdError."""
    plan = plan_import(format, os.fspath(source), settings, path_of(source))
    yield Progress(0, plan.manifest.rows, note="every row was checked")
    try:
        yield from _written(plan)
    except OSError as error:
        raise write_error(settings.out, error) from error
    remember(settings.out)
    yield Progress(plan.manifest.rows, plan.manifest.rows, settings.out, "complete")


def import_cost(format: str, source: str | os.PathLike[str], settings: ImportSettings) -> dict[str, Any]:
    """What an import would write; every row of the source is read and checked. Raises KdError as the import does.

    Bytes are those of the arrays before compression, and of the text.
    """
    plan = plan_import(format, os.fspath(source), settings, path_of(source))
    manifest = plan.manifest
    text = sum(len(row.example.prompt.encode()) + len(row.example.target.encode()) for row in plan.survey.rows)
    return {
        "fingerprint": manifest.fingerprint,
        "examples": manifest.examples,
        "rows": manifest.rows,
        "shards": len(manifest.shards),
        "bytes_at_most": manifest.rows * sum(array.row_bytes for array in manifest.arrays) + text,
        "committed_shards": len(commits.committed(settings.out, len(manifest.shards))),
    }


def _written(plan: ImportPlan) -> Generator[Progress[Path], None, None]:
    """Write the shards that are not committed, and finish the cache."""
    out, shards = plan.settings.out, len(plan.manifest.shards)
    writer = ShardWriter(out, plan.manifest)
    try:
        writer.sweep()
        if not plan.manifest.complete:
            texts = (row.input_ids for row in plan.survey.rows)
            writer.create(plan.vocabulary, codes_by_count(len(plan.vocabulary), texts), lengths_of(plan.survey.rows))
        writer.recover()
        present = set(commits.committed(out, shards))
        commits.check_sizes(out, plan.manifest, present)
        done = sum(plan.manifest.shards[index][2] for index in present)
        sequences = plan.source.sequences()
        for index, (first, stop, rows) in enumerate(plan.manifest.shards):
            of_shard = list(islice(sequences, stop - first))
            if index in present:
                continue
            _write(plan, writer, index, of_shard)
            done += rows
            yield Progress(done, plan.manifest.rows, note=f"shard {index + 1}/{shards}")
        if plan.manifest.complete:
            writer.tidy()  # an import that was killed at its very end has left its `building.json`
        else:
            writer.finish()
    finally:
        writer.close()


def _write(plan: ImportPlan, writer: ShardWriter, index: int, sequences: Sequence[SourceSequence]) -> None:
    """Encode and commit one shard. Raises DataError where the source is no longer what it was when it was checked."""
    first, stop, _ = plan.manifest.shards[index]
    rows, config = plan.survey.rows[first:stop], plan.manifest.targets
    if len(sequences) != len(rows) or not all(
        np.array_equal(one.input_ids, row.input_ids) for one, row in zip(sequences, rows, strict=True)
    ):
        raise DataError("the source was changed while it was imported", where=plan.source.path)
    checked = [sorted_rows(one, plan.manifest.vocabulary_size, plan.settings.tail) for one in sequences]
    gold = np.concatenate([row.target_ids for row in rows]).astype(np.int64)
    ends = np.concatenate([row.byte_end for row in rows])
    raw = raw_targets([one.first(config.top_k) for one in checked], gold, ends, config, plan.manifest.vocabulary_size)
    stored, quality = codecs.encode(raw, config)
    writer.write(index, stored, example_rows(rows), quality)
