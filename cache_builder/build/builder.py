"""Build a cache: run the teacher over the shards that are not committed yet; encode and write them meanwhile.

    for progress in build(plan_build(request)): ...      # the last record says whether the cache is complete

A shard that is committed is complete, so the same call continues after any interruption and ends with the same bytes. Shards that
other builders hold are left to them; with `wait` the build ends when they are committed too, by whomever.
Encoding and writing happen on one thread beside the forward pass (`shard_writing`); when that thread fails, the build stops
with its message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from kd.cache_builder.build.object_store.s3_objects import S3Objects
from kd.cache_builder.build.object_store.s3_writer import S3Writer
from kd.cache_builder.build.plan import BuildPlan
from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.build.reuse import Earlier
from kd.cache_builder.build.shard_writing import WriterThread
from kd.cache_builder.served.same_teacher import refuse_other_teacher
from kd.cache_builder.served.served_pass import ServedPass
from kd.cache_builder.served.served_teacher import ServedTeacher
from kd.cache_builder.store.profiles import PROFILES
from kd.cache_builder.store.records import commits
from kd.cache_builder.store.records.manifest import CacheManifest, load_manifest
from kd.cache_builder.store.targets import RawTargets
from kd.cache_builder.store.writers.claims import STALE_SECONDS
from kd.cache_builder.store.writers.shard_writer import ShardWriter
from kd.cache_builder.tokens.token_folder import remove_tokens
from kd.common.errors import DataError, KdError, UnfinishedBuildError
from kd.common.files import write_error
from kd.common.paths import StoreAddress
from kd.data.instruction_tasks.glue import CLASSES
from kd.data.tokenizing.token_rows import TokenRows
from kd.models.classifiers import load_classifier, split_classifier
from kd.models.heads import LanguageModelHead, split_head
from kd.models.model_config import load_request_tokenizer
from kd.models.placement.device_maps import bytes_by_device
from kd.models.tokenizer import pad_token_id

if TYPE_CHECKING:
    from kd.cache_builder.teacher.teacher_pass import Teacher

WAIT_SECONDS = 2.0
"""Time between two looks at shards that other builders hold."""


class Scorer(Protocol):
    """A teacher that is ready."""

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent in forward, head and select."""

    @property
    def padding_share(self) -> float | None:
        """Share of the computed positions that was padding; None where it is not known."""

    @property
    def placed(self) -> dict[str, int]:
        """Bytes of weights on each device of this machine."""

    def shard(self, rows: Sequence[TokenRows], first_example: int) -> Iterator[tuple[int, RawTargets | None]]:
        """Score `rows`, which are examples `first_example`, …: yields `(rows done, None)`, at last `(all, targets)`."""

    def close(self) -> None:
        """End what is under way."""


@dataclass(frozen=True)
class BuildProgress:
    """One step of a build.

    It holds more than a `Progress` with a result: builders that share a cache read rows, shards and speed of every record, and
    a build may end without a result, while another builder holds its last shards.
    """

    rows_done: int
    """Rows that are scored or were committed before."""
    rows_total: int
    shards_done: int
    shards_total: int
    tokens_per_second: float
    """Target tokens per second that this process has scored since it loaded the teacher."""
    complete: bool = False
    reused: bool = False
    """Whether there was nothing left to do."""
    copied: int = 0
    """Shards copied from another cache."""
    elsewhere: dict[int, str] = field(default_factory=dict)
    """Shards that other builders hold -> who they are. Set on the last record."""
    left: int = 0
    """Shards of this part of the build that are not committed. Set on the last record."""
    seconds: dict[str, float] | None = None
    """Seconds of forward, head, select, encode, write and wait. Set on the last record."""
    padding_share: float | None = None
    """Share of the computed positions that was padding. Set on the last record; None where nothing was scored."""
    placed: dict[str, int] = field(default_factory=dict)
    """Device -> bytes of weights there, of a teacher that lies on several. Set on the last record."""
    restarted: int = 0
    """Builders that were started in the place of lost ones. Set on the last record."""

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
    """Run the teacher over every shard of this part that is not committed; yields a record after each batch.

    Raises KdError. What is committed stays, and the same call continues from there.
    """
    if not plan.targets_known:
        raise DataError(
            "the teacher has not answered",
            where=plan.request.corpus.spec,
            found="the plan of an upper bound",
            expected="its answers as targets",
            try_="the result of generate",
        )
    request, manifest = plan.request, plan.manifest
    writer = writer_of(request, manifest)
    pool = ThreadPoolExecutor(1, thread_name_prefix="kd-writer")
    try:
        writer.sweep()
        if not manifest.complete:
            manifest = pool.submit(writer.create, plan.vocabulary, plan.codes, plan.text.row_lengths()).result()
        if manifest.complete:
            writer.tidy()
            remove_tokens(request.out)
            total = len(manifest.shards)
            writer.check_sizes(range(total))
            yield BuildProgress(manifest.rows, manifest.rows, total, total, 0.0, complete=True, reused=True)
            return
        writer.recover()
        running = _Running(plan, writer, pool)
        try:
            yield from running.steps()
        finally:
            running.close()
            pool.shutdown()
            running.claims.release_all()
        yield running.last()
    except OSError as error:
        raise write_error(request.out, error) from error
    except KdError:  # such as a teacher that is refused
        writer.withdraw()
        raise
    finally:
        pool.shutdown()
        writer.close()


