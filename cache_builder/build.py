"""Build a cache: plan the shards, run the teacher over those not yet committed, encode and write meanwhile.

    plan = plan_build(request)            # tokenises, loads no weights
    for progress in build(plan): ...      # resumable at any moment; the last progress says complete

Encoding and writing happen on one thread beside the forward pass; when that thread fails, the build stops with
its message. What is committed is complete, so the same call continues after any interruption and ends with the
same bytes.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kd.cache_builder import codecs, store
from kd.cache_builder.files import unfinished, write_error
from kd.cache_builder.manifest import CacheManifest, Layout, check_bounds, load_manifest, refuse_mismatch
from kd.cache_builder.targets import PROFILES, RawTargets, TargetConfig
from kd.data.blocks import BlockConfig, TokenRows, tokenize_corpus
from kd.data.errors import CacheError, CacheMismatchError, DataError
from kd.data.forward import split_head
from kd.data.identity import model_identity, pinned
from kd.data.models import (
    ModelRequest,
    is_encoder_decoder,
    load_config,
    load_model,
    load_request_tokenizer,
    max_positions,
    parameter_count,
)
from kd.data.sources import Corpus
from kd.data.tokenizer import token_bytes, tokenizer_fingerprint, vocabulary_size

OWN_NAMES = {"manifest.json", "building.json", "vocabulary.parquet", "examples", "targets.zarr", "commits"}


@dataclass(frozen=True)
class BuildRequest:
    """Everything `kd cache build` was told."""

    out: Path
    teacher: ModelRequest
    corpus: Corpus
    blocks: BlockConfig
    targets: TargetConfig
    layout: Layout | None = None
    """None: the default, or that of the cache already there."""
    tokens_per_batch: int = 4096
    shard: tuple[int, int] = (1, 1)
    """(i, n): do every n-th shard, starting with the i-th, counted from 1."""


@dataclass(frozen=True)
class BuildPlan:
    """Rows, shards and identity of a build; nothing is written yet."""

    request: BuildRequest
    manifest: CacheManifest
    rows: list[TokenRows]
    vocabulary: list[bytes]
    special_ids: set[int]

    @property
    def tokens(self) -> int:
        """Tokens the teacher reads (context and targets)."""
        return sum(len(r.context_ids) + len(r.target_ids) for r in self.rows)

    @property
    def raw_bytes_per_token(self) -> int:
        """Bytes of a row before compression: an upper bound but for metadata and text."""
        return sum(a.row_bytes for a in self.manifest.arrays)


@dataclass(frozen=True)
class BuildProgress:
    """One step of a build."""

    rows_done: int
    """Rows scored or found committed."""
    rows_total: int
    shards_done: int
    shards_total: int
    tokens_per_second: float
    """Teacher tokens per second of this process, since it started scoring."""
    complete: bool = False
    reused: bool = False
    """True when there was nothing left to do."""
    seconds: dict[str, float] | None = None
    """Where time went: forward, head, select, encode, write, wait; on the last record."""


def plan_build(request: BuildRequest) -> BuildPlan:
    """Tokenise, cut into shards, work out the identity. Raises KdError on anything that could not be built."""
    config = load_config(request.teacher)
    request = replace(
        request, teacher=pinned(request.teacher), targets=request.targets.normalised(),
        blocks=replace(request.blocks, encoder=is_encoder_decoder(config)),
    )  # fmt: skip
    limit = max_positions(config)
    for option, length in (("--seq-len", request.blocks.seq_len), ("--target-len", request.blocks.target_len)):
        if limit is not None and length is not None and length > limit:
            raise DataError("the sequence length is longer than the teacher's positions", found=f"{option} {length}",
                            expected=f"at most {limit}", try_=f"{option} {limit}")  # fmt: skip
    tokenizer = load_request_tokenizer(request.teacher)
    own, width = vocabulary_size(tokenizer), int(config.vocab_size)
    if own > width:
        raise DataError("the tokenizer has more entries than the teacher has logits", found=f"{own} entries",
                        expected=f"at most {width}", try_="--tokenizer PATH of the right tokenizer")  # fmt: skip
    # Padded logit columns (T5 28, Pythia 27) cannot be emitted and are left out of every sum; random weights with a
    # tokenizer of another model keep their real width.
    size = own if request.teacher.random_shape is None or width - own < 128 else width
    request.targets.check_vocabulary(size)
    request = replace(request, blocks=request.blocks.normalised(request.corpus.kind, tokenizer))
    vocabulary = token_bytes(tokenizer)
    counts: Counter[str] = Counter()
    rows = list(tokenize_corpus(request.corpus, tokenizer, request.blocks, counts))
    if not rows:
        raise DataError("no example is left", where=request.corpus.spec, found=f"{counts['dropped']} dropped as too long",
                        try_="--overlong truncate, or a larger --seq-len or --target-len")  # fmt: skip
    identity = {
        "teacher": model_identity(request.teacher) | {"vocabulary_size": size},
        "tokenizer": {
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "entries": own,
            "eos_token_id": tokenizer.eos_token_id,
        },
        "corpus": {"text_digest": request.corpus.digest, "kind": request.corpus.kind},
        "blocks": asdict(request.blocks),
        "targets": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(request.targets).items()},
    }
    existing = _existing(request.out)
    if existing is not None:
        refuse_mismatch(request.out, identity, existing)
        if request.layout not in (None, existing.layout):
            raise CacheMismatchError("the directory holds a cache with other shard sizes", cache=request.out,
                                     found=existing.layout.shard_rows, expected=getattr(request.layout, "shard_rows", None),
                                     try_="leave --shard-rows out")  # fmt: skip
    layout = existing.layout if existing is not None else request.layout or Layout()
    shards = _cut(rows, layout)
    manifest = existing or CacheManifest(
        identity=identity,
        layout=layout,
        examples=len(rows),
        rows=sum(len(r.target_ids) for r in rows),
        shards=tuple(shards),
        files={},
        provenance=_provenance(request, counts),
    )
    check_bounds(manifest)
    index, count = request.shard
    if not 1 <= index <= count:
        raise DataError("no such part of the build", found=f"--shard {index}/{count}", expected="I/N with 1 <= I <= N")
    return BuildPlan(request, manifest, rows, vocabulary, set(tokenizer.all_special_ids))


def _provenance(request: BuildRequest, counts: Counter[str]) -> dict[str, Any]:
    packages = ("torch", "transformers", "tokenizers", "zarr", "numcodecs", "pyarrow", "numpy")
    return {
        "teacher": request.teacher.name,
        "corpus": request.corpus.spec,
        "split": request.corpus.split,
        "source": request.corpus.source,
        "overlong": {"dropped": counts["dropped"], "truncated": counts["truncated"]},
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
    }


def _existing(out: Path) -> CacheManifest | None:
    """The manifest under `out`, None for a fresh directory; refuses a directory that holds other things."""
    if not out.exists():
        return None
    if not out.is_dir():
        raise CacheError("the output is not a directory", where=out, try_="another --out")
    if (out / "manifest.json").exists() or (out / "building.json").exists():
        return load_manifest(out)
    foreign = sorted(p.name for p in out.iterdir() if p.name not in OWN_NAMES and not unfinished(p.name))
    if foreign:
        raise CacheError("the output directory is not empty and not a cache", where=out,
                         found=", ".join(foreign[:5]), expected="an empty or new directory")  # fmt: skip
    return None


def _cut(rows: list[TokenRows], layout: Layout) -> list[tuple[int, int, int]]:
    """Consecutive whole examples per shard, as many as fit its row slots."""
    shards: list[tuple[int, int, int]] = []
    first = count = 0
    for number, row in enumerate(rows):
        n = len(row.target_ids)
        if n > layout.shard_rows:
            raise DataError("an example has more rows than a shard holds", where=f"example {row.example.id}",
                            found=f"{n} rows", expected=f"at most {layout.shard_rows}", try_="--shard-rows")  # fmt: skip
        if count + n > layout.shard_rows:
            shards.append((first, number, count))
            first, count = number, 0
        count += n
    return [*shards, (first, len(rows), count)]


def build(plan: BuildPlan) -> Iterator[BuildProgress]:
    """Run the teacher over every shard of this part that is not committed; yields progress after each batch.

    Raises KdError; whatever was committed stays, and the same call continues from there.
    """
    request, manifest = plan.request, plan.manifest
    writer = store.ShardWriter(request.out, manifest)
    try:
        writer.sweep()
        if not manifest.complete:
            manifest = writer.create(plan.vocabulary)
        if manifest.complete:
            writer.tidy()
            total = len(manifest.shards)
            yield BuildProgress(manifest.rows, manifest.rows, total, total, 0.0, complete=True, reused=True)
            return
        yield from _build(plan, writer)
    except OSError as error:
        raise write_error(request.out, error) from error
    finally:
        writer.close()


def _build(plan: BuildPlan, writer: store.ShardWriter) -> Iterator[BuildProgress]:
    request, manifest = plan.request, writer.manifest
    index, count = request.shard
    total, mine = len(manifest.shards), range(index - 1, len(manifest.shards), count)
    present = set(store.committed(request.out, total))
    for i in present:
        store.read_commit(request.out, manifest, i)  # a foreign commit must not count as done
    todo = [i for i in mine if i not in present]
    done_rows, done_shards = sum(manifest.shards[i][2] for i in present), len(present)
    seconds = {"forward": 0.0, "head": 0.0, "select": 0.0, "encode": 0.0, "write": 0.0, "wait": 0.0}
    if todo:
        from kd.cache_builder.teacher import collect

        teacher = load_teacher(plan)
        started, tokens = time.perf_counter(), 0
        with ThreadPoolExecutor(1, thread_name_prefix="kd-writer") as pool:
            pending: Future[None] | None = None
            for i in todo:
                first, stop, size = manifest.shards[i]
                if store.commit_path(request.out, i).exists():  # another builder was faster
                    done_rows, done_shards = done_rows + size, done_shards + 1
                    continue
                rows = plan.rows[first:stop]
                raw, before = None, done_rows
                for scored, finished in collect(rows, teacher.run(rows, first)):
                    raw = finished
                    if pending is not None and pending.done():
                        pending.result()  # a failed writer stops the build here, with its own message
                    done_rows = before + scored
                    rate = (tokens + scored) / (time.perf_counter() - started)
                    yield BuildProgress(done_rows, manifest.rows, done_shards, total, rate)
                assert raw is not None
                tokens += sum(len(r.target_ids) for r in rows)
                waiting = time.perf_counter()
                if pending is not None:
                    pending.result()
                    done_shards += 1
                seconds["wait"] += time.perf_counter() - waiting
                pending = pool.submit(_write, writer, i, rows, raw, plan, seconds)
            if pending is not None:
                waiting = time.perf_counter()
                pending.result()
                done_shards += 1
                seconds["wait"] += time.perf_counter() - waiting
        rate = tokens / (time.perf_counter() - started)
        seconds |= asdict(teacher.times)
    else:
        rate = 0.0
    complete = len(store.committed(request.out, total)) == total
    if complete:
        writer.finish()
    yield BuildProgress(done_rows, manifest.rows, done_shards, total, rate, complete, not todo, seconds)


def load_teacher(plan: BuildPlan) -> Any:
    """Load the plan's model and put the sparsifier behind it (a `teacher.Teacher`)."""
    from kd.cache_builder.sparsify import Sparsifier, boundary_token_ids
    from kd.cache_builder.teacher import Teacher

    head = split_head(load_model(plan.request.teacher))
    config, size = plan.manifest.targets, plan.manifest.vocabulary_size
    boundary = None
    if PROFILES[config.profile].boundary:
        boundary = boundary_token_ids(plan.vocabulary, plan.special_ids, head.weight.device)
    return Teacher(head, Sparsifier(config, size, boundary), tokens_per_batch=plan.request.tokens_per_batch)


