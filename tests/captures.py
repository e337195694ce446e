"""DistillKit's captures as a plain twin writes them: exact values, one number at a time."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from kd.cache_builder.store.readers.reader import CacheReader

RECORD: dict[str, Any] = {
    "d": 400,
    "k": 8,
    "exact_k": 8,
    "exact_dtype": "float32",
    "polynomial_terms": None,
    "term_dtype": "float32",
    "residual_bins": [],
    "delta_encoding": False,
    "error_diffusion": False,
    "normalize_t": False,
}


def packed_ids(ids: list[int], bits: int) -> list[int]:
    """The ids as one string of binary digits, cut into bytes."""
    digits = "".join(f"{i:0{bits}b}" for i in ids)
    digits += "0" * (-len(digits) % 8)
    return [int(digits[n : n + 8], 2) for n in range(0, len(digits), 8)]


def save_capture(folder: Path, cache: Path, *, pad: int | None = None, **record: Any) -> Path:
    """A cache of 400 ids as a capture of its 8 most probable tokens; with `pad`, a token more at the end of each sequence."""
    folder.mkdir(exist_ok=True)
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(RECORD | record), encoding="utf-8")
    columns: dict[str, list[Any]] = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": []}
    reader = CacheReader(cache)
    for example in reader.read(range(len(reader))):
        targets = example.targets
        assert targets.token_ids is not None
        assert targets.logprobs is not None
        more = [] if pad is None else [pad]
        rows = [*range(len(targets)), *[-1] * len(more)]
        columns["input_ids"].append([*example.context_ids[-1:].tolist(), *targets.gold_ids.tolist(), *more])
        columns["bytepacked_indices"].append([packed_ids(targets.token_ids[r, :8].tolist(), 9) for r in rows])
        columns["compressed_logprobs"].append([list(struct.pack("<8f", *targets.logprobs[r, :8])) for r in rows])
    kinds = [("input_ids", pa.list_(pa.uint64()))]
    kinds += [(name, pa.list_(pa.list_(pa.uint8()))) for name in columns if name != "input_ids"]
    pq.write_table(pa.table(columns, pa.schema(kinds)), folder / "data_0.parquet")
    return folder
