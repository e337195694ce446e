"""Captures of DistillKit, read by kd and by DistillKit's own decoder: the same ids and log-probabilities?

    python benchmarks/distillkit_peers.py --distillkit-python ~/venvs/distillkit/bin/python      # a minute
    python benchmarks/distillkit_peers.py --distillkit-python … --model FOLDER --text FILE       # and its capture script, by vLLM

DistillKit's compressor writes the rows of the embedded teacher in six layouts, among them the two that its README recommends
(`distillkit_rows.py`). Both decoders read what it has written. With --model its capture script runs too: it samples the model by
vLLM on the lines of --text and writes a capture, which both decoders read and `kd cache import` imports. A line for each says:

    bytes            of a row, ids included
    other ids        that differ between kd and DistillKit
    float32, own     largest difference, in nats, between kd's log-probabilities and those of its decoder, in float32, and in the
                     type of the exact values, which is what its trainer gets
    from teacher     largest difference between what is decoded and what was captured: what the layout itself loses
    import           rows whose mass above 1 `kd cache import` divided away, or why it refused the capture
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from kd.cache_builder.build.build_settings import BuildSettings
from kd.cache_builder.build.from_settings import build_of
from kd.cache_builder.exchange.distillkit_source import COLUMNS, RECORD, decoded_logprobs, read_codec, unpacked
from kd.cache_builder.exchange.import_cache import import_cache
from kd.cache_builder.store.readers.reader import CacheReader
from kd.common.errors import DataError
from kd.common.settings import make

HERE = Path(__file__).parent
VOCABULARY, TOP_K = 2048, 128
PLAIN: dict[str, Any] = {"d": VOCABULARY, "residual_bins": [], "delta_encoding": False}
LAYOUTS: dict[str, dict[str, Any]] = {
    "exact": PLAIN | {"k": 64, "exact_k": 64},
    "recommended": PLAIN
    | {"k": 128, "exact_k": 16, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    "budget": PLAIN | {"k": 50, "exact_k": 1, "exact_dtype": "bfloat16", "polynomial_terms": [0, 1, "sqrt"]},
    "residuals": PLAIN
    | {
        "k": 128,
        "exact_k": 16,
        "exact_dtype": "float16",
        "polynomial_terms": [0, 1, 2, "sqrt"],
        "residual_bins": [
            {"scale_dtype": "float16", "element_bits": 8, "num_elements": 16},
            {"scale_dtype": "float32", "element_bits": 2, "num_elements": 64},
        ],
    },
    "differences": PLAIN
    | {"k": 128, "exact_k": 32, "polynomial_terms": [0, 1, 2], "delta_encoding": True, "error_diffusion": True},
    "from 0 to 1": PLAIN
    | {
        "k": 33,
        "exact_k": 4,
        "polynomial_terms": [0, 1, "exp"],
        "term_dtype": "float64",
        "normalize_t": True,
        "residual_bins": [{"scale_dtype": "bfloat16", "element_bits": 1, "num_elements": 29}],
    },
}
"""Name -> what the record beside a capture says."""


def teacher_rows(work: Path, examples: int) -> dict[str, np.ndarray]:
    """Rows of the embedded teacher, as float32: what a capture would see."""
    kept = {"top_k": TOP_K, "temperatures": (1.0,), "logprob_codec": "float32", "reuse": False, "device": "cpu"}
    build_of(make(BuildSettings, kept | {"teacher": "demo", "spec": "demo", "limit": examples, "out": str(work)}))
    reader = CacheReader(work)
    read = list(reader.read(range(len(reader))))
    sequences = [np.concatenate([e.context_ids[-1:], e.targets.gold_ids]) for e in read]
    return {
        "input_ids": np.concatenate(sequences),
        "lengths": np.array([len(s) for s in sequences]),
        "token_ids": np.concatenate([e.targets.token_ids for e in read]),
        "logprobs": np.concatenate([e.targets.logprobs for e in read]).astype(np.float32),
    }


def decoded_here(folder: Path) -> tuple[np.ndarray, np.ndarray, int]:
    """kd's ids and log-probabilities of all rows of a capture, and the bytes of a row."""
    codec, ids, values = read_codec(folder / RECORD), [], []
    for file in sorted(folder.glob("*.parquet")):
        for row in pq.read_table(file, columns=list(COLUMNS)).to_pylist():
            packed, compressed = (np.array(row[name], dtype=np.uint8) for name in COLUMNS[1:])
            ids.append(unpacked(packed, codec.id_bits, codec.k))
            values.append(decoded_logprobs(compressed, codec))
    return np.concatenate(ids), np.concatenate(values), sum(codec.row_bytes)


