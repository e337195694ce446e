"""What a cached token weighs, what its head is off by, and how fast it is written and read, for every profile and codec.

    python benchmarks/train_teacher.py --tokenizer PATH/gpt2 --data wiki.train.tokens --out teacher
    python benchmarks/sizes.py --teacher teacher --data wiki.valid.tokens          # the table of docs/cache-format.md

The teacher scores the text once per selection (top-k and draws; k=16 and rank bands); every cache is then written
from the same rows through the store, committed, and read back through `CacheReader`, files verified, for one epoch of
shuffled batches of 32 examples. Bytes are of files on disk, all of them: `rest` is every array but ids and
log-probabilities, `text` the examples' Parquet files, `fixed` what a cache has once (vocabulary, metadata, manifest),
which a larger one spreads over more tokens. Rates are tokens per CPU-second of this process.

Below: the same ids and values in the encodings other systems use, and ids numbered by what the *heads* hold, which
is known only when a teacher has run.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numcodecs import blosc, zstd

from kd.cache_builder.build.builder import loaded_teacher
from kd.cache_builder.build.plan import BuildPlan, plan_build
from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.build.shard_writing import lengths_of, write_shard
from kd.cache_builder.store.readers.reader import CacheReader, quality_means
from kd.cache_builder.store.records.manifest import load_manifest
from kd.cache_builder.store.targets import RawTargets, TargetConfig
from kd.cache_builder.store.vocabulary import codes_by_count
from kd.cache_builder.store.writers.claims import Claims
from kd.cache_builder.store.writers.shard_writer import ShardWriter
from kd.cache_builder.teacher.teacher_pass import collect
from kd.data.sources import load_corpus
from kd.data.tokenizing.block_config import BlockConfig
from kd.models.model_request import ModelRequest

CACHES = (
    ("kl", "graded"),
    ("kl", "graded-fine"),
    ("kl", "float16"),
    ("kl", "float32"),
    ("kl", "linear8"),
    ("compact", "graded-coarse"),
    ("uld", "graded-fine"),
    ("uld", "float16"),
    ("sampled", ""),
)


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The options that say which teacher scores which text."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, help="documents; all by default")
    parser.add_argument("--seq-len", type=int, default=256)
    return parser


def plan_of(args: argparse.Namespace, config: TargetConfig) -> BuildPlan:
    corpus = load_corpus(args.data, limit=args.limit)
    request = BuildRequest(
        Path(args.work) / "unused", ModelRequest(args.teacher, device="cpu"), corpus, BlockConfig(args.seq_len), config
    )
    return plan_build(request)


def score(plan: BuildPlan) -> list[RawTargets]:
    """One `RawTargets` per shard."""
    teacher, shards = loaded_teacher(plan), []
    for first, stop, _ in plan.manifest.shards:
        *_, (_, raw) = collect(plan.rows[first:stop], teacher.run(plan.rows[first:stop], first))
        assert raw is not None
        shards.append(raw)
    return shards


def plan_with(plan: BuildPlan, config: TargetConfig) -> BuildPlan:
    """The same plan of a cache with other settings."""
    identity = plan.manifest.identity | {"targets": config.identity}
    return replace(plan, manifest=replace(plan.manifest, identity=identity))


def kept_by(raw: RawTargets, config: TargetConfig) -> RawTargets:
    """What a build with `config` would have selected."""
    nothing: dict[str, Any] = {"boundary_logprob": None}
    if not config.samples:
        nothing |= {"sample_ids": None, "sample_counts": None}
    if not config.top_k:
        nothing |= {"token_ids": None, "relative": None}
    return replace(raw, **nothing)


def write(plan: BuildPlan, shards: list[RawTargets], root: Path) -> float:
    """Encode and write a whole cache; CPU-seconds."""
    started = time.process_time()
    writer = ShardWriter(root, plan.manifest)
    writer.create(plan.vocabulary, plan.codes, lengths_of(plan.rows))
    seconds, claims = {"encode": 0.0, "write": 0.0}, Claims(root)
    for index, ((first, stop, _), raw) in enumerate(zip(plan.manifest.shards, shards, strict=True)):
        claims.take(index)
        write_shard(writer, index, plan.rows[first:stop], raw, plan, seconds, claims)
    writer.finish()
    writer.close()
    return time.process_time() - started


def read_rate(root: Path) -> float:
    """Tokens per CPU-second of one epoch, opening and verifying included, to tensors."""
    started, rows = time.process_time(), 0
    reader = CacheReader(root)
    order = reader.epoch_order(0, 0).tolist()
    for first in range(0, len(order), 32):
        targets = reader.read_rows(order[first : first + 32])
        tensors = [torch.from_numpy(v) for v in vars(targets).values() if isinstance(v, np.ndarray)]
        rows += len(tensors[0])
    return rows / (time.process_time() - started)


def line(name: str, root: Path, seconds: float) -> str:
    """A row of the table."""
    manifest = load_manifest(root)
    rows = manifest.rows

    def weight(*names: str | Path) -> float:
        paths = [p for name in names for p in (root / name).rglob("*")]
        return sum(p.stat().st_size for p in paths if p.is_file() and p.name != "zarr.json") / rows

    arrays = Path("targets.zarr")
    ids = weight(*(arrays / n for n in ("token_ids", "sample_ids", "sample_counts")))
    values = weight(*(arrays / n for n in ("logprobs", "logprob_span", "tail_bands")))
    total = sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) / rows
    text, shards = weight("examples"), weight(arrays, "commits")
    rest, fixed = shards - ids - values, total - shards - text
    kl = quality_means(manifest).get("head_kl")
    error = "" if kl is None else f"{kl:.1e}"
    return (
        f"| {name} | {ids:.1f} | {values:.1f} | {rest:.1f} | {text:.1f} | {fixed:.1f} | **{total:.1f}** | {error} | "
        f"{rows / seconds / 1000:,.0f} | {max(read_rate(root) for _ in range(3)) / 1000:,.0f} |"
    )


def references(plan: BuildPlan, shards: list[RawTargets]) -> None:
    """Bytes per token of one shard's ids and values elsewhere."""
    raw = shards[0]
    assert raw.token_ids is not None
    assert raw.relative is not None
    ids, values = raw.token_ids.astype(np.uint16), (raw.relative - raw.log_z[:, :1]).astype(np.float16)
    by_heads = codes_by_count(plan.manifest.vocabulary_size, [raw.token_ids.ravel()]).astype(np.uint16)

    def packed(array: np.ndarray, shuffle: int) -> float:
        parts = [np.ascontiguousarray(array[i : i + 4096]) for i in range(0, len(array), 4096)]
        return sum(len(blosc.compress(p, b"zstd", 5, shuffle)) for p in parts) / len(array)

    both = b"".join(ids[i : i + 512].tobytes() + values[i : i + 512].tobytes() for i in range(0, len(ids), 512))
    print(f"\n| ids and values of {len(ids):,} rows, k={ids.shape[1]} | B/token |\n|---|---|")
    print(f"| uint16 ids and float16 values, as they are | {ids[0].nbytes + values[0].nbytes} |")
    print(f"| the same through zstd, 512 rows at a time | {len(zstd.compress(both, 5)) / len(ids):.1f} |")
    for name, table in (
        ("teacher's own", None),
        ("place by corpus frequency (stored)", plan.codes.astype(np.uint16)),
        ("place by frequency in the heads", by_heads),
    ):
        numbers = ids if table is None else table[ids]
        sizes = packed(numbers, blosc.SHUFFLE), packed(numbers, blosc.BITSHUFFLE)
        print(f"| ids, {name}: bytes shuffled, bits shuffled | {sizes[0]:.1f}, {sizes[1]:.1f} |")
    mass = float(np.exp(raw.relative.astype(np.float64) - raw.log_z[:, :1]).sum(1).mean())
    print(
        f"\nteacher: {-float(raw.gold_logprob.mean()):.3f} nats per token on this text; mass in the top {ids.shape[1]}: "
        f"{mass:.3f}; different ids in the heads: {len(np.unique(ids)):,}"
    )


def main() -> None:
    parser = parser_of(__doc__)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.work = folder
        scored: dict[str, tuple[BuildPlan, list[RawTargets]]] = {}
        for profile in ("kl", "uld"):
            samples = 12 if profile == "kl" else 0
            plan = plan_of(args, TargetConfig.of_profile(profile, samples=samples))
            scored[profile] = plan, score(plan)
        print(f"{plan.manifest.rows:,} rows, {plan.manifest.examples:,} examples\n")
        print(
            "| profile, codec | ids | values | rest | text | fixed | all, B/token | head KL, nats | written, k/s | read, k/s |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        for profile, codec in CACHES:
            config = TargetConfig.of_profile(profile, logprob_codec=codec or None).normalised()
            plan, shards = scored["uld" if profile == "uld" else "kl"]
            one = plan_with(plan, config)
            root = Path(folder) / "cache"
            seconds = write(one, [kept_by(raw, config) for raw in shards], root)
            print(line(f"{profile}, {codec}" if codec else profile, root, seconds), flush=True)
            shutil.rmtree(root)
        references(*scored["kl"])


if __name__ == "__main__":
    main()