def writer_of(request: BuildRequest, manifest: CacheManifest) -> ShardWriter:
    """What writes the shards of a build: into its folder, or into an object store."""
    if request.url is None:
        return ShardWriter(request.out, manifest)
    return S3Writer(request.out, manifest, S3Objects(request.url))


class _Running:
    """A build at work: which shards are done, and who is at the others."""

    def __init__(self, plan: BuildPlan, writer: ShardWriter, pool: ThreadPoolExecutor) -> None:
        self.plan, self.writer, self.manifest = plan, writer, writer.manifest
        index, count = plan.request.shard
        self.shards = len(self.manifest.shards)
        present = writer.committed()
        writer.check_sizes(present)  # what is damaged, or of another cache, is not done
        self.todo = [i for i in range(index - 1, self.shards, count) if i not in present]
        self.rows_done = sum(self.manifest.shards[i][2] for i in present)
        self.shards_done = len(present)
        self.copied = 0
        self.claims = writer.claims(plan.request.builder)
        self.elsewhere: dict[int, str] = {}
        self.thread = WriterThread(plan, writer, pool, self.claims)
        self.teacher: Scorer | None = None  # torch is imported only where there is something to score
        self.started = time.perf_counter()
        self.tokens = 0

    def steps(self) -> Iterator[BuildProgress]:
        """Copy or score every shard that is left."""
        extend = self.plan.request.extend
        earlier = Earlier(extend, self.manifest) if self.todo and extend is not None else None
        for i in self._ours():
            if i is None:  # waiting for others
                yield self._progress(0.0)
                continue
            first, stop, size = self.manifest.shards[i]
            rows = list(self.plan.rows[first:stop])
            same = None if earlier is None else earlier.shard(i, rows)
            if same is None:
                yield from self._score(i, rows, first)
                continue
            self.shards_done += self.thread.wait()
            done = self.thread.copy(i, rows, *same)
            self.copied, self.rows_done, self.shards_done = (
                self.copied + 1,
                self.rows_done + size,
                self.shards_done + done,
            )
            yield self._progress(0.0)

    def _ours(self) -> Iterator[int | None]:
        """Shards that this builder has claimed, one by one; None for every look at shards that it waits for.

        Shards that other builders hold are tried again after the rest, until nothing changes; they stay in `elsewhere`. So are
        shards whose claims this builder has lost. Those that others have committed meanwhile are counted.
        """
        todo = self.todo
        while todo:
            left = []
            for i in todo:
                other = None if self._committed_meanwhile(i) else self.claims.take(i)
                if other is not None:
                    self.elsewhere[i] = other
                    left.append(i)
                elif self.claims.holds(i):
                    self.writer.recover(i)  # its last builder may have been killed when the shard was whole
                    if not self._committed_meanwhile(i):
                        self.elsewhere.pop(i, None)
                        yield i
            self.shards_done += self.thread.wait()
            lost, self.thread.lost = self.thread.lost, []
            self.rows_done -= sum(self.manifest.shards[i][2] for i in lost)
            changed, todo = len(left) < len(todo), sorted([*left, *lost])
            if todo and not changed:
                if not self.plan.request.wait:
                    return
                time.sleep(WAIT_SECONDS)
                yield None

    def _committed_meanwhile(self, index: int) -> bool:
        """Whether another builder has committed the shard; then it is counted, and our claim on it is given up."""
        if not self.writer.is_committed(index):
            return False
        self.claims.release(index)
        self.elsewhere.pop(index, None)
        self.rows_done, self.shards_done = self.rows_done + self.manifest.shards[index][2], self.shards_done + 1
        return True

    def _score(self, index: int, rows: list[TokenRows], first_example: int) -> Iterator[BuildProgress]:
        """Run the teacher over one shard and hand the result to the writer's thread."""
        if self.teacher is None:
            self.teacher = teacher_of_plan(self.plan)
            self.started = time.perf_counter()
        raw, before = None, self.rows_done
        for scored, targets in self.teacher.shard(rows, first_example):
            raw = targets
            self.claims.touch(index, scored)
            self.thread.check()  # a failed writer stops the build here, with its own message
            self.rows_done = before + scored
            yield self._progress((self.tokens + scored) / (time.perf_counter() - self.started))
        assert raw is not None
        self.tokens += sum(len(r.target_ids) for r in rows)
        self.shards_done += self.thread.wait()
        self.thread.submit(index, rows, raw)

    def close(self) -> None:
        """End what the teacher has under way."""
        if self.teacher is not None:
            self.teacher.close()

    def _progress(self, rate: float) -> BuildProgress:
        return BuildProgress(self.rows_done, self.manifest.rows, self.shards_done, self.shards, rate)

    def last(self) -> BuildProgress:
        """Finish the cache where all shards are committed; returns the record of the whole build."""
        rate = 0.0 if self.teacher is None else self.tokens / (time.perf_counter() - self.started)
        times = dict.fromkeys(("forward", "head", "select"), 0.0) if self.teacher is None else self.teacher.seconds
        done = self.writer.committed()
        complete = len(done) == self.shards
        if complete:
            self.writer.finish()
            remove_tokens(self.writer.root)
        return replace(
            self._progress(rate),
            complete=complete,
            reused=not self.todo,
            copied=self.copied,
            elsewhere={i: who for i, who in self.elsewhere.items() if i not in done},
            left=len(set(self.todo) - done),
            seconds=times | self.thread.seconds,
            padding_share=None if self.teacher is None else self.teacher.padding_share,
            placed={} if self.teacher is None else self.teacher.placed,
        )