def _write(writer: store.ShardWriter, index: int, rows: list[TokenRows], raw: RawTargets, plan: BuildPlan,
           seconds: dict[str, float]) -> None:  # fmt: skip
    """Encode and commit one shard (on the writer's thread)."""
    started = time.perf_counter()
    stored, quality = codecs.encode(raw, plan.manifest.targets)
    encoded = time.perf_counter()
    position = index * plan.manifest.layout.shard_rows
    examples = []
    for row in rows:
        stop = position + len(row.target_ids)
        examples.append({
            "id": row.example.id, "task": row.example.task, "split": row.example.split,
            "prompt": row.example.prompt, "target": row.example.target,
            "context_ids": row.context_ids, "n_tokens": len(row.input_ids),
            "row_start": position, "row_end": stop,
            "tokens_digest": store.tokens_digest(row.context_ids, row.target_ids),
        })  # fmt: skip
        position = stop
    try:
        writer.write(index, stored, examples, quality)
    except OSError as error:
        raise write_error(writer.root, error) from error
    seconds["encode"] += encoded - started
    seconds["write"] += time.perf_counter() - encoded


def estimate(plan: BuildPlan) -> dict[str, Any]:
    """What a build would cost: rows, bytes, seconds. Runs a fraction of a second of matrix products, no model.

    Bytes: stored arrays before compression plus the text (an upper bound; real caches end 25-45 % below).
    Seconds: 2 * parameters * tokens floating-point operations at this device's measured matrix speed.
    """
    import torch

    from kd.data.models import resolve_device, resolve_dtype

    parameters = parameter_count(plan.request.teacher)
    device, dtype = resolve_device(plan.request.teacher.device), resolve_dtype(plan.request.teacher)
    a = torch.ones(1024, 2048, device=device, dtype=dtype)
    b = torch.ones(2048, 2048, device=device, dtype=dtype)
    (a @ b).sum().item()
    started = time.perf_counter()
    for _ in range(4):
        (a @ b).sum().item()
    speed = 4 * 2 * 1024 * 2048 * 2048 / (time.perf_counter() - started)
    text = sum(len(r.example.target.encode()) for r in plan.rows)
    return {
        "fingerprint": plan.manifest.fingerprint,
        "examples": plan.manifest.examples,
        "rows": plan.manifest.rows,
        "shards": len(plan.manifest.shards),
        "teacher_tokens": plan.tokens,
        "teacher_parameters": parameters,
        "bytes_per_token_before_compression": plan.raw_bytes_per_token,
        "bytes_at_most": plan.manifest.rows * plan.raw_bytes_per_token + text,
        "seconds_estimated": 2 * parameters * plan.tokens / speed,
        "device": device,
        "overlong": plan.manifest.provenance["overlong"],
        "committed_shards": len(store.committed(plan.request.out, len(plan.manifest.shards))),
    }
