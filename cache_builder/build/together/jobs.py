"""`Job`: the work of one builder; what it answers, and what it means that one was lost."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from kd.cache_builder.build.builder import BuildProgress, build
from kd.cache_builder.build.object_store.staged_output import staged
from kd.cache_builder.build.plan import plan_build
from kd.cache_builder.build.request import BuildRequest
from kd.common.errors import KdError
from kd.common.memory import share_one_heap


@dataclass(frozen=True)
class Job:
    """The work of one builder."""

    request: BuildRequest
    threads: int | None
    """Number of torch's threads; None = leave it as it is."""
    gpu: str | None = None
    """The only GPUs it may see, as CUDA_VISIBLE_DEVICES names them; None = leave the variable as it is."""
    folder: str | None = None
    """Folder that relative paths in the request start from; None = the builder's own."""
    number: int = 1
    """The builder's number among those that were asked for, from 1. One that takes the place of another has its number."""

    def named(self, name: str) -> Job:
        """The same work under another name, which its claims bear."""
        return replace(self, request=replace(self.request, builder=name))


@dataclass(frozen=True)
class Lost:
    """A builder that ended without an answer: its process was killed, or its machine is gone."""

    reason: str
    """What is known of its end, in words."""


Answer = BuildProgress | KdError | Lost
"""A builder's last record, the error that stopped it, or nothing."""


class Crew(Protocol):
    """The builders that an engine runs."""

    @property
    def may_queue(self) -> bool:
        """Whether a builder may wait for a place, for ever where a machine is gone."""

    @property
    def jobs(self) -> Sequence[Job]:
        """The work of the builders that were asked for; none of them has been started."""

    def start(self, job: Job) -> None:
        """Start one builder."""

    def poll(self, seconds: float) -> list[tuple[Job, Answer]]:
        """The builders that ended since the last call, with their answers; waits for at most so many seconds for one."""


def work(job: Job) -> BuildProgress | KdError:
    """Build until every shard is committed or claimed by another builder."""
    share_one_heap()
    if job.folder is not None and Path(job.folder).is_dir():
        os.chdir(job.folder)
    if job.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = job.gpu  # before CUDA is initialised
    if job.threads is not None:
        import torch

        torch.set_num_threads(job.threads)
    try:
        with staged(job.request) as request:
            *_, last = build(plan_build(request))
    except KdError as error:
        return error
    return last
