"""Several builders of one cache at once: processes of this machine, or tasks of a Ray cluster.

    for progress in build_together(plan, workers=4): ...      # records as `build` yields them

The text is tokenised once, by the process that plans, and every builder reads its rows from the folder of the build. A builder
takes the next shard that no other has claimed (`claims`). So a slow builder holds up no other. One that is lost (killed, out of
memory, its machine gone) loses its claims at once and is started again, so many times; after that the others do its work. The
build fails only when no builder is left, and what is committed stays. The builders share only the directory; on a cluster it is
on a file system that all machines see under one path. Progress is read from the commits and the claims.

An engine only starts builders and passes on their answers. Add one: a function in `ENGINES`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

from kd.cache_builder.build.build_settings import RESTARTS
from kd.cache_builder.build.builder import BuildProgress
from kd.cache_builder.build.plan import BuildPlan
from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.build.together.jobs import Answer, Crew, Job
from kd.cache_builder.build.together.local_engine import local
from kd.cache_builder.build.together.outputs import BuildOutput, FolderOutput, StoreOutput
from kd.cache_builder.build.together.ray_engine import on_ray
from kd.common.errors import CacheError, DataError, KdError, unknown_name
from kd.data.instruction_tasks.glue import CLASSES
from kd.data.text_stream import without_examples

POLL_SECONDS = 0.5
LEAST_REST = 10
"""Rest between two looks at commits and claims, in multiples of the time that a look takes."""
LAST_WORDS_SECONDS = 60.0
"""Time for the answers of a cluster's builders that have not ended when the cache is complete."""


def build_together(
    plan: BuildPlan,
    *,
    workers: int,
    engine: str = "local",
    restarts: int = RESTARTS,
    say: Callable[[str], object] = lambda message: None,
) -> Iterator[BuildProgress]:
    """Build with several builders; yields progress, and last one record for all of them.

    restarts   times that a lost builder is started again, for each of them
    say        is told in a sentence when a builder is lost

    Raises the first KdError of a builder, and CacheError when all builders are lost. What is committed stays, and the same call
    continues from there.
    """
    if engine not in ENGINES:
        raise unknown_name("engine", engine, ENGINES)
    if workers < 1:
        raise DataError("--workers must be at least 1", found=f"--workers {workers}")
    request = replace(plan.request, out=plan.request.out.absolute(), model=None)
    if engine == "local" or request.url is None:  # else they do not see the folder, and each tokenises the text itself
        request = replace(request, tokenised=plan.text)
        if request.corpus.kind != CLASSES:  # the rows are all that builders need of a text
            request = replace(request, corpus=without_examples(request.corpus))
    state = BuildState(request, plan.manifest.shards.rows.tolist())
    with ENGINES[engine](request, workers) as crew:
        team = Team(crew, state, restarts, say)
        finished: float | None = None
        while team.running:
            team.look()
            yield state.progress()
            if state.complete():
                finished = finished or time.monotonic()
                if crew.may_queue and time.monotonic() - finished > LAST_WORDS_SECONDS:
                    break  # one that the cluster has found no place for has nothing to do any more
            elif not team.running:
                team.start_for_the_rest()
    yield together(state, team.answers, team.restarted)


class BuildState:
    """How far a build is: its commits, and what the claims say of the shards that builders are at."""

    def __init__(self, request: BuildRequest, sizes: Sequence[int]) -> None:
        self.request, self.sizes = request, sizes
        self.output: BuildOutput = FolderOutput(request.out) if request.url is None else StoreOutput(request.url)
        index, count = request.shard
        self.part = range(index - 1, len(sizes), count)
        self.cost = 0.0
        """Seconds that the last look at commits and claims took."""
        self._before = sum(sizes[i] for i in self.done())
        self._started = time.perf_counter()

    def done(self) -> set[int]:
        """The shards that are committed."""
        return self.output.committed(len(self.sizes))

    def left(self) -> set[int]:
        """The shards of this part of the build that are not committed."""
        return {*self.part} - self.done()

    def held(self) -> set[int]:
        """The shards that live builders hold."""
        return {claim.shard for claim in self.output.claims() if claim.void is None}

    def complete(self) -> bool:
        """Whether the cache is finished."""
        return self.output.complete()

    def progress(self) -> BuildProgress:
        """Rows and shards so far, with the rows of shards that builders are at."""
        looked = time.perf_counter()
        claimed = {claim.shard: claim.rows for claim in self.output.claims() if claim.void is None}
        done = self.done()  # read after the claims: a shard that was committed meanwhile is not counted twice
        under_way = sum(min(rows, self.sizes[i]) for i, rows in claimed.items() if i not in done and i in self.part)
        rows = sum(self.sizes[i] for i in done) + under_way
        now = time.perf_counter()
        self.cost, rate = now - looked, max(0, rows - self._before) / (now - self._started)
        return BuildProgress(rows, sum(self.sizes), len(done), len(self.sizes), rate)


