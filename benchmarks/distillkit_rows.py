"""DistillKit's own encoder and decoder, in an interpreter that has distillkit (and need not have kd).

    python benchmarks/distillkit_rows.py write --work FOLDER     # reads FOLDER/rows.npz and layouts.json, writes FOLDER/NAME/
    python benchmarks/distillkit_rows.py decode --work FOLDER    # reads FOLDER/NAME/, writes FOLDER/NAME.npz

`write` makes captures of rows that are given, with the compressor, the Parquet writer and the record of DistillKit's capture
script. `decode` reads every capture in FOLDER with DistillKit's decoder, in the type of the exact values, as its trainer does, and
in float32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import yaml
from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor
from distillkit.compression.monotonic_logprobs import decompress_monotonic_logprobs
from distillkit.sample_common import StreamingParquetWriter, compressed_logit_schema

RECORD = "compression_config.yaml"


def write_capture(folder: Path, layout: dict[str, Any], rows: dict[str, np.ndarray]) -> None:
    """A capture of the rows, a sequence of `lengths` tokens at a time; a sequence has a row less than tokens."""
    config = DistributionQuantizationConfig.model_validate(layout)
    compressor = LogprobCompressor(config=config)
    folder.mkdir()
    (folder / RECORD).write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    token, row = 0, 0
    schema = compressed_logit_schema()
    with StreamingParquetWriter(str(folder), schema=schema, file_max_rows=256, queue_maxsize=512) as writer:
        for length in rows["lengths"].tolist():
            ids = torch.from_numpy(rows["token_ids"][row : row + length - 1, : config.k].astype(np.int64))
            values = torch.from_numpy(rows["logprobs"][row : row + length - 1, : config.k])
            stored = compressor.compress_from_sparse(ids[None], values[None])
            columns = {name: value.squeeze(0).tolist() for name, value in stored.items()}
            writer.write({"input_ids": rows["input_ids"][token : token + length].tolist(), **columns})
            token, row = token + length, row + length - 1


def decode_capture(folder: Path) -> dict[str, np.ndarray]:
    """Ids, and log-probabilities in the decoder's own type and in float32, of all rows of a capture."""
    config = DistributionQuantizationConfig.model_validate(yaml.safe_load((folder / RECORD).read_text()))
    compressor = LogprobCompressor(config=config)
    parts: dict[str, list[np.ndarray]] = {"token_ids": [], "logprobs": [], "logprobs_float32": []}
    for file in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(file).to_pylist():
            names = ("bytepacked_indices", "compressed_logprobs")
            columns = {name: torch.tensor(row[name], dtype=torch.uint8)[None] for name in names}
            ids, values = compressor.decompress_to_sparse(columns)
            exact = decompress_monotonic_logprobs(columns["compressed_logprobs"], config, out_dtype=torch.float32)
            parts["token_ids"].append(ids[0].numpy())
            parts["logprobs"].append(values[0].float().numpy())
            parts["logprobs_float32"].append(exact[0].numpy())
    return {name: np.concatenate(arrays) for name, arrays in parts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "decode"))
    parser.add_argument("--work", type=Path, required=True)
    args = parser.parse_args()
    if args.what == "write":
        with np.load(args.work / "rows.npz") as stored:
            rows = dict(stored)
        for name, layout in json.loads((args.work / "layouts.json").read_text()).items():
            write_capture(args.work / name, layout, rows)
        return
    for record in sorted(args.work.glob(f"*/{RECORD}")):
        np.savez(args.work / f"{record.parent.name}.npz", **decode_capture(record.parent))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
