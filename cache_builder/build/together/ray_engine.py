"""Builders as tasks of the Ray cluster that RAY_ADDRESS names, or of a cluster on this machine that ends with the build."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from kd.cache_builder.build.request import BuildRequest
from kd.cache_builder.build.together.jobs import Answer, Job, Lost, work
from kd.cache_builder.build.together.ray_cluster import builder_needs, cluster_nodes, nodes_of, refuse_other_folders
from kd.common.extras import needed


@contextmanager
def on_ray(request: BuildRequest, workers: int) -> Iterator[Tasks]:
    """Run builders as tasks of a Ray cluster. Those that still run at the end are cancelled."""
    with needed("ray", "--engine ray"):
        import ray
    begun_here = not ray.is_initialized()
    if begun_here:
        address = os.environ.get("RAY_ADDRESS")
        if address is not None:
            cluster_nodes(address)  # raises where it cannot be joined
        # without an address Ray would join a cluster of which it finds a trace on this disk, and wait where that has ended
        ray.init(address or "local", log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    crew: Tasks | None = None
    try:
        nodes = nodes_of(ray.nodes())
        needs = builder_needs(request, workers, nodes)
        if request.url is None:
            refuse_other_folders(ray, request.out, nodes)
        threads = None if needs["num_gpus"] else int(needs["num_cpus"])
        job = Job(request, threads, folder=os.getcwd())
        crew = Tasks(ray, needs, [replace(job, number=number + 1) for number in range(workers)])
        yield crew
    finally:
        if crew is not None:
            crew.stop()
        if begun_here:
            ray.shutdown()


class Tasks:
    """Builders that are tasks of a Ray cluster, which gives each its processors and GPUs."""

    may_queue = True

    def __init__(self, ray: Any, needs: dict[str, float], jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self._ray = ray
        self._task = ray.remote(work).options(max_retries=0, **needs)
        self._running: dict[Any, Job] = {}

    def start(self, job: Job) -> None:
        """As `Crew.start`."""
        self._running[self._task.remote(job)] = job

    def poll(self, seconds: float) -> list[tuple[Job, Answer]]:
        """As `Crew.poll`."""
        if not self._running:
            return []
        done, _ = self._ray.wait(list(self._running), timeout=seconds)
        return [(self._running.pop(reference), self._answer(reference)) for reference in done]

    def _answer(self, reference: Any) -> Answer:
        try:
            answer: Answer = self._ray.get(reference)
        except (
            self._ray.exceptions.RayTaskError
        ) as error:  # an error that is not one of ours: a bug, or a broken device
            return Lost(str(error).strip().splitlines()[-1])
        except self._ray.exceptions.RayError as error:
            return Lost(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
        return answer

    def stop(self) -> None:
        """Cancel the builders that still run."""
        for reference in self._running:
            self._ray.cancel(reference)