class Team:
    """The builders of one build: who runs, who was lost, and who is started again."""

    def __init__(self, crew: Crew, state: BuildState, restarts: int, say: Callable[[str], object]) -> None:
        self.running: dict[str, Job] = {}
        """Name -> its job."""
        self.answers: list[BuildProgress] = []
        self.restarted = 0
        """Builders that were started in the place of lost ones."""
        self._crew, self._state, self._say, self._restarts = crew, state, say, restarts
        self._spent = dict.fromkeys((job.number for job in crew.jobs), 0)
        self._lost: list[str] = []
        self._left_before = len(state.left()) + 1
        self._tag = secrets.token_hex(4)
        for job in crew.jobs:
            self._start(job)

    def _start(self, job: Job) -> None:
        named = job.named(f"{self._tag}-{job.number}-{self._spent[job.number]}")
        self.running[named.request.builder] = named
        self._crew.start(named)

    def look(self) -> None:
        """Take the answers of builders that ended meanwhile, and start lost ones again. Raises a builder's KdError."""
        seconds = max(POLL_SECONDS, LEAST_REST * self._state.cost)
        for job, answer in self._crew.poll(seconds):
            del self.running[job.request.builder]
            self._take(job, answer)

    def _take(self, job: Job, answer: Answer) -> None:
        if isinstance(answer, KdError):
            raise answer
        if isinstance(answer, BuildProgress):
            self.answers.append(answer)
            return
        shards = self._state.output.release(job.request.builder)
        at = f" at shard {', '.join(map(str, shards))}" if shards else ""
        self._lost.append(f"builder {job.number}{at}: {answer.reason}")
        if self._state.complete():
            return
        if self._spent[job.number] < self._restarts:
            self._spent[job.number] += 1
            self.restarted += 1
            count = f"start {self._spent[job.number]} of at most {self._restarts}"
            self._say(f"builder {job.number} was lost{at}: {answer.reason}. Another takes its place ({count})")
            self._start(job)
        else:
            self._say(f"builder {job.number} was lost{at}: {answer.reason}. The others do its work")

    def start_for_the_rest(self) -> None:
        """When all have ended: start a builder for what lost ones have left. Raises CacheError where nobody gets further.

        What builders elsewhere hold is left to them.
        """
        left = self._state.left()
        orphans = left - self._state.held()
        unfinished = not left and len(self._state.part) == len(self._state.sizes)  # killed before the manifest
        if not self._lost or not (orphans or unfinished):
            return
        if not self.answers or len(left) >= self._left_before:
            raise CacheError(
                "the builders were lost",
                where=self._state.request.url or self._state.request.out,
                found="\n".join(self._lost[-8:]),
                left=f"{len(left)} of {len(self._state.sizes)} shards",
                try_="the same command again: it continues; fewer --workers or a smaller --tokens-per-batch, if memory was short",
            )
        self._left_before = len(left)
        job = self._crew.jobs[0]
        self._spent[job.number] += 1
        self._start(job)


def together(state: BuildState, records: Sequence[BuildProgress], restarted: int = 0) -> BuildProgress:
    """One record for all builders. Their seconds are added."""
    done, last = state.done(), state.progress()
    spent = [record.seconds for record in records if record.seconds is not None]
    padding = [record.padding_share for record in records if record.padding_share is not None]
    elsewhere = {i: who for record in records for i, who in record.elsewhere.items() if i not in done}
    return replace(
        last,
        complete=state.complete(),
        reused=bool(records) and all(record.reused for record in records),
        copied=sum(record.copied for record in records),
        elsewhere=elsewhere,
        left=len({*state.part} - done),
        seconds={name: sum(s[name] for s in spent) for name in spent[0]} if spent else None,
        padding_share=sum(padding) / len(padding) if padding else None,
        placed=next((record.placed for record in records if record.placed), {}),
        restarted=restarted,
    )


ENGINES: dict[str, Callable[[BuildRequest, int], AbstractContextManager[Crew]]] = {"local": local, "ray": on_ray}