def require_finished(last: BuildProgress, out: Path | str) -> None:
    """Raise UnfinishedBuildError where other builders hold shards of this build. `last` is its last record."""
    if last.left:
        held = [f"{who} holds shards {_numbers(last.elsewhere, who)}" for who in sorted(set(last.elsewhere.values()))]
        ended = f"kd cache unlock {out}, if these builders have ended"
        if isinstance(out, StoreAddress):
            ended = f"claims of builders that have ended are void after {STALE_SECONDS // 60} minutes"
        raise UnfinishedBuildError(
            "the build is not finished: other builders hold the rest of its shards",
            where=out,
            found=f"{last.left} of {last.shards_total} shards are left",
            builders="; ".join(held) or None,
            try_=f"the same command with --wait; {ended}",
        )


def _numbers(elsewhere: Mapping[int, str], builder: str) -> str:
    shards = [str(shard) for shard, who in elsewhere.items() if who == builder]
    return ", ".join([*shards[:8], *(["…"] if len(shards) > 8 else [])])


def teacher_of_plan(plan: BuildPlan) -> Scorer:
    """The plan's teacher, ready for all rows of the plan. Raises KdError."""
    serving = plan.request.serving
    name = "transformers" if serving is None else "vllm" if serving.url is None else "server"
    return BACKENDS[name](plan)


def loaded_teacher(plan: BuildPlan) -> Teacher:
    """Load the plan's model and prepare it for all rows of the plan."""
    from kd.cache_builder.teacher.sparsify import Sparsifier, boundary_token_ids
    from kd.cache_builder.teacher.teacher_pass import Teacher

    request, placed = plan.request.teacher, dict[str, int]()
    if plan.request.corpus.kind == CLASSES:
        pad = pad_token_id(load_request_tokenizer(request))
        labels = [piece.decode("utf-8") for piece in plan.vocabulary]
        head: LanguageModelHead = split_classifier(load_classifier(request, labels, pad_id=pad), pad)
    else:
        model = plan.request.source.load()
        head, placed = split_head(model, plan.request.blocks.forced), bytes_by_device(model)
    config, size = plan.manifest.targets, plan.manifest.vocabulary_size
    boundary = None
    if PROFILES[config.profile].boundary:
        boundary = boundary_token_ids(plan.vocabulary, plan.special_ids, head.weight.device)
    teacher = Teacher(head, Sparsifier(config, size, boundary), tokens_per_batch=plan.request.tokens_per_batch)
    teacher.placed = placed
    teacher.prepare([plan.rows[number] for number in plan.text.extremes])
    return teacher


def served_pass_of(plan: BuildPlan) -> ServedPass:
    """The engine that runs the plan's teacher."""
    source, config = plan.request.source, plan.manifest.targets
    assert isinstance(source, ServedTeacher)
    engine = plan.request.model  # it may have written the answers
    if engine is None:
        engine = source.engine(config.top_k, plan.manifest.vocabulary_size, longest=plan.text.longest)
    served = ServedPass(engine, config, plan.manifest.vocabulary_size)
    done = sorted(commits.committed(plan.request.out, len(plan.manifest.shards)))
    if done and plan.manifest.weights_unknown and plan.request.url is not None:
        raise DataError(
            "whether the server still runs the teacher of the first shards cannot be compared in an object store",
            where=plan.request.url,
            found="a teacher whose weights nobody here has read",
            try_="--teacher-id, or build into a folder, then kd cache push",
        )
    if done and plan.manifest.weights_unknown:
        first = plan.rows[plan.manifest.shards[done[0]][0]]
        refuse_other_teacher(plan.request.out, load_manifest(plan.request.out), done[0], first, served)
    return served


BACKENDS: dict[str, Callable[[BuildPlan], Scorer]] = {
    "transformers": loaded_teacher,
    "vllm": served_pass_of,
    "server": served_pass_of,
}
"""What runs the teacher of a build; the names are those of `served_settings.BACKEND_NAMES`."""
