"""The bill of a cache of any size, before there is a text: disk, files, requests, GPU-hours, reader cores, memory.

    bill = bill_of(make(BillSettings, {"rows": 10_000_000_000}))

Arithmetic alone. What is kept decides the bytes of a row before compression, by the arrays' own types; `MEASURED` says what
compression leaves of them and what reading costs. The speeds of a teacher and of a training job are given, because they differ
from model to model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kd.cache_builder.build.build_settings import BillSettings
from kd.cache_builder.store.encoding.codecs import array_specs
from kd.cache_builder.store.records.manifest import FORMAT_VERSION, Layout
from kd.cache_builder.store.targets import TargetConfig

TABLE_BYTES = 16
"""Bytes of a shard in the table that a reader holds in memory: two 64-bit numbers (`ShardTable`)."""


@dataclass(frozen=True)
class Measured:
    """What was measured, and is not worked out."""

    vocabulary: int = 2048
    """Entries of the teacher of the measurement, which decide the type of ids."""
    bytes_per_row: float = 113.4
    """Bytes of a row with top-64, text, ids, normalisers and checksums included: docs/benchmarks.md, "What is stored"."""
    read_microseconds: float = 0.63
    """CPU microseconds to read, verify and decode such a row: same table."""


MEASURED = Measured()
EXAMPLES = {"WikiText-103": 103_000_000, "FLAN, 15 M examples": 15_000_000 * 32, "10 B tokens": 10_000_000_000}
"""Texts of docs/scale.md and their rows: a row is a target token. An answer of FLAN is taken to have 32 tokens."""


def bill_of(settings: BillSettings) -> dict[str, Any]:
    """The bill in figures. Raises DataError for settings that no cache has."""
    kept = settings.kept
    config = TargetConfig.of_profile(
        kept.profile,
        top_k=kept.top_k,
        samples=kept.samples,
        tail_bands=kept.tail_bands,
        temperatures=kept.temperatures or (1.0, 2.0, 4.0),
        band_temperatures=kept.band_temperatures or (1.0,),
        logprob_codec=kept.logprob_codec,
        min_probability=kept.min_probability,
        min_k=kept.min_k,
        certain_below=kept.certain_below,
        tail_samples=kept.tail_samples,
        id_codec=kept.id_codec,
    ).normalised()
    arrays = array_specs(config, settings.vocabulary, FORMAT_VERSION)
    raw = sum(array.row_bytes for array in arrays)
    share = MEASURED.bytes_per_row / measured_row_bytes()
    shard_rows = settings.shard_rows or Layout.for_rows(settings.rows).shard_rows
    shards = -(-settings.rows // shard_rows)
    files = len(arrays) + 1
    return {
        "rows": settings.rows,
        "bytes_per_row_before_compression": raw,
        "bytes": round(settings.rows * raw * share),
        "shard_rows": shard_rows,
        "shards": shards,
        "files": shards * (files + 1),
        "put_requests": shards * (2 * files + 4),
        "get_requests_per_epoch": shards * (files + 1),
        "gpu_hours": settings.rows / settings.gpu_rate / 3600,
        "reader_cores": settings.training_rate * MEASURED.read_microseconds * raw / measured_row_bytes() / 1e6,
        "reader_bytes_per_second": settings.training_rate * raw * share,
        "reader_memory": shards * TABLE_BYTES + settings.read_ahead * shard_rows * raw,
        "builder_disk": 2 * shard_rows * raw,
    }


def measured_row_bytes() -> int:
    """Bytes before compression of a row of the measurement."""
    config = TargetConfig.of_profile("kl", temperatures=(1.0, 2.0, 4.0)).normalised()
    return sum(array.row_bytes for array in array_specs(config, MEASURED.vocabulary, FORMAT_VERSION))