def imported(folder: Path, tokenizer: str, out: Path) -> str:
    """What `kd cache import` says of a capture."""
    try:
        cache = import_cache("distillkit", folder, tokenizer=tokenizer, out=out, check_source=False)
    except DataError as error:
        return f"refused: {error.details['found']}"
    return f"{cache.manifest.provenance['imported']['rows_rescaled']:,} of {cache.manifest.rows:,} rows"


def compared(name: str, work: Path, tokenizer: str, captured: np.ndarray | None) -> str:
    """A line of the table. Raises SystemExit where the two decoders do not agree on the ids."""
    ids, values, size = decoded_here(work / name)
    with np.load(work / f"{name}.npz") as stored:
        theirs = dict(stored)
    other = int((ids != theirs["token_ids"]).sum())
    apart = [float(np.abs(values - theirs[kind]).max()) for kind in ("logprobs_float32", "logprobs")]
    lost = "" if captured is None else f"{float(np.abs(values - captured[:, : values.shape[1]]).max()):.2g}"
    cells = (name, f"{len(ids):,}", f"{size}", f"{other}", f"{apart[0]:.1e}", f"{apart[1]:.1e}", lost)
    return f"| {' | '.join(cells)} | {imported(work / name, tokenizer, work / 'imported' / name)} |"


def capture(python: str, model: str, text: Path, work: Path) -> None:
    """Run DistillKit's capture script on the lines of a text: `work/captured`."""
    (work / "lines").mkdir()
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if len(line.split()) > 3]
    rows = [json.dumps({"text": line}) + "\n" for line in lines[:200]]
    (work / "lines" / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    (work / "layout.yaml").write_text(json.dumps(LAYOUTS["recommended"] | {"k": 32, "exact_k": 16}))
    options = {"--model": model, "--dataset": str(work / "lines"), "--output": str(work / "captured")}
    options |= {"--compression-config": str(work / "layout.yaml"), "--dtype": "float32", "--max-seq-len": "120"}
    options |= {"--max-model-len": "256", "--max-workers": "1"}
    words = [word for pair in options.items() for word in pair]
    subprocess.run([python, "-m", "distillkit.sample_logits_vllm", *words], check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distillkit-python", required=True, metavar="PATH", help="interpreter that has distillkit")
    parser.add_argument("--examples", type=int, default=40, help="documents of the embedded text")
    parser.add_argument("--model", help="folder of a model that vLLM can run, for DistillKit's capture script")
    parser.add_argument("--text", type=Path, help="its text, a line for each sequence")
    args = parser.parse_args()
    if (args.model is None) != (args.text is None):
        parser.error("--model and --text go together")
    with tempfile.TemporaryDirectory() as folder:
        work, run = Path(folder) / "work", [args.distillkit_python, str(HERE / "distillkit_rows.py")]
        work.mkdir()
        rows = teacher_rows(Path(folder) / "cache", args.examples)
        np.savez(work / "rows.npz", **rows)  # type: ignore[arg-type]
        (work / "layouts.json").write_text(json.dumps(LAYOUTS))
        subprocess.run([*run, "write", "--work", str(work)], check=True)
        if args.model is not None:
            capture(args.distillkit_python, args.model, args.text, work)
        subprocess.run([*run, "decode", "--work", str(work)], check=True)
        print("| layout | rows | bytes | other ids | float32 | own | from teacher | import |")
        print("|---|---|---|---|---|---|---|---|")
        for name in LAYOUTS:
            print(compared(name, work, "demo", rows["logprobs"]))
        if args.model is not None:
            print(compared("captured", work, args.model, None))


if __name__ == "__main__":
    main()
