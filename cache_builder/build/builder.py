"""Build a cache: run the teacher over the shards not yet committed, encode and write meanwhile.

    for progress in build(plan_build(request)): ...      # resumable at any moment; the last progress says complete

Encoding and writing happen on one thread beside the forward pass; when that thread fails, the build stops with
its message, and when the build is interrupted, that thread ends what it is at: zarr writes in threads of its own, which a
signal would leave behind at work in a folder that is being removed. What is committed is complete, so the same call
continues after any interruption and ends with the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from kd.cache_builder.build.plan import BuildPlan
from kd.cache_builder.build.reuse import Earlier
from kd.cache_builder.store import codecs, commits
from kd.cache_builder.store.encoding.arrays import Arrays
from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.targets import RawTargets
from kd.cache_builder.store.vocabulary import tokens_digest
from kd.cache_builder.store.writers import shard_writer
from kd.cache_builder.store.writers.claims import Claims
from kd.common.errors import DataError
from kd.common.files import write_error
from kd.data.blocks import TokenRows
from kd.data.tasks.glue import CLASSES
from kd.models.classifiers import load_classifier, split_classifier
from kd.models.heads import LanguageModelHead, split_head
from kd.models.loading import load_request_tokenizer
from kd.models.tokenizer import pad_token_id

if TYPE_CHECKING:
    from kd.cache_builder.teacher.teacher_pass import Teacher


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
    copied: int = 0
    """Shards taken over from another cache."""
    elsewhere: dict[int, str] = field(default_factory=dict)
    """Shards that other builders are at, and who they are; on the last record."""
    seconds: dict[str, float] | None = None
    """Where time went: forward, head, select, encode, write, wait; on the last record."""
    padding_share: float | None = None
    """Share of the positions the teacher computed that was padding; on the last record, None where nothing was scored."""

    @property
    def done(self) -> int:
        """Rows that are finished."""
        return self.rows_done

    @property
    def total(self) -> int:
        """Rows in all."""
        return self.rows_total

    @property
    def note(self) -> str:
        """Speed and shards, for people."""
        return f"{self.tokens_per_second:,.0f} tokens/s, shard {self.shards_done}/{self.shards_total}"


def build(plan: BuildPlan) -> Generator[BuildProgress, None, None]:
    """Run the teacher over every shard of this part that is not committed; yields progress after each batch.

    Raises KdError; whatever was committed stays, and the same call continues from there.
    """
    if not plan.targets_known:
        raise DataError(
            "the teacher has not answered",
            where=plan.request.corpus.spec,
            found="the plan of an upper bound",
            expected="its answers as targets",
            try_="the request on the last record of generate",
        )
    request, manifest = plan.request, plan.manifest
    writer = shard_writer.ShardWriter(request.out, manifest)
    pool = ThreadPoolExecutor(1, thread_name_prefix="kd-writer")
    try:
        writer.sweep()
        if not manifest.complete:
            manifest = pool.submit(writer.create, plan.vocabulary, plan.codes).result()
        if manifest.complete:
            writer.tidy()
            total = len(manifest.shards)
            yield BuildProgress(manifest.rows, manifest.rows, total, total, 0.0, complete=True, reused=True)
            return
        yield from _build(plan, writer, pool)
    except OSError as error:
        raise write_error(request.out, error) from error
    finally:
        pool.shutdown()
        writer.close()


def _build(plan: BuildPlan, writer: shard_writer.ShardWriter, pool: ThreadPoolExecutor) -> Iterator[BuildProgress]:
    request, manifest = plan.request, writer.manifest
    index, count = request.shard
    total, mine = len(manifest.shards), range(index - 1, len(manifest.shards), count)
    present = set(commits.committed(request.out, total))
    for i in present:
        commits.read_commit(request.out, manifest, i)  # a foreign commit must not count as done
    todo = [i for i in mine if i not in present]
    done_rows, done_shards = sum(manifest.shards[i][2] for i in present), len(present)
    seconds = {"forward": 0.0, "head": 0.0, "select": 0.0, "encode": 0.0, "write": 0.0, "wait": 0.0}
    earlier = Earlier(request.extend, manifest) if todo and request.extend is not None else None
    copied = 0
    claims, elsewhere = Claims(request.out), dict[int, str]()
    teacher: Teacher | None = None  # torch is imported where there is something to score
    started, tokens = time.perf_counter(), 0
    try:
        pending: Future[None] | None = None

        def wait() -> int:
            """Let the writer finish; returns the shards it was at."""
            waiting = time.perf_counter()
            if pending is not None:
                pending.result()
            seconds["wait"] += time.perf_counter() - waiting
            return 0 if pending is None else 1

        for i, committed in _ours(todo, request.out, claims, elsewhere):
            first, stop, size = manifest.shards[i]
            if committed:  # another builder was faster
                done_rows, done_shards = done_rows + size, done_shards + 1
                continue
            rows = plan.rows[first:stop]
            known = None if earlier is None else earlier.shard(i, rows)
            if known is not None:
                done_shards += wait()
                pool.submit(_write, writer, i, rows, *known, plan, seconds, claims).result()
                copied, done_rows, done_shards = copied + 1, done_rows + size, done_shards + 1
                yield BuildProgress(done_rows, manifest.rows, done_shards, total, 0.0)
                continue
            if teacher is None:
                from kd.cache_builder.teacher.teacher_pass import collect

                teacher = load_teacher(plan)
                started = time.perf_counter()
            raw, before = None, done_rows
            for scored, finished in collect(rows, teacher.run(rows, first)):
                raw = finished
                claims.touch()
                if pending is not None and pending.done():
                    pending.result()  # a failed writer stops the build here, with its own message
                done_rows = before + scored
                rate = (tokens + scored) / (time.perf_counter() - started)
                yield BuildProgress(done_rows, manifest.rows, done_shards, total, rate)
            assert raw is not None
            tokens += sum(len(r.target_ids) for r in rows)
            done_shards += wait()
            pending = pool.submit(write_shard, writer, i, rows, raw, plan, seconds, claims)
        done_shards += wait()
    finally:
        pool.shutdown()
        claims.release_all()
    rate, padding_share = 0.0, None
    if teacher is not None:
        rate = tokens / (time.perf_counter() - started)
        seconds |= asdict(teacher.times)
        padding_share = teacher.padding_share
    complete = len(commits.committed(request.out, total)) == total
    if complete:
        writer.finish()
    yield BuildProgress(
        done_rows,
        manifest.rows,
        done_shards,
        total,
        rate,
        complete,
        not todo,
        copied,
        elsewhere,
        seconds,
        padding_share,
    )


def _ours(todo: list[int], root: Path, claims: Claims, elsewhere: dict[int, str]) -> Iterator[tuple[int, bool]]:
    """`(shard, is it committed)`: shards of `todo` that we claimed, and those that others have committed meanwhile.

    Shards that others hold are asked for again after the rest, until nothing changes; they stay in `elsewhere`.
    """
    while todo:
        left = []
        for i in todo:
            other = None if commits.commit_path(root, i).exists() else claims.take(i)
            if other is not None:
                elsewhere[i] = other
                left.append(i)
                continue
            elsewhere.pop(i, None)
            committed = commits.commit_path(root, i).exists()
            if committed:
                claims.release(i)
            yield i, committed
        if len(left) == len(todo):
            return
        todo = left


def load_teacher(plan: BuildPlan) -> Teacher:
    """Load the plan's model and put the sparsifier behind it."""
    from kd.cache_builder.teacher.sparsify import Sparsifier, boundary_token_ids
    from kd.cache_builder.teacher.teacher_pass import Teacher

    request = plan.request.teacher
    if plan.request.corpus.kind == CLASSES:
        pad = pad_token_id(load_request_tokenizer(request))
        labels = [piece.decode("utf-8") for piece in plan.vocabulary]
        head: LanguageModelHead = split_classifier(load_classifier(request, labels, pad_id=pad), pad)
    else:
        head = split_head(plan.request.source.load())
    config, size = plan.manifest.targets, plan.manifest.vocabulary_size
    boundary = None
    if PROFILES[config.profile].boundary:
        boundary = boundary_token_ids(plan.vocabulary, plan.special_ids, head.weight.device)
    teacher = Teacher(head, Sparsifier(config, size, boundary), tokens_per_batch=plan.request.tokens_per_batch)
    teacher.prepare(plan.rows)
    return teacher


def write_shard(
    writer: shard_writer.ShardWriter,
    index: int,
    rows: list[TokenRows],
    raw: RawTargets,
    plan: BuildPlan,
    seconds: dict[str, float],
    claims: Claims,
) -> None:
    """Encode and commit one shard (on the writer's thread)."""
    started = time.perf_counter()
    stored, quality = codecs.encode(raw, plan.manifest.targets)
    seconds["encode"] += time.perf_counter() - started
    _write(writer, index, rows, stored, quality, plan, seconds, claims)


def _write(
    writer: shard_writer.ShardWriter,
    index: int,
    rows: list[TokenRows],
    stored: Arrays,
    quality: dict[str, float],
    plan: BuildPlan,
    seconds: dict[str, float],
    claims: Claims,
) -> None:
    started = time.perf_counter()
    position = index * plan.manifest.layout.shard_rows
    examples = []
    for row in rows:
        stop = position + len(row.target_ids)
        examples.append(
            {
                "id": row.example.id,
                "task": row.example.task,
                "split": row.example.split,
                "prompt": row.example.prompt,
                "target": row.example.target,
                "context_ids": row.context_ids,
                "n_tokens": len(row.input_ids),
                "row_start": position,
                "row_end": stop,
                "tokens_digest": tokens_digest(row.context_ids, row.target_ids),
            }
        )
        position = stop
    try:
        writer.write(index, stored, examples, quality)
    except OSError as error:
        raise write_error(writer.root, error) from error
    claims.release(index)
    seconds["write"] += time.perf_counter() - started
